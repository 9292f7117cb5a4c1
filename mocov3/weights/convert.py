"""From the backbone in a file to a network, to its classifier, and to DeiT's format."""

import dataclasses
import functools
import math
import os
import re
from pathlib import Path

from torch import Tensor, nn

from mocov3.config import ViewPreset, preset_of
from mocov3.config.archs import BUILT_IN_ARCHS, HEAD_KEYS, HEADS, RESNETS, check_heads, is_vit
from mocov3.config.fields import Fields
from mocov3.config.presets import Reading
from mocov3.errors import UserError, printable
from mocov3.models.backbones import Encoder, Settings, build_backbone
from mocov3.models.positions import is_sincos_position_embedding, sincos_position_embedding
from mocov3.output.log import warn
from mocov3.weights import Contents, attention_heads, checkpoint, our_entry, trained_with
from mocov3.weights.find import BackboneWeights, find_backbone, hint

_STRIDED = re.compile(r"patch_embed\.proj\.\d+\.weight")
"""Convolutions of a convolutional stem; all but the last halve the side."""


class Built(Settings):
    """All that a backbone was built with."""

    arch: str


def find_classifier(contents: Contents, encoder: Encoder, where: str, *, momentum: bool = False) -> nn.Linear:
    """The linear classifier in the contents of a fine-tuned or linearly evaluated file.

    Raises:
        UserError: if there is none, or it does not fit ``encoder``.
    """
    state = contents.get("model_ema") if momentum else contents.get("model", contents.get("state_dict"))
    name = encoder.projector_name
    for prefix in ("", "module."):
        weight, bias = ((state or {}).get(f"{prefix}{name}.{part}") for part in ("weight", "bias"))
        if isinstance(weight, Tensor) and isinstance(bias, Tensor):
            if weight.ndim != 2 or weight.shape[1] != encoder.num_features or bias.shape != weight.shape[:1]:
                raise UserError(
                    f"{where}: its classifier {tuple(weight.shape)} is not of {encoder.num_features} features"
                )
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            return layer
    raise UserError(f"{where}: has no classifier; fine-tune it first, or export the backbone without --classifier")


def to_deit(contents: Contents, where: str) -> Contents:
    """``{"model": encoder without head}``, as DeiT's ``--resume`` reads it; ResNets without ``fc.*``.

    A ViT of other attention heads than MoCo v3's says so in an entry more, since its position table says the opposite.

    Raises:
        UserError: if ``contents`` is not a pre-training checkpoint.
    """
    weights = find_backbone(contents, where)
    if not weights.kind.startswith("pre-training"):
        raise UserError(f"{where}: is a {weights.kind}, not a pre-training checkpoint; nothing to convert")
    views = views_of(contents, where)
    view = view_entry(views.mean, views.std, views.evaluation_zoom, views.reading)
    return {"model": weights.state, **beside(weights.heads.number, weights.state, view)}


def view_entry(mean: tuple[float, ...], std: tuple[float, ...], zoom: float, reading: Reading) -> Fields:
    """An evaluation view as ``views_of`` reads it."""
    read = {"channels": reading.channels, "window": list(reading.window or ())}
    return {"mean": list(mean), "std": list(std), "zoom": zoom, **read}


def beside(heads: int | None, state: dict[str, Tensor], view: Fields) -> Contents:
    """What a file in DeiT's format holds beside the weights: what a reader of such files would not expect.

    That is a ViT's attention heads where they are not MoCo v3's, and the view of images that are not 8-bit RGB.
    """
    width = attention_heads.width_of(state)
    usual = heads is None or width is None or heads == HEADS.get(width)
    config = {} if usual else {"heads": heads}
    plain = view["channels"] == 3 and not view["window"]
    if usual and plain:
        return {}
    return {"mocov3": {"config": config, **({} if plain else {"view": view})}}


def load_into(encoder: Encoder, weights: BackboneWeights, where: str) -> list[str]:
    """Load a backbone into an encoder, leaving its head alone; returns the head's keys that were not loaded.

    A position table of another grid is rebuilt if it is the fixed sine-cosine one, since that is a function of the
    grid; one that was trained (learned, or by fine-tuning) is interpolated by timm.

    Raises:
        UserError: naming the first key that is missing, unknown or of another shape, or the attention heads that
            differ; nothing is loaded then.
    """
    state = fitted(encoder, weights, where)
    wanted = encoder.state_dict()
    head = [key for key in wanted if key.startswith(HEAD_KEYS)]
    encoder.load_state_dict({**{key: wanted[key] for key in head}, **state})
    if weights.found:
        _say(where, weights.found)
    return head


@functools.lru_cache
def _say(where: str, found: str) -> None:
    """Once a process, however many encoders are loaded, and once of all of torchrun's."""
    if os.environ.get("RANK", "0") == "0":
        warn(f"{where}: {found}")


def fitted(encoder: Encoder, weights: BackboneWeights, where: str) -> dict[str, Tensor]:
    """A backbone's weights as an encoder takes them, which may have shapes alone (``models.shapes_only``).

    Raises:
        UserError: as ``load_into``.
    """
    attention_heads.check_built(encoder, weights.heads, weights.state, where)
    wanted = encoder.state_dict()
    state = dict(weights.state)
    if not any(key in wanted for key in state) and any(f"backbone.{key}" in wanted for key in state):
        state = {f"backbone.{key}": value for key, value in state.items()}  # timm's own file into timm/NAME
    for key in ("pos_embed", "backbone.pos_embed"):
        table = state.get(key)
        if table is not None and key in wanted and table.shape != wanted[key].shape:
            state[key] = _position_table(table, wanted[key], where)
    for key in wanted:
        if key.startswith(HEAD_KEYS):
            continue
        if key not in state:
            raise UserError(f"{where}: misses {key}; it is not a {type(encoder).__name__} of this arch")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{where}: {key} is {tuple(state[key].shape)} where this arch has {tuple(wanted[key].shape)}"
            )
        if wanted[key].is_floating_point() and not state[key].is_floating_point():
            raise UserError(f"{where}: {key} holds {str(state[key].dtype)[6:]}, not the floats that weights are")
    if unknown := [key for key in state if key not in wanted]:
        raise UserError(f"{where}: holds {unknown[0]}, which this arch does not have")
    return state


def _position_table(table: Tensor, wanted: Tensor, where: str) -> Tensor:
    """``table`` (1, tokens, dim) for another square grid of patches; tokens before the patches are kept."""
    prefix, old, new = (_grids(table.shape[1], wanted.shape[1]) if table.ndim == 3 else None) or (0, 0, 0)
    if not old or table.shape[2] != wanted.shape[2]:
        raise UserError(f"{where}: its position table {tuple(table.shape)} does not fit; another arch?")
    if prefix == 1 and is_sincos_position_embedding(table):
        return sincos_position_embedding(new, new, table.shape[2]).to(table.dtype)
    from timm.layers import resample_abs_pos_embed

    resampled: Tensor = resample_abs_pos_embed(table, [new, new], [old, old], num_prefix_tokens=prefix)
    return resampled.to(table.dtype)


def _grids(old: int, new: int) -> tuple[int, int, int] | None:
    """Tokens before the patches, and the sides of the two square grids of patches."""
    for prefix in (1, 0, 2):
        sides = [math.isqrt(max(n - prefix, 0)) for n in (old, new)]
        if all(side > 0 and side**2 + prefix == n for side, n in zip(sides, (old, new), strict=True)):
            return prefix, sides[0], sides[1]
    return None


def load_backbone(
    path_or_name: str | Path,
    *,
    momentum: bool = False,
    image_size: int | None = None,
    arch: str | None = None,
    heads: int | None = None,
) -> Encoder:
    """A backbone ready for use, in evaluation mode; its head is the identity, so calling it gives features.

    Args:
        path_or_name: a checkpoint (ours or the reference's), or the name of an untrained arch.
        momentum: take the momentum encoder.
        image_size: side of the images in pixels; that of pre-training (or 224) unless given.
        arch: of a file that does not say it.
        heads: attention heads of a ViT, of a file that does not tell: 12 for MoCo v3's ViT-S, 6 for DeiT's, DINO's
            and timm's.

    Raises:
        UserError: if the file cannot be read, or arch or heads are not known, or not those of the file.
    """
    name = str(path_or_name)
    if name in BUILT_IN_ARCHS or name.startswith("timm/"):
        check_heads(heads, name)
        settings: Settings = {"image_size": image_size or 224, **({"num_heads": heads} if heads else {})}
        return _bare(build_backbone(name, **settings))
    contents = checkpoint.read(path_or_name)
    return build_from(contents, name, arch=arch, momentum=momentum, image_size=image_size, heads=heads)[0]


def build_from(
    contents: Contents,
    where: str,
    *,
    arch: str | None = None,
    momentum: bool = False,
    image_size: int | None = None,
    heads: int | None = None,
) -> tuple[Encoder, Built]:
    """The backbone of a file's contents, and the settings it was built with (those of ``build_backbone``).

    Args:
        contents: what ``checkpoint.read`` returned.
        where: the file, for messages.
        arch: of a file that does not say it.
        momentum: take the momentum encoder.
        image_size: side of the images in pixels; that of training (or 224) unless given.
        heads: attention heads of a ViT, of a file that does not tell.

    Raises:
        UserError: if there is no backbone, or its arch or heads are not known or differ from those given.
    """
    weights = find_backbone(contents, where, momentum=momentum, heads=heads, arch=arch)
    settings = settings_to_build(contents, weights, where, arch=arch, image_size=image_size)
    encoder = build_backbone(**settings)
    try:
        load_into(encoder, weights, where)
    except UserError as error:
        raise UserError(f"{error} ({hint(weights)})") from None
    return _bare(encoder), settings


def settings_to_build(
    contents: Contents, weights: BackboneWeights, where: str, *, arch: str | None = None, image_size: int | None = None
) -> Built:
    """The settings of ``build_backbone`` for a file's backbone; arguments and errors as of ``build_from``."""
    if arch and weights.arch and arch != weights.arch:
        raise UserError(f"{where}: is of arch {weights.arch}, not {arch}; leave --arch out")
    name = weights.arch or arch
    if name is None:
        raise UserError(f"{where}: does not say which arch it is; {hint(weights)}")
    config = trained_with(contents)
    settings: Built = {
        "arch": name,
        "image_size": image_size or _number(config.get("image_size"), 224, where),
        "patch_size": 16,
        "small_stem": False,
        "in_chans": _number(views_of(contents, where).reading.channels, 3, where),
        **settings_of(weights.state, name),
        **weights.sizes(name, where),
    }
    if is_vit(name) and settings["image_size"] % settings["patch_size"]:
        raise UserError(
            f"{where}: images of {settings['image_size']} px do not divide into patches of {settings['patch_size']}"
        )
    return settings


def settings_of(state: dict[str, Tensor], arch: str) -> Settings:
    """The settings of ``build_backbone`` that the shapes of a backbone's weights tell: patch size, small stem."""
    settings: Settings = {}
    if (patches := state.get("patch_embed.proj.weight")) is not None and patches.ndim == 4 and patches.shape[-1] > 1:
        settings["patch_size"] = int(patches.shape[-1])
    if halvings := sum(bool(_STRIDED.fullmatch(k)) and v.shape[-1:] == (3,) for k, v in state.items()):
        settings["patch_size"] = 2**halvings
    if (stem := state.get("conv1.weight")) is not None and arch in [*RESNETS, "resnet10"]:
        settings["small_stem"] = stem.shape[-1] == 3
    return settings


def views_of(contents: Contents, where: str, instead: str = "") -> ViewPreset:
    """The views of the training that a file is from, its own normalisation included; ``photos`` where it says nothing.

    Files of linear evaluation and exports say their evaluation view itself, in an entry ``view``. A preset named
    ``instead`` replaces all but the reading: the network was built for its channels.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        preset, view = preset_of(trained_with(contents)), our_entry(contents).get("view")
        if isinstance(view, dict):
            preset = dataclasses.replace(
                preset,
                mean=tuple(view["mean"]),
                std=tuple(view["std"]),
                evaluation_zoom=float(view["zoom"]),
                reading=Reading(int(view.get("channels", 3)), tuple(view.get("window", ())) or None),
            )
        if not instead:
            return preset
        named = preset_of({"view_preset": instead, "channels": preset.reading.channels})
        return dataclasses.replace(named, reading=preset.reading)
    except (UserError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{where}: its configuration is damaged ({printable(str(error))})") from None


def _number(value: object, default: int, where: str) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise UserError(f"{where}: its configuration is damaged ({value!r} where a size in pixels should be)")
    return value or default


def _bare(encoder: Encoder) -> Encoder:
    setattr(encoder, encoder.projector_name, nn.Identity())
    return encoder.eval()
