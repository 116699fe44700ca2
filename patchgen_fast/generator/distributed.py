"""One process or many: who computes which rows, and whole tensors out of sharded ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int, parts: int) -> tuple[slice, list[slice]]:
        """The rows of a batch that are this process's, and these cut into as many parts.

        Raises ValueError unless the batch can be cut evenly.
        """
        if batch % (self.size * parts):
            raise ValueError(
                f"expected a batch that {self.size} processes with {parts} parts each share "
                f"evenly, got {batch}; choose a multiple of {self.size * parts}"
            )
        own, part = batch // self.size, batch // (self.size * parts)
        rows = slice(self.rank * own, (self.rank + 1) * own)
        return rows, [slice(begin, begin + part) for begin in range(0, own, part)]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes of a tensor on the device."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """The world that torchrun started this process in, or one of its own.

    `device` is "cpu", "cuda" or None for CUDA where there is one; every process takes the GPU of
    its local rank.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device(kind))
        return
    place = (
        torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    )
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, world: World) -> None:
    """Shard parameters, gradients and optimizer over all processes, layer by layer (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in (model.encoder, model.decoder):
        for layer in part.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model with gradients averaged over all processes (DDP)."""
    if world.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    # A step whose images are not seen leaves the encoder out.
    return DistributedDataParallel(model, find_unused_parameters=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where it is sharded. All processes call it together."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def like(tensor: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, sharded as a parameter of its shape is."""
    if hasattr(parameter, "placements") and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    return tensor
