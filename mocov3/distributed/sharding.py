"""Weights, gradients and optimizer states sharded over ranks (FSDP2, Zhao et al. 2023, arXiv 2304.11277).

Every block of an encoder, its stem, projector and predictor are gathered when they run and sharded again afterwards.
Files always hold the whole tensors, so that checkpoints do not depend on the number of ranks.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mocov3.distributed.world import World
from mocov3.errors import UserError

ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether this torch shards on CPUs too (2.6 does not)."""


def shard(world: World, units: Iterable[nn.Module], calls: dict[nn.Module, list[str]]) -> None:
    """Shard the parameters of ``units`` (inner ones first) over all ranks.

    Args:
        world: this rank; a world of one works, and shares nothing.
        units: modules that are gathered as one; parameters of a unit inside another belong to the inner one.
        calls: methods, other than ``forward``, by which units are run.

    Raises:
        UserError: on CPUs, if this torch can shard on GPUs only.
    """
    if world.device.type == "cpu" and not ON_CPU:
        raise UserError(f"--fsdp: torch {torch.__version__} shards on GPUs only; use a newer one on CPUs")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # features are often a view of more; nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    for module, names in calls.items():
        for name in names:
            register_fsdp_forward_method(module, name)


def reduce_now(units: Iterable[Any], now: bool) -> None:
    """Whether backward passes from here on reduce gradients over ranks, or leave them to a later one."""
    for unit in units:
        unit.set_requires_gradient_sync(now)


def reshard(modules: Iterable[Any]) -> None:
    """Give back what the outermost units keep gathered after a forward pass; nothing where nothing is sharded."""
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every tensor; the tensor itself where it is not sharded."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of ``module`` are sharded over ranks."""
    return any(isinstance(p, DTensor) for p in module.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold all of ``module`` on every rank, so that ranks may run it at different times. Every rank must enter."""
    units: list[Any] = [m for m in module.modules() if hasattr(m, "set_requires_gradient_sync")]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def whole(values: object, *, keep: bool = True) -> Any:
    """``values`` with every sharded tensor gathered, on the CPU; dicts and lists are traversed.

    Every rank must call it; those that do not ``keep`` the result get empty tensors, one gathered tensor after the
    other, so that nowhere but on the keeper's host all are held at once.
    """
    if isinstance(values, DTensor):
        everything = values.full_tensor().detach()
        return everything.cpu() if keep else everything.new_empty(0)
    if isinstance(values, dict):
        return {key: whole(value, keep=keep) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value, keep=keep) for value in values]
    return values


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds a part of ``tensor`` only."""
    return isinstance(tensor, DTensor)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value``, the same on every rank, sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def norms(world: World, tensors: Iterable[Tensor], sharded: bool) -> Tensor:
    """Euclidean norm of every tensor, its parts on all ranks together, by one collective call for all."""
    parts = torch.stack([torch.linalg.vector_norm(t) for t in local(tensors)])
    return world.sum(parts.square()).sqrt() if sharded else parts
