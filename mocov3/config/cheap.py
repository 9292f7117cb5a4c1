"""Flags of cheaper pre-training: parts of the run at fewer tokens or smaller images, back to full before the end.

Random token dropout and larger patches (Lin et al. 2024, arXiv 2410.22364, who report 4× for MoCo v3), smaller images
(FFCV-SSL: 160 before 224 pixels). The first share of the epochs, or of the time where ``--schedule wsd`` has a
``--budget``, is cheap, the rest is unchanged.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mocov3.config.archs import VITS, is_resnet
from mocov3.config.fields import flag
from mocov3.config.schedule import ends_by_clock
from mocov3.errors import UserError, printable

SHARE = 0.8
"""Of the epochs, where a value comes without one."""
CHEAP = "cheaper pre-training"


class Stage(NamedTuple):
    """A part of the run that is trained in the same way."""

    first: int
    """Its first epoch; where the clock decides, about."""
    end: int
    """Epoch after the last."""
    image_size: int
    patch_size: int
    keep: float
    """Share of the tokens of a view."""
    grid: int
    """Patches on a side of full views; 0 where views are taken as they are."""
    share: float = 1.0
    """Share of the run, or of its time, at which it ends."""

    @property
    def tokens(self) -> int:
        """Patches of a view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def kept(self) -> int:
        """Patches of a view that are kept."""
        return max(round(self.keep * self.tokens), 1)


@dataclass(frozen=True)
class CheapFlags:
    """How a part of the run is made cheaper; empty flags change nothing."""

    token_keep: str = flag(
        "",
        "fraction of a ViT's patches to keep, drawn afresh for each view: KEEP[:SHARE][,…], for the first SHARE of "
        f"the epochs (default {SHARE:g}; of the time by --schedule wsd with --budget), then all",
        group=CHEAP,
        metavar="KEEP:SHARE",
    )
    image_size_schedule: str = flag(
        "",
        "smaller views first: PIXELS[:SHARE][,…], as in 112:0.4,160:0.4; then --image-size",
        group=CHEAP,
        metavar="PIXELS:SHARE",
    )
    patch_size_schedule: str = flag(
        "",
        "larger patches of a ViT first: PIXELS[:SHARE][,…], as in 32:0.8; then --patch-size",
        group=CHEAP,
        metavar="PIXELS:SHARE",
    )
    stage_ends: str = flag(
        "",
        "steps before which cheap parts ended by the clock of --budget, as a run recorded them: STEP[,STEP]",
        result=False,
        group=CHEAP,
        metavar="STEP",
    )


def stages(config: "CheapFlags") -> list[Stage]:
    """The run in order: by whole epochs, or as shares of the time where the clock of ``--budget`` decides; one stage
    where nothing is cheaper.

    Raises:
        UserError: for a schedule that cannot be read, or does not fit the network or the number of epochs.
    """
    values = vars(config)
    arch, epochs, size, patch = (values[name] for name in ("arch", "epochs", "image_size", "patch_size"))
    whole = 0 if ends_by_clock(values["schedule"], values["budget"]) else epochs  # epochs that parts consist of
    plans = {
        "--token-keep": (_read("--token-keep", config.token_keep, whole), 1.0),
        "--image-size-schedule": (_read("--image-size-schedule", config.image_size_schedule, whole), size),
        "--patch-size-schedule": (_read("--patch-size-schedule", config.patch_size_schedule, whole), patch),
    }
    for name, (plan, full) in plans.items():
        if plan and not (arch in VITS or (is_resnet(arch) and name == "--image-size-schedule")):
            able = f"{', '.join(VITS)}{' and ResNets' if name == '--image-size-schedule' else ''}"
            raise UserError(f"{name} is for {able}, not {arch}")
        for _, value in plan:
            _check(name, value, full)
    edges = sorted({0.0, 1.0, *(share for plan, _ in plans.values() for share, _ in plan)})
    stage_list = []
    for begin, share in itertools.pairwise(edges):
        keep, pixels, side = (next((v for until, v in plan if begin < until), full) for plan, full in plans.values())
        cheap = arch in VITS and (keep, pixels, side) != (1.0, size, patch)
        first, end = round(begin * epochs), round(share * epochs)
        stage = Stage(first, end, int(pixels), int(side), keep, size // patch if cheap else 0, share)
        if arch in VITS and stage.image_size % stage.patch_size:
            raise UserError(
                f"from {begin:.0%} to {share:.0%} of the run views of {stage.image_size} px do not divide into patches "
                f"of {stage.patch_size} px; change --image-size-schedule or --patch-size-schedule"
            )
        stage_list.append(stage)
    ends = ends_of(config.stage_ends)
    if ends and (len(ends) >= len(stage_list) or values["schedule"] != "wsd"):
        raise UserError(
            f"--stage-ends {config.stage_ends}: ends {len(ends)} cheap parts; with --schedule {values['schedule']} "
            f"{len(stage_list) - 1 if values['schedule'] == 'wsd' else 0} end by the clock"
        )
    return stage_list


def stage_of(stages: list[Stage], epoch: int) -> Stage:
    """The stage of an epoch."""
    return next(stage for stage in stages if epoch < stage.end)


def sizes_of(text: str) -> list[float]:
    """The pixels that ``--image-size-schedule`` names.

    Raises:
        UserError: if it cannot be read.
    """
    return [pixels for _, pixels in _read("--image-size-schedule", text, 0)]


def ends_of(text: str) -> list[int]:
    """The steps that ``--stage-ends`` holds.

    Raises:
        UserError: if it cannot be read, or they do not rise.
    """
    try:
        ends = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        ends = [0]
    if not all(a < b for a, b in itertools.pairwise([0, *ends])):
        raise UserError(f"--stage-ends '{printable(text)}': takes STEP[,STEP], whole numbers above 0 that rise")
    return ends


def ends_text(ends: Sequence[int]) -> str:
    """What ``ends_of`` reads."""
    return ",".join(map(str, ends))


def _check(name: str, value: float, full: float) -> None:
    if name == "--token-keep":
        if not 0 < value <= 1:
            raise UserError(f"{name} is a share above 0 and at most 1, not {value:g}")
        return
    if not (value >= 1 and value.is_integer()):
        raise UserError(f"{name} takes whole numbers of pixels, not {value:g}")
    if name == "--image-size-schedule" and value > full:
        raise UserError(f"{name} {value:g} is larger than --image-size {full}: which would not be cheaper")
    if name == "--patch-size-schedule" and value < full:
        raise UserError(f"{name} {value:g} is smaller than --patch-size {full}: which would not be cheaper")


def _read(name: str, text: str, epochs: int) -> list[tuple[float, float]]:
    """(share of the run at which it ends, value) of each part, which consists of whole epochs unless these are 0."""
    if not text:
        return []
    parts: list[tuple[float, float]] = []
    done = 0.0
    for part in text.split(","):
        value, colon, share = part.partition(":")
        try:
            number, length = float(value), float(share) if colon else SHARE
        except ValueError:
            raise UserError(f"{name} '{printable(text)}': takes VALUE:SHARE parts with commas between them") from None
        if not 0 < length < 1:
            raise UserError(
                f"{name}: '{printable(part)}' lasts {length:g} of the epochs; give a share above 0 and below 1"
            )
        done += length
        if done >= 1 - 1e-9:
            raise UserError(
                f"{name} '{printable(text)}': shares add up to {done:g}; they must leave epochs at full size"
            )
        end = min(round(done * epochs), epochs - 1) / epochs if epochs else round(done, 9)
        if end > (parts[-1][0] if parts else 0):
            parts.append((end, number))
    if not parts:
        raise UserError(f"{name}: {epochs} epochs are too few for a cheap part and a full-size end; raise --epochs")
    return parts
