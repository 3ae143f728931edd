"""Optimizers that can skip a step on the device, their learning rate, and their state by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ulfine_fast.config import Training

MOMENTUM = 0.9


def fused_optimizer(groups: list[dict[str, Any]], kind: str, rate: float) -> torch.optim.Optimizer:
    """Fused "sgd" (momentum 0.9) or "adamw" over `groups`, which skips a step where its `found_inf` is not 0."""
    device = groups[0]["params"][0].device
    if device.type == "cuda":
        rate = torch.tensor(rate, device=device)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # the first step would otherwise leave the buffer unset if it is skipped
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(training: Training, step: int) -> float:
    """Cosine from `training.learning_rate` at step 0 to 0 at `training.steps`."""
    return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / training.steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give the next step this learning rate: in place where it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of `optimizer` by names "optimizer.PARAMETER.SLOT", for a checkpoint."""
    return {
        f"optimizer.{index}.{slot}": tensor
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, tensor in slots.items()
    }


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill `optimizer` from the tensors of a checkpoint."""
    saved = optimizer.state_dict()
    saved["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            saved["state"].setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(saved)
    for parameter, slots in optimizer.state.items():
        for slot, tensor in slots.items():
            if tensor.shape == parameter.shape:
                # fused kernels go by memory, whose order a checkpoint does not keep: channels may be last
                slots[slot] = torch.empty_like(parameter).copy_(tensor)
