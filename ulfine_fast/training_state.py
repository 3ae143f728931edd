"""The state of a training in one process: weights, optimizer, mean weights, and the scale of float16 gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ulfine_fast.checkpoint import CheckpointError, digest
from ulfine_fast.config import Training
from ulfine_fast.distributed import (
    World,
    average_gradients,
    largest,
    own_rows,
    shard,
    sharded_parameters,
    take_from_first,
    whole,
)
from ulfine_fast.optimizer import fused_optimizer, load_optimizer, optimizer_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from ulfine_fast.engine import Student

# Of the scale of float16 gradients: torch.amp.GradScaler's defaults.
FIRST_SCALE, GROWTH, BACKOFF, GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000
# What an optimizer keeps for each element of a parameter.
SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class TrainingState:
    """All that training changes, and its change by one step.

    All processes start from the trained weights of the first one. With `training.shard` the tower of `student` is
    split over them in place, see `distributed.shard`; a `tower.blocks` has the modules that are whole one at a time.
    """

    def __init__(self, student: Student, training: Training, world: World) -> None:
        self.student, self.training, self.world = student, training, world
        self.device = next(student.learner.parameters()).device
        take_from_first(list(tuned_tensors(student).values()), world)
        split = {}
        if training.shard:
            shard(student.tower, student.tower.blocks, world, self.device)
            split = sharded_parameters(student)
        # of a parameter that is split, the rows of this process: an ordinary tensor, for which all optimizers work
        self.weights = {
            name: _rows(p) if name in split else p
            for name, p in student.named_parameters()
            if p.requires_grad
        }
        tower = [name for name in self.weights if name.startswith("tower.")]
        decay = training.weight_decay
        groups = [{"params": [self.weights[name] for name in tower], "weight_decay": decay}] if tower else []
        self.optimizer = fused_optimizer(
            [*groups, *student.learner.groups(decay)], training.optimizer, training.learning_rate
        )
        self.learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        rows = {id(self.weights[name]) for name in split}
        self.replicated = [p for p in self.learned if id(p) not in rows]
        # by the names of `tensors`; the tower's are the first parameters of the optimizer
        self.split = split | {f"mean.{name}": p for name, p in split.items()}
        for index, name in enumerate(tower):
            if name in split:
                self.split |= {f"optimizer.{index}.{slot}": split[name] for slot in SLOTS}
        self.mean_weights = (
            {name: p.detach().clone() for name, p in self.weights.items()} if training.ema else {}
        )
        # products of a tower may be of float16, whose gradients are scaled
        self.half = bool(tower) and training.precision == "fp16"
        self.scaled = self.half or training.parts > 1
        self.scale = torch.tensor(FIRST_SCALE if self.half else 1.0, device=self.device)
        self.scale_age = torch.zeros((), dtype=torch.int32, device=self.device)
        self.one = torch.ones((), device=self.device)

    def clear_gradients(self) -> None:
        """Before the first part of a batch."""
        # the gradient of a split parameter is a view of the whole one
        self.optimizer.zero_grad(set_to_none=not self.split)

    def add_gradients(self, loss: Tensor) -> None:
        """Those of the loss of a part of a batch."""
        (loss * (self.scale / self.training.parts) if self.scaled else loss).backward()

    def update(self, loss: Tensor) -> Tensor:
        """One step of the optimizer and of the mean weights; nothing waits for the device.

        Returns [] bool, whether `loss` and gradients were finite in all processes; where not, nothing changes.
        """
        for p in self.learned:
            if p.grad is None:
                # a loss that does not touch a parameter leaves it a gradient of zero, on one process as on several
                p.grad = torch.zeros_like(p)
        average_gradients(self.replicated, self.world)
        gradients = [p.grad for p in self.learned]
        found_inf = torch.zeros_like(self.one)
        # In one launch, as gradient scalers look for what is not finite; a scale of 1 changes no bit.
        if self.scaled:
            torch._amp_foreach_non_finite_check_and_unscale_([loss], found_inf, self.one)
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self.scale.reciprocal())
        else:
            torch._amp_foreach_non_finite_check_and_unscale_([loss, *gradients], found_inf, self.one)
        # Fused optimizers read this flag on the device and then do nothing.
        self.optimizer.found_inf = largest(found_inf, self.world)
        self.optimizer.step()
        if self.half:
            torch._amp_update_scale_(self.scale, self.scale_age, found_inf, GROWTH, BACKOFF, GROWTH_STEPS)
        return found_inf == 0

    def average(self, finite: Tensor) -> None:
        """Take the weights after a step into their mean, where it was `finite`."""
        if self.mean_weights:
            share = torch.where(finite, 1.0 - self.training.ema, 0.0)
            for name, mean in self.mean_weights.items():
                mean.lerp_(self.weights[name].detach(), share)

    @torch.no_grad()
    def take_mean_weights(self) -> None:
        """At the end of a run, where there are any."""
        for name, mean in self.mean_weights.items():
            self.weights[name].copy_(mean)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a continued run needs, by name and not copied; of what is split, the rows of this process.

        Frozen weights of the tower are not part of it.
        """
        tensors = tuned_tensors(self.student)
        tensors |= {name: self.weights[name] for name in tensors if name in self.split}
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean_weights.items()}
        tensors |= {"scale": self.scale, "scale_age": self.scale_age}
        return tensors | optimizer_tensors(self.optimizer)

    def whole_tensors(self) -> dict[str, Tensor]:
        """`tensors` for a checkpoint, nothing split; empty in all processes but the first. All of them call this."""
        found = {}
        for name, tensor in self.tensors().items():
            tensor = whole(tensor, self.world, self.split.get(name))
            if self.world.leads:
                # one at a time: together they may not fit on the device
                found[name] = tensor.cpu() if name in self.split else tensor
        return found

    def checksum(self) -> str:
        """Hexadecimal digits that are equal in all processes as long as what all of them hold is."""
        sums = [
            tensor.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64)
            for name, tensor in self.tensors().items()
            if name not in self.split
        ]
        return digest(torch.stack([total.to(self.device) for total in sums]))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the `whole_tensors` of a checkpoint, whatever number of processes wrote it."""
        _check_fit(self.student, tensors)
        own = {
            name: own_rows(tensor, self.split[name]) if name in self.split else tensor
            for name, tensor in tensors.items()
        }
        load_optimizer(self.optimizer, own)
        for name, place in self.tensors().items():
            place.copy_(own[name])


def tuned_tensors(student: Student) -> dict[str, Tensor]:
    """Everything of `student` that training changes, by name and not copied."""
    frozen = {name for name, p in student.tower.named_parameters(prefix="tower") if not p.requires_grad}
    return {name: tensor for name, tensor in student.state_dict().items() if name not in frozen}


@torch.no_grad()
def load_tuned_tensors(student: Student, tensors: Mapping[str, Tensor], *, averaged: bool = False) -> None:
    """Fill `student` from the tensors of a checkpoint, with `averaged` from the mean weights where it has them.

    Raises CheckpointError, before anything is written, when it is of another encoder, tuning or method.
    """
    _check_fit(student, tensors)
    for name, place in tuned_tensors(student).items():
        place.copy_(tensors.get(f"mean.{name}", tensors[name]) if averaged else tensors[name])


def _check_fit(student: Student, tensors: Mapping[str, Tensor]) -> None:
    for name, place in tuned_tensors(student).items():
        if name not in tensors or tensors[name].shape != place.shape:
            got = list(tensors[name].shape) if name in tensors else "none"
            raise CheckpointError(f"expected {name} {list(place.shape)} in the checkpoint, got {got}")


def _rows(parameter: DTensor) -> Tensor:
    """The rows of this process of a split parameter and of its gradient, sharing their memory."""
    parameter.grad = torch.zeros_like(parameter)
    rows = parameter.to_local().detach()
    rows.grad = parameter.grad.to_local()
    return rows
