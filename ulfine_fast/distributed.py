"""Several processes of one run: each trains on its rows of every batch, all hold the same weights and state.

Estimators are not averaged. The rows that they are made of go to every process, which then does what a single one
would do with the whole batch; so there is one definition of a step, and no statistic of a method has to be a sum.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist


class World(NamedTuple):
    """The processes of this run. Without torchrun there is one."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0  # on this machine: the number of its CUDA device

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


class ProcessError(RuntimeError):
    """Another process of the run has ended or does not answer."""


def world() -> World:
    """The world that torchrun describes in the environment. ValueError for a part of it without the rest."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    found = {name: os.environ.get(name) for name in names}
    if not any(found.values()):
        return World()
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ValueError(f"world: expected {', '.join(names)} of torchrun, got no {', '.join(missing)}")
    return World(*(int(found[name]) for name in names))


@contextmanager
def process_group(world: World, device: torch.device, *, timeout: float = 600.0) -> Iterator[None]:
    """Connect the processes of `world` for the length of the block: NCCL on CUDA devices, gloo on processors.

    timeout: seconds that a process waits for another before the run ends with ProcessError. A single process needs
    no group.
    """
    if world.size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        yield
    except RuntimeError as error:
        if not _is_of_the_connection(error):
            raise
        raise ProcessError(
            f"process {world.rank} of {world.size}: expected an answer of the others, got none: one of them has ended"
            " or hangs, its own message says why; continue with --resume"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_rows(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """[m, n, ...] of every process as [m * size * n, ...]: part by part, in each the processes in order.

    tensors: any dtype, with the same shapes in all processes; m are the parts of a step, n the rows of one. All
    tensors travel as the bytes of one buffer in which each process fills its places, in one sum over the processes:
    exact, since everything that is added is zero.
    """
    if world.size == 1:
        return [tensor.flatten(0, 1) for tensor in tensors]
    octets = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    packed = octets[0].new_zeros(world.size, sum(map(len, octets)))
    packed[world.rank] = torch.cat(octets)
    dist.all_reduce(packed)
    gathered, start = [], 0
    for tensor, part in zip(tensors, octets, strict=True):
        # a copy starts where every dtype may start
        ranks = packed[:, start : start + len(part)].clone(memory_format=torch.contiguous_format)
        ranks = ranks.flatten().view(tensor.dtype).view(world.size, *tensor.shape)
        gathered.append(ranks.transpose(0, 1).flatten(0, 2))
        start += len(part)
    return gathered


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], world: World) -> None:
    """Replace the gradients of all processes by their mean, in one sum. Every parameter has a gradient.

    DistributedDataParallel would sum while the backward pass still runs, but needs to know which parameters a loss
    touches; at the size of adapters and heads one sum at the end costs less than it saves.
    """
    if world.size == 1:
        return
    packed = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(packed)
    packed /= world.size
    for p, mean in zip(parameters, packed.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor], world: World) -> None:
    """Fill `tensors` with those of the first process."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_equal(digest: str, world: World) -> None:
    """RuntimeError unless all processes call with the same `digest`, a string of hexadecimal digits."""
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
    if dist.get_backend() == "nccl":
        mine = mine.cuda()
    digests = gather_rows([mine[None, None]], world)[0]
    differing = (digests != digests[0]).any(1).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(f"expected the same weights and state in all processes, got others in {differing}")


def _is_of_the_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors that name its source files
    return "gloo" in str(error) or "NCCL" in str(error)
