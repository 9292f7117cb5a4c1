"""Where a file keeps its backbone, found by trial: the entry, the prefix of the keys, the library that named them.

Every dictionary of tensors in a file is tried against the keys and shapes of an arch, under every prefix at which one
of its keys occurs. What fits in full is taken; of several, the network that is trained rather than its average, but
a teacher rather than its student (as DINO evaluates).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocov3.config.archs import BUILT_IN_ARCHS, CLASSIFIER_KEYS, HEAD_KEYS, RESNETS, SMALL_RESNETS, WIDTHS, is_vit
from mocov3.models import build_backbone, shapes_only
from mocov3.models.backbones import blocks_of_third_stage
from mocov3.weights import Contents, key_tables

_SEPARATE = r"(?:^|[._])(?:{})(?:[._]|$)"
_AVERAGE = re.compile(_SEPARATE.format("momentum|ema|target|key|k|teacher"))
_SECOND = re.compile(_SEPARATE.format("momentum|ema|target|key|k|student"))
# first parts of keys beside a backbone at the same level, which are left out; any other key is of another network
_BESIDE = re.compile(r"(?:[^.]*_)?(?:head|fc(?=\.)|proj|pred|decoder|mask|proto|classif|queue|neck|pooler)")
_THIRD_STAGE = re.compile(r"(?:^|\.)(?:layer3|6|stages\.2\.layers)\.(\d+)\.")
_DEPTH = 4
_NEAR = 0.25
"""Share of an arch's keys that must fit before a file is called near it."""


class Place(NamedTuple):
    """A part of a file that was tried as the backbone of an arch."""

    entry: str
    """Names of the entries that lead to it, joined by dots."""
    prefix: str
    arch: str
    state: dict[str, Tensor]
    """What fits, under our names."""
    beside: dict[str, str]
    """Keys left out, each with its reason."""
    wanted: int
    misfit: str
    """The first key that does not fit, and why; empty where all do."""
    translated: bool
    """Whether its keys are another library's."""

    def __str__(self) -> str:
        prefix = f"prefix {self.prefix}" if self.prefix else "no prefix"
        return f"entry {self.entry}, {prefix}" if self.entry else prefix

    @property
    def second(self) -> bool:
        """Whether this is the copy that is not meant where there are two."""
        return bool(_SECOND.search(f"{self.entry}.{self.prefix}"))

    @property
    def average(self) -> bool:
        """Whether this is the moving average of a network."""
        return bool(_AVERAGE.search(f"{self.entry}.{self.prefix}"))

    @property
    def near(self) -> str:
        """What people are told of a part that does not fit."""
        return f"nearest: {self.arch} at {self}, {len(self.state)} of {self.wanted} keys fit, but {self.misfit}"


def places(contents: Contents, arch: str | None = None, *, momentum: bool = False) -> tuple[list[Place], Place | None]:
    """The parts of a file that fit in full, the one to take first; where none does, the nearest.

    Args:
        contents: what ``checkpoint.read`` returned.
        arch: to try first; our other archs follow. Of ``timm/NAME`` no other is tried.
        momentum: only moving averages.
    """
    near: Place | None = None
    tables = list(_tables(contents))
    others = [] if arch and arch.startswith("timm/") else [name for name in _plausible(tables) if name != arch]
    for name in [arch, *others] if arch else others:
        tried = [place for entry, tensors in tables for place in _tried(entry, tensors, name)]
        fitting = [place for place in tried if not place.misfit and (place.average or not momentum)]
        if fitting:
            return sorted(fitting, key=lambda place: place.second and not momentum), None
        near = max([*([near] if near else []), *tried], key=lambda place: len(place.state), default=None)
    return [], near if near and near.misfit and len(near.state) >= _NEAR * near.wanted else None


def fitting_archs(state: dict[str, Tensor]) -> list[str]:
    """Our archs with these keys and shapes; the grid of a position table and the channels of images are left out."""
    return [
        arch
        for arch in _plausible([("", state)])
        if any(not place.misfit and not place.prefix and not place.beside for place in _tried("", state, arch))
    ]


def guess_arch(state: dict[str, Tensor]) -> str | None:
    """The one of our archs with these keys and shapes; the first where the stride of a stem is all that differs."""
    return next(iter(fitting_archs(state)), None)


def _tables(
    contents: Mapping[Any, Any], entry: str = "", depth: int = _DEPTH, seen: set[tuple[int, int]] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary with tensors in a file, with its entry, outermost first; once at a depth."""
    seen = set() if seen is None else seen
    if (id(contents), depth) in seen:  # a few that hold each other many times would never end
        return
    seen.add((id(contents), depth))
    tensors = {str(key): value for key, value in contents.items() if isinstance(value, Tensor)}
    if any(value.ndim for value in tensors.values()):
        yield entry, tensors
    for name, value in contents.items():
        if depth and isinstance(value, dict) and isinstance(name, str) and not name.startswith("optimizer"):
            yield from _tables(value, f"{entry}.{name}" if entry else name, depth - 1, seen)


def _plausible(tables: list[tuple[str, dict[str, Tensor]]]) -> list[str]:
    """Our archs that are worth a trial: ViTs of the widths of class tokens, or else ResNets of as many blocks."""
    keys = [(key, value) for _, tensors in tables for key, value in tensors.items()]
    widths = {value.shape[-1] for key, value in keys if key.endswith(("cls_token", "class_token")) and value.ndim == 3}
    if widths:
        return [arch for arch in BUILT_IN_ARCHS if WIDTHS.get(arch) in widths]
    blocks = {1 + int(found[1]) for _, tensors in tables for found in map(_THIRD_STAGE.search, tensors) if found}
    return [arch for arch in (*RESNETS, *SMALL_RESNETS) if any(blocks_of_third_stage(arch) == n for n in blocks)]


def _tried(entry: str, tensors: dict[str, Tensor], arch: str) -> Iterator[Place]:
    wanted = _skeleton(arch)
    weights = [key for key in wanted if key.endswith("weight")]
    for names in _names(wanted) if weights else []:
        ends = [names[key][0] for key in (next(iter(wanted)), weights[0], weights[-1])]
        starts = (key.removesuffix(end) for key in tensors for end in ends if f".{key}".endswith(f".{end}"))
        for prefix in dict.fromkeys(starts):
            yield _try(entry, prefix, tensors, arch, names, wanted)


def _skeleton(arch: str) -> dict[str, Tensor]:
    """Keys of a backbone and tensors without numbers; empty for those of timm that cannot be built so."""
    try:
        with shapes_only():
            state = build_backbone(arch).state_dict()
    except RuntimeError:
        return {}
    heads = HEAD_KEYS if arch.startswith("timm/") else CLASSIFIER_KEYS
    return {key.removeprefix("backbone."): value for key, value in state.items() if not key.startswith(heads)}


def _names(wanted: dict[str, Tensor]) -> Iterator[dict[str, tuple[str, ...]]]:
    """Our keys → the keys in other libraries that hold them, for each library that has such a network."""
    yield {key: (key,) for key in wanted}
    for rows in key_tables.ALL:
        try:
            yield {key: tuple(key_tables.translate({key: value}, rows)) for key, value in wanted.items()}
        except KeyError:
            continue


def _try(
    entry: str,
    prefix: str,
    tensors: dict[str, Tensor],
    arch: str,
    names: dict[str, tuple[str, ...]],
    wanted: dict[str, Tensor],
) -> Place:
    state: dict[str, Tensor] = {}
    misfit = ""
    stem = next((key for key, value in wanted.items() if value.ndim == 4), "")
    for key, like in wanted.items():
        parts = [prefix + name for name in names[key]]
        found = [tensors[part] for part in parts if part in tensors]
        if not found and key.endswith("num_batches_tracked"):  # files of torch before 0.4.1; torch starts it at 0 too
            state[key] = torch.zeros_like(like, device="cpu")
        elif len(found) < len(parts):
            misfit = misfit or f"{next(part for part in parts if part not in tensors)} is missing"
        elif len(parts) > 1 and (len({value.shape for value in found}) > 1 or not found[0].ndim):
            misfit = misfit or f"{parts[0]} and its like are not of one shape"
        else:
            value = found[0] if len(found) == 1 else torch.cat(found)
            if _agree(arch, key, key == stem, value.shape, like.shape):
                state[key] = value
            else:
                misfit = misfit or f"{parts[0]} is {tuple(value.shape)} where this arch has {tuple(like.shape)}"
    used = {prefix + name for parts in names.values() for name in parts}
    within = [key for key in tensors if key.startswith(prefix) and key not in used]
    strange = [key for key in within if not _BESIDE.match(key.removeprefix(prefix))]
    beside = {key: "head" if key in within else "not of this encoder" for key in tensors if key not in used}
    misfit = misfit or (f"this arch has no {strange[0]}" if strange else "")
    translated = any(names[key] != (key,) for key in wanted)
    return Place(entry, prefix, arch, state, beside, len(wanted), misfit, translated)


def _agree(arch: str, key: str, stem: bool, have: torch.Size, wanted: torch.Size) -> bool:
    """Whether shapes are the same but for what is a setting of an arch: grid, patch, stem, channels of images."""
    if have == wanted:
        return True
    if key == "pos_embed":
        return len(have) == 3 and have[-1] == wanted[-1]
    if not stem or len(have) != 4 or have[0] != wanted[0] or have[2] != have[3]:
        return False
    patches = is_vit(arch) and key == "patch_embed.proj.weight"
    return have[2:] == wanted[2:] or patches or (arch in [*RESNETS, "resnet10"] and have[2] == 3)
