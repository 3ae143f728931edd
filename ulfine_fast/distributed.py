"""Several processes of one run: each trains on its rows of every batch, all hold the same weights and state.

Estimators are not averaged. The rows that they are made of go to every process, which then does what a single one
would do with the whole batch; so there is one definition of a step, and no statistic of a method has to be a sum.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class World(NamedTuple):
    """The processes of this run. Without torchrun there is one."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0  # on this machine: the number of its CUDA device
    on_machine: int = 1  # processes on this machine

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


class ProcessError(RuntimeError):
    """Another process of the run has ended or does not answer."""


def world() -> World:
    """The world that torchrun describes in the environment. ValueError for a part of it without the rest."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
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
    tensors travel as the bytes of one buffer.
    """
    if world.size == 1:
        return [tensor.flatten(0, 1) for tensor in tensors]
    octets = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    packed = octets[0].new_empty(world.size, sum(map(len, octets)))
    dist.all_gather(list(packed), torch.cat(octets))
    gathered, start = [], 0
    for tensor, part in zip(tensors, octets, strict=True):
        # a copy starts where every dtype may start
        ranks = packed[:, start : start + len(part)].clone(memory_format=torch.contiguous_format)
        ranks = ranks.flatten().view(tensor.dtype).view(world.size, *tensor.shape)
        gathered.append(ranks.transpose(0, 1).flatten(0, 2))
        start += len(part)
    return gathered


def gather_octets(octets: bytes, world: World, device: torch.device) -> list[bytes]:
    """The `octets` of every process, of whatever length, in order. device: of the processes' group."""
    if world.size == 1:
        return [octets]
    length = torch.tensor([len(octets)], device=device)
    padded = torch.zeros(int(largest(length.clone(), world)), dtype=torch.uint8, device=device)
    if octets:
        padded[: len(octets)] = torch.frombuffer(bytearray(octets), dtype=torch.uint8)
    rows, lengths = gather_rows([padded[None, None], length[None]], world)
    return [row[:n].cpu().numpy().tobytes() for row, n in zip(rows, lengths.tolist(), strict=True)]


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


def largest(number: Tensor, world: World) -> Tensor:
    """The largest of the processes' `number`, which takes its place."""
    if world.size > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor], world: World) -> None:
    """Fill `tensors` with those of the first process."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_equal(digest: str, what: str, world: World, device: torch.device) -> None:
    """RuntimeError, naming `what`, unless all processes call with the same `digest`, hexadecimal digits.

    device: of the processes' group, see `process_group`.
    """
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    digests = gather_rows([mine[None, None]], world)[0]
    differing = (digests != digests[0]).any(1).nonzero().flatten().tolist()
    if differing:
        raise RuntimeError(f"expected the same {what} in all processes, got others in {differing}")


def shard(module: nn.Module, blocks: Sequence[nn.Module], world: World, device: torch.device) -> None:
    """Split the parameters of `module` over the processes, with their gradients, in place (FSDP2).

    A process keeps the rows of its rank, `torch.chunk` by the first dimension, as DTensors. The parameters of each of
    `blocks`, and together those outside all blocks, are whole only while they are used. The backward pass leaves the
    mean of the processes' gradients; every process runs `module` equally often.

    Scalars and parameters that are not contiguous, such as a convolution with channels last, stay whole in every
    process: FSDP takes neither. Their gradients are to be averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    ignored = {p for p in module.parameters() if p.ndim == 0 or not p.is_contiguous()}
    for part in (*blocks, module):
        # also of the module around the blocks: a pass without gradient must not leave weights from before a step
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def sharded_parameters(module: nn.Module) -> dict[str, DTensor]:
    """The parameters of `module` that are split over the processes, by name."""
    from torch.distributed.tensor import DTensor

    return {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}


def whole(tensor: Tensor, world: World, like: DTensor | None = None) -> Tensor:
    """All rows of a tensor that is split over the processes, which all call this; any other one as it is.

    tensor: a DTensor, or with `like` the rows of this process, split as those of `like`.
    """
    if world.size == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    if like is not None:
        mesh, placements = like.device_mesh, like.placements
        tensor = DTensor.from_local(tensor, mesh, placements, shape=like.shape, stride=like.stride())
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor, like: DTensor) -> Tensor:
    """The rows of a whole `tensor` that this process has of `like`."""
    from torch.distributed.tensor import distribute_tensor

    split = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    # not a view, which would keep the whole
    return split.to_local().clone()


def _is_of_the_connection(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors that name its source files
    return "gloo" in str(error) or "NCCL" in str(error)
