"""Starting weights: ``--init`` as a file (ours, the reference's, timm's, torchvision's) or as ``timm/NAME``.

Both encoders start from them; the heads stay fresh.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from mocov3 import checkpoint
from mocov3.config.archs import BUILT_IN_ARCHS, RESNETS
from mocov3.convert import BackboneWeights, find_backbone, load_into
from mocov3.errors import UserError, nearest
from mocov3.log import warn
from mocov3.models import Encoder, build_backbone, shapes_only

_TIMM_HEADS = {"vit_small": 6}
"""Heads of timm's namesakes where they are not ours: the same shapes, another network."""


def load_start(init: str, encoders: list[Encoder], arch: str) -> None:
    """Load the weights of ``--init`` into encoders, their heads left alone.

    Raises:
        UserError: if they cannot be had, or are not of this arch (naming the arch they fit, if it is one of ours).
    """
    where = f"--init {init}"
    weights = starting_weights(init)
    _check_heads(weights, arch, where)
    weights = _for_channels(weights, encoders[0], where)
    try:
        for encoder in encoders:
            load_into(encoder, weights, where)
    except UserError as error:
        fits = guess_arch(weights.state) if not (weights.arch or "").startswith("timm/") else None
        hint = f" (give --arch {fits})" if fits and fits != arch else ""
        raise UserError(f"{error}{hint}") from None


def _for_channels(weights: BackboneWeights, encoder: Encoder, where: str) -> BackboneWeights:
    """The first convolution for another number of channels, by timm's rule.

    One channel: the sum of the three, so that grey pictures give what they gave as RGB; more: the three in turn, scaled
    to the same sum.
    """
    from timm.models import adapt_input_conv

    state, changed = dict(weights.state), dict[str, Tensor]()
    for key, wanted in encoder.state_dict().items():
        found = state.get(name := key if key in state else key.removeprefix("backbone."))
        if found is None or found.ndim != 4 or found.shape[:1] + found.shape[2:] != wanted.shape[:1] + wanted.shape[2:]:
            continue
        if found.shape[1] == 3 != wanted.shape[1] and not changed:  # the first of all, in the order of the keys
            changed[name] = adapt_input_conv(wanted.shape[1], found)
    if changed:
        warn(f"{where}: {next(iter(changed))} was trained on 3 channels; it starts from them, summed or repeated")
    return dataclasses.replace(weights, state={**state, **changed})


def starting_weights(init: str) -> BackboneWeights:
    """The backbone that ``--init`` names.

    Raises:
        UserError: if there is no such file or model, or it cannot be fetched.
    """
    if init.startswith("timm/") and not Path(init).is_file():
        return _from_timm(init)
    return find_backbone(read_weights(init), f"--init {init}")


def read_weights(path: str | Path) -> dict[str, Any]:
    """Contents of a weights file, torch's or safetensors'. Never runs code.

    Raises:
        UserError: if it cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        return checkpoint.read(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({type(error).__name__}); fetch it again") from None


def arch_of(init: str) -> str | None:
    """The arch that fits ``--init``: what the file says, else what its keys and shapes are; ``None`` if unknown."""
    if init.startswith("timm/") and not Path(init).is_file():
        name = init.removeprefix("timm/").split(".", 1)[0]
        return name if name in RESNETS else init
    weights = find_backbone(read_weights(init), f"--init {init}")
    return weights.arch or guess_arch(weights.state)


def guess_arch(state: dict[str, Tensor]) -> str | None:
    """The one of our archs with these keys and shapes; the position table and the picture's size are left out."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if key != "pos_embed"}
    if not shapes:
        return None
    patch = shapes.get("patch_embed.proj.weight", (0, 0, 16))[2]
    small = shapes.get("conv1.weight", (0, 0, 7))[2] == 3
    for arch in BUILT_IN_ARCHS:
        try:
            with shapes_only():
                small_stem = small and arch.startswith("res") and "_w" not in arch
                encoder = build_backbone(arch, image_size=4 * patch, patch_size=patch, small_stem=small_stem)
        except (ValueError, UserError):
            continue
        ours = {k: tuple(v.shape) for k, v in encoder.state_dict().items()
                if k != "pos_embed" and not k.startswith(("fc.", "head."))}  # fmt: skip
        if ours == shapes:
            return arch
    return None


def _from_timm(init: str) -> BackboneWeights:
    import timm

    name = init.removeprefix("timm/")
    if not timm.is_model(name):
        raise UserError(f"--init {init}: timm {timm.__version__} has no such model; "
                        f"{nearest(name, timm.list_models())[:300]}")  # fmt: skip
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--init {init}: timm has no weights of this name ({str(error)[:100]})") from None
    except Exception as error:  # the hub's client raises its own errors, the network others
        raise UserError(f"--init {init}: its weights could not be fetched ({type(error).__name__}); fetch them on a "
                        "machine with a network and give the file") from None  # fmt: skip
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("fc.", "head."))}
    return BackboneWeights("timm model", init, state)


def _check_heads(weights: BackboneWeights, arch: str, where: str) -> None:
    heads = _TIMM_HEADS.get(arch)
    if heads is None or weights.kind.startswith("pre-training"):
        return
    if weights.kind == "timm model":
        raise UserError(f"{where}: has {heads} attention heads, --arch {arch} has 12; give --arch {weights.arch}")
    warn(f"{where}: does not tell its attention heads; --arch {arch} takes it for 12, timm's and DeiT's have {heads}")
