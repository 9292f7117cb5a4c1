"""Weights of others and ours: what a state dict is, the backbone in it, and the way to DeiT's format.

Every conversion is a table of prefixes that accounts for every key, dropped ones included.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mocov3 import checkpoint
from mocov3.config.archs import BUILT_IN_ARCHS, is_resnet
from mocov3.errors import UserError
from mocov3.models.backbones import Encoder, build_backbone

# what a file is ← prefix of the encoder's keys in it; the first that occurs decides
_PREFIXES = {
    "pre-training checkpoint": "module.base_encoder.",
    "pre-training checkpoint without prefix": "base_encoder.",
    "linear evaluation": "module.",
    "backbone": "",
}
_HEADS = ("fc.", "head.", "projector.")


@dataclass(frozen=True)
class BackboneWeights:
    """The backbone found in a file, and the keys left out, each with its reason."""

    kind: str
    arch: str | None
    state: dict[str, Tensor]
    dropped: dict[str, str] = field(default_factory=dict)


def find_backbone(contents: dict[str, Any], where: str, *, momentum: bool = False) -> BackboneWeights:
    """The backbone in the contents of a weights file: ours, the reference's, DeiT's, timm's or torchvision's.

    Args:
        contents: what ``checkpoint.read`` returned.
        where: the file, for messages.
        momentum: take the momentum encoder of a pre-training checkpoint.

    Raises:
        UserError: if there is no backbone in it.
    """
    arch = contents.get("arch")
    state = contents.get("state_dict", contents.get("model", contents))
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}: holds no weights (entries: {', '.join(map(str, list(contents)[:6]))})")
    state = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    kind, prefix = next((k, p) for k, p in _PREFIXES.items() if any(key.startswith(p) for key in state))
    if momentum:
        if "base_encoder." not in prefix:
            raise UserError(f"{where}: is a {kind} and has no momentum encoder")
        prefix = prefix.replace("base_encoder.", "momentum_encoder.")
    kept: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            dropped[key] = "not of this encoder"
        elif name.startswith(_HEADS):
            dropped[key] = "head"
        else:
            kept[name] = value
    if not kept:
        raise UserError(f"{where}: holds no backbone, only {', '.join(list(state)[:3])} …")
    return BackboneWeights(kind, arch if isinstance(arch, str) else None, kept, dropped)


def to_deit(contents: dict[str, Any], where: str) -> dict[str, dict[str, Tensor]]:
    """``{"model": encoder without head}``, as DeiT's ``--resume`` reads it; ResNets without ``fc.*``.

    Raises:
        UserError: if ``contents`` is not a pre-training checkpoint.
    """
    found = find_backbone(contents, where)
    if not found.kind.startswith("pre-training"):
        raise UserError(f"{where}: is a {found.kind}, not a pre-training checkpoint; nothing to convert")
    return {"model": found.state}


def load_into(encoder: Encoder, weights: BackboneWeights, where: str) -> list[str]:
    """Load a backbone into an encoder, leaving its head alone; returns the head's keys that were not loaded.

    A position table of another grid is left as built, since it is a function of the grid.

    Raises:
        UserError: naming the first key that is missing, unknown or of another shape; nothing is loaded then.
    """
    wanted = encoder.state_dict()
    head = [key for key in wanted if key.startswith(_HEADS)]
    state = dict(weights.state)
    if not any(key in wanted for key in state) and any(f"backbone.{key}" in wanted for key in state):
        state = {f"backbone.{key}": value for key, value in state.items()}  # timm's own file into timm/NAME
    table = state.get("pos_embed")
    if table is not None and "pos_embed" in wanted and table.shape != wanted["pos_embed"].shape:
        if table.shape[2:] != wanted["pos_embed"].shape[2:] or encoder.pos_embed.requires_grad:
            raise UserError(f"{where}: its position table {tuple(table.shape)} does not fit; another arch?")
        state["pos_embed"] = wanted["pos_embed"]
    for key in wanted:
        if key in head:
            continue
        if key not in state:
            raise UserError(f"{where}: misses {key}; it is not a {type(encoder).__name__} of this arch")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{where}: {key} is {tuple(state[key].shape)} where this arch has {tuple(wanted[key].shape)}"
            )
    if unknown := [key for key in state if key not in wanted]:
        raise UserError(f"{where}: holds {unknown[0]}, which this arch does not have")
    encoder.load_state_dict({**{key: wanted[key] for key in head}, **state})
    return head


def load_backbone(path_or_name: str | Path, *, momentum: bool = False, image_size: int | None = None) -> Encoder:
    """A backbone ready for use, in evaluation mode; its head is the identity, so calling it gives features.

    Args:
        path_or_name: a checkpoint (ours or the reference's), or the name of an untrained arch.
        momentum: take the momentum encoder.
        image_size: side of the pictures in pixels; that of pre-training (or 224) unless given.

    Raises:
        UserError: if the file cannot be read or names no arch.
    """
    if str(path_or_name) in BUILT_IN_ARCHS or str(path_or_name).startswith("timm/"):
        encoder = build_backbone(str(path_or_name), image_size=image_size or 224)
        return _bare(encoder)
    contents = checkpoint.read(path_or_name)
    where = str(path_or_name)
    weights = find_backbone(contents, where, momentum=momentum)
    if weights.arch is None:
        raise UserError(f"{where}: does not say which arch it is; build it by name and use convert.load_into")
    config = (contents.get("mocov3") or {}).get("config", {})
    encoder = build_backbone(
        weights.arch,
        image_size=image_size or int(config.get("image_size", 224)),
        patch_size=int(config.get("patch_size", 16)),
        small_stem=bool(config.get("small_stem", False)) and is_resnet(weights.arch),
    )
    load_into(encoder, weights, where)
    return _bare(encoder)


def _bare(encoder: Encoder) -> Encoder:
    setattr(encoder, encoder.projector_name, nn.Identity())
    return encoder.eval()
