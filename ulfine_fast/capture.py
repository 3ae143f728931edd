"""A training step as one CUDA graph: the host starts one launch in place of all that the step consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    What the step writes to is not changed by the recording, and must not be moved or replaced after it; nor may
    anything else that the step reads.

    Args:
        step: a function of the batch alone that never waits for the device.
        state: gives, by name, all tensors that the step writes to, those of the optimizer too.
        optimizer: a fused one; each learning rate a tensor on the device, as `fused_optimizer` makes it there, to be
            filled between two steps.
        batch: named tuple of tensors or None, of the shapes to come, on a CUDA device.

    Raises:
        ValueError: a learning rate is not on the device of the batch.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        state: Callable[[], Mapping[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor | None, ...],
    ) -> None:
        device = batch[0].device
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor) or rate.device != device:
                raise ValueError(f"CapturedStep: learning rate must be a tensor on {device}, got {rate!r}")
        self.batch = batch._make(None if tensor is None else tensor.clone() for tensor in batch)
        with _restored(state):
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


def device_of(learner: nn.Module) -> torch.device:
    """The device of `learner`; ValueError if it has no graphs."""
    device = next(learner.parameters()).device
    if device.type != DEVICE:
        raise ValueError(f"capture needs a CUDA device, got {device}")
    return device


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


@contextmanager
def _restored(state: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
    """Whatever the block does to the tensors of `state`, in place, is undone bit by bit."""
    before = {name: tensor.detach().clone() for name, tensor in state().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in state().items():
                # An optimizer without state starts from zeros.
                tensor.copy_(before[name]) if name in before else tensor.zero_()


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """`capturable` is set only while recording: AdamW warns of it in a step that runs as it stands."""
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
