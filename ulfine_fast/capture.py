"""A training step as one CUDA graph: the host starts one launch in place of all that the step consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The only devices with graphs.
DEVICE = "cuda"
# Runs before the recording: libraries start and caches fill in them, which a graph could not hold.
WARM_UP = 3


class CapturedStep:
    """A step, recorded once and replayed with every batch; its bits are those of the step itself.

    The head and the optimizer are not changed by the recording, and must not be moved or replaced after it; nor
    may anything else that the step reads.

    Args:
        step: a function of the batch alone that never waits for the device, as
            `lambda batch: train_step(head, optimizer, batch, method, classes)`.
        head, optimizer: all that the step writes to. Fused optimizer; each learning rate a tensor on the device of the
            head, as `build_optimizer` makes it there, to be filled between two steps.
        batch: named tuple of tensors or None, of the shapes to come.

    Raises:
        ValueError: the head, or a learning rate, is not on a CUDA device.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        head: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor | None, ...],
    ) -> None:
        device = device_of(head)
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor) or rate.device != device:
                raise ValueError(f"CapturedStep: learning rate must be a tensor on {device}, got {rate!r}")
        self.batch = batch._make(None if tensor is None else tensor.clone() for tensor in batch)
        with _restored(head, optimizer):
            _warm_up(lambda: step(self.batch), device)
            with _capturable(optimizer):
                self.replay, self.result = _record(lambda: step(self.batch), device)

    def __call__(self, batch: tuple[Tensor | None, ...]) -> Any:
        """What the step returns for `batch`, in tensors that the next call overwrites.

        Raises ValueError for a batch of another shape, dtype or device than the recorded one.
        """
        for name, own, new in zip(self.batch._fields, self.batch, batch, strict=True):
            if _kind(own) != _kind(new):
                raise ValueError(f"CapturedStep: {name} must be {_kind(own)}, got {_kind(new)}")
        for own, new in zip(self.batch, batch, strict=True):
            if own is not None:
                own.copy_(new)
        self.replay()
        return self.result


def device_of(head: nn.Module) -> torch.device:
    """The device of `head`; ValueError if it has no graphs."""
    device = next(head.parameters()).device
    if device.type != DEVICE:
        raise ValueError(f"CapturedStep: head must be on a CUDA device, got {device}")
    return device


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _tensors(head: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    slots = (tensor for slots in optimizer.state.values() for tensor in slots.values())
    return [*head.parameters(), *head.buffers(), *slots]


@contextmanager
def _restored(head: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever the block does to the tensors of both, in place, is undone bit by bit."""
    before = {tensor: tensor.detach().clone() for tensor in _tensors(head, optimizer)}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in _tensors(head, optimizer):
                # An optimizer without state starts from zeros.
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """AdamW wants to be told, in a recording alone: it warns of it in a step that runs as it stands."""
    asking = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in asking]
    for group in asking:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(asking, before, strict=True):
            group["capturable"] = value


def _warm_up(run: Callable[[], Any], device: torch.device) -> None:
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(aside)


def _record(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """What replays `run`, and its result, which every replay writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = run()
    return graph.replay, result
