"""``--fsdp``: a model whose weights, gradients and optimizer states are sharded over ranks, and its optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from mocov3.distributed import World
from mocov3.distributed.sharding import local, norms, shard
from mocov3.models import MoCo
from mocov3.optim import LARS, Group, build_optimizer


def shard_model(model: MoCo, world: World) -> None:
    """Shard the parameters of ``model``: a unit for every block, projector, predictor, and the rest of an encoder.

    Call it before the optimizer is built.
    """
    encoders = (model.base_encoder, model.momentum_encoder)
    units: list[nn.Module] = []
    for encoder in encoders:
        units += [*blocks(encoder), getattr(encoder, encoder.projector_name), encoder]
    shard(world, [*units, model.predictor], {encoder: ["features"] for encoder in encoders})


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The parts of a backbone that run one after the other: blocks of a ViT, stages or layers of other networks."""
    inner: Any = getattr(encoder, "backbone", encoder)
    children = [
        child
        for name in ("blocks", "layers", "stages", "layer1", "layer2", "layer3", "layer4")
        for child in getattr(inner, name, nn.Module()).children()
    ]
    return [child for child in children if next(child.parameters(), None) is not None]


class ShardedLARS(LARS):
    """LARS over shares of the parameters: each rank updates its own; norms are finished across ranks in one call.

    Args:
        params: parameters or groups of them.
        world: this rank.
        weight_decay: as of ``LARS``.
        momentum: as of ``LARS``.
    """

    def __init__(self, params: ParamsT, *, world: World, weight_decay: float, momentum: float) -> None:
        super().__init__(params, weight_decay=weight_decay, momentum=momentum)
        self.world = world

    def _update(self, params: list[Tensor], group: Group, scale: Tensor | None, found_inf: Tensor | None) -> None:
        # gradients were unscaled before: ``scale`` says nothing here
        weights, mus = local(params), local(self._momentum(p) for p in params)
        grads = local(p.grad for p in params if p.grad is not None)
        matrices = [i for i, p in enumerate(params) if p.ndim > 1]
        for i in matrices:
            grads[i] = grads[i].add(weights[i], alpha=group["weight_decay"])
        both_norms = norms(self.world, [*(weights[i] for i in matrices), *(grads[i] for i in matrices)], sharded=True)
        sizes, changes = both_norms.split(len(matrices))
        both = (sizes > 0) & (changes > 0)
        factors = torch.where(both, group["trust_coefficient"] * sizes / changes, torch.ones_like(sizes))
        for i, factor in zip(matrices, factors, strict=True):
            grads[i] = grads[i] * factor
        for weight, mu, grad in zip(weights, mus, grads, strict=True):
            new = mu * group["momentum"] + grad
            moved = weight - group["lr"] * new
            if found_inf is not None:  # told on the device that the step does not count
                new, moved = torch.where(found_inf == 0, new, mu), torch.where(found_inf == 0, moved, weight)
            mu.copy_(new)
            weight.copy_(moved)


def sharded_optimizer(
    params: ParamsT, name: str, *, world: World, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """``build_optimizer`` for shared parameters."""
    if name == "lars":
        return ShardedLARS(params, world=world, weight_decay=weight_decay, momentum=momentum)
    return build_optimizer(params, name, weight_decay=weight_decay, momentum=momentum)
