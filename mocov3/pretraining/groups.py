"""Parameters in groups, for training that starts from existing weights: slower towards the input, heads first.

Groups are runs of the model's parameters in their order, so that the optimizer numbers them as without groups.
"""

import re

import torch
from torch import nn

from mocov3.config.archs import HEAD_KEYS
from mocov3.errors import UserError
from mocov3.models import Encoder, MoCo
from mocov3.optim import Group

_BLOCK = re.compile(
    r"^(?:backbone\.)?((?:[A-Za-z_]+\d*\.)*?(?:blocks|layer\d|layers|stages)(?:\.\d+)?(?:\.blocks\.\d+)?)\."
)


def parameter_groups(model: MoCo, layer_decay: float, *, staged: bool) -> list[nn.Parameter] | list[Group]:
    """Parameters for the optimizer: all in one, or runs with ``lr_scale`` = layer_decay^(blocks above) (Clark et al.
    2020, as BEiT and MAE fine-tune). Heads have scale 1.

    Args:
        model: query encoder, momentum encoder, predictor.
        layer_decay: factor from a block to the one below it; 1: all alike.
        staged: whether the backbone is to be held at first (``scale_backbone``).
    """
    if layer_decay == 1 and not staged:
        return list(model.parameters())
    depth = block_numbers(model.base_encoder)
    top = max(depth.values(), default=0) + 1
    groups: list[Group] = []
    for name, parameter in model.named_parameters():
        inner = name.removeprefix("base_encoder.")
        backbone = name.startswith("base_encoder.") and not inner.startswith(HEAD_KEYS)
        scale = layer_decay ** (top - depth[inner]) if backbone else 1.0
        part = "backbone" if backbone else "head"
        if not groups or (groups[-1]["part"], groups[-1]["full_scale"]) != (part, scale):
            groups.append({"params": [], "part": part, "full_scale": scale, "lr_scale": scale})
        groups[-1]["params"].append(parameter)
    return groups


def block_numbers(encoder: Encoder) -> dict[str, int]:
    """Backbone parameter → number of its block from the input, 0 for the stem; what follows the blocks is one more."""
    numbers: dict[str, int] = {}
    seen: list[str] = []
    for name, _ in encoder.named_parameters():
        if name.startswith(HEAD_KEYS):
            continue
        block = _BLOCK.match(name)
        if block and block[1] not in seen:
            seen.append(block[1])
        numbers[name] = seen.index(block[1]) + 1 if block else (len(seen) + 1 if seen else 0)
    return numbers


def scale_backbone(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale the learning rates of the backbone's groups; by 0 only heads train."""
    for group in optimizer.param_groups:
        if group.get("part") == "backbone":
            group["lr_scale"] = factor * group["full_scale"]


def freeze_until(encoder: Encoder, block: str) -> None:
    """Freeze the parameters from the input up to and with the block named ``block`` (layer2, layer3.1, blocks.5).

    Batch norms in it keep normalising by their batches.

    Raises:
        UserError: if there is no such block, or nothing of the backbone would be left to train.
    """
    names = [name for name, _ in encoder.named_parameters() if not name.startswith(HEAD_KEYS)]
    last = max((i for i, name in enumerate(names) if _within(name, block)), default=None)
    if last is None:
        known = sorted({name.split(".")[0] if not (m := _BLOCK.match(name)) else m[1] for name in names})
        raise UserError(f"--freeze-until {block}: this arch has no such block; it has {', '.join(known)}")
    if not any(p.requires_grad and p.ndim > 1 for name, p in encoder.named_parameters() if name in names[last + 1 :]):
        raise UserError(f"--freeze-until {block}: the whole backbone would be frozen; name a lower block")
    parameters: dict[str, nn.Parameter] = dict(encoder.named_parameters())
    for name in names[: last + 1]:
        parameters[name].requires_grad_(False)


def _within(name: str, block: str) -> bool:
    return name.removeprefix("backbone.").startswith(f"{block}.")
