"""Flags of the schedule: a half cosine, or warm-up, stable, decay, whose length can be decided by the clock.

Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392): the stable part knows
nothing of the run's end, so that a budget of time can be used up, and a run be prolonged.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mocov3.config.fields import flag, path
from mocov3.errors import UserError, printable
from mocov3.schedules import Decay

STABLE = "stable.pth.tar"
"""A run's checkpoint of the end of its stable part."""
_LATEST = 1.2


@dataclass(frozen=True)
class ScheduleFlags:
    """How learning rate and momentum go, and what a run decided about them."""

    schedule: str = flag(
        "cosine",
        "of the learning rate: a half cosine, or warm-up, stable, decay (with --budget the clock decides when the "
        "decay begins)",
        choices=("cosine", "wsd"),
        group="method",
    )
    decay_share: float = flag(
        0.2,
        "share of the run, or of its time, that the decay of --schedule wsd takes",
        group="method",
        above=0,
        below=1,
    )
    decay: str = flag(
        "",
        "decisions of --schedule wsd that a run recorded: STEP:STEPS[,STEP:STEPS], from which step on the decay takes "
        "how many",
        result=False,
        group="method",
        metavar="STEP:STEPS",
    )
    prolong: str = flag(
        "",
        f"folder of a run with --schedule wsd to go on from, where its decay began ({STABLE}), for --budget or to "
        "--epochs",
        kind=path,
        result=False,
        group="run and files",
        metavar="RUN",
        per_rank=True,
    )

    def check_schedule(self) -> None:
        """Refuse values that make no sense together.

        Raises:
            UserError: naming the first.
        """
        values = vars(self)
        decays = decays_of(self.decay)
        wsd = self.schedule == "wsd"
        if decays and not wsd:
            raise UserError("--decay holds decisions of --schedule wsd; give that too, or leave it out")
        if self.prolong:
            self._check_prolonged(wsd)
        if wsd and not values["budget"] and values["warmup_epochs"] > (1 - self.decay_share) * values["epochs"]:
            raise UserError(
                f"--warmup-epochs {values['warmup_epochs']} leaves no stable part of {values['epochs']} epochs with "
                f"--decay-share {self.decay_share:g}; lower one of them, or raise --epochs"
            )

    def _check_prolonged(self, wsd: bool) -> None:
        if not wsd:
            raise UserError(
                f"--prolong {self.prolong}: needs a run with --schedule wsd, whose stable part can go on; a cosine "
                "has come to its end"
            )
        if not vars(self)["resume"] and not (Path(self.prolong) / STABLE).is_file():
            raise UserError(
                f"--prolong {self.prolong}: has no {STABLE}, which is written when the decay begins; a run that has "
                "not got there is continued with --resume auto"
            )


def ends_by_clock(schedule: str, budget: str) -> bool:
    """Whether the clock of ``--budget`` decides how long a run is; ``--epochs`` is a guess then."""
    return schedule == "wsd" and bool(budget)


def decays_of(text: str) -> list[Decay]:
    """The decisions that ``--decay`` holds.

    Raises:
        UserError: if it cannot be read, or they are not in order.
    """
    try:
        decays = [Decay(*map(int, part.split(":"))) for part in text.split(",")] if text else []
    except (ValueError, TypeError):
        decays = [Decay(0, 0)]
    in_order = all(a.step < b.step <= a.end for a, b in itertools.pairwise(decays))
    if not (in_order and all(d.step > 0 and d.steps > 0 for d in decays)):
        raise UserError(
            f"--decay '{printable(text)}': takes STEP:STEPS[,STEP:STEPS], whole numbers above 0, each step within the "
            "decay before it"
        )
    return decays


def decays_text(decays: Sequence[Decay]) -> str:
    """What ``decays_of`` reads."""
    return ",".join(f"{decay.step}:{decay.steps}" for decay in decays)


def parse_budget(text: str) -> float:
    """``90s``, ``30m``, ``2h``, ``1.5d`` (or a bare number of hours) → hours.

    Raises:
        ValueError: if it is none of these, or not above 0.
    """
    units = {"s": 1 / 3600, "m": 1 / 60, "h": 1.0, "d": 24.0}
    unit = units.get(text[-1:].lower())
    hours = float(text[:-1]) * unit if unit else float(text)
    if not 0 < hours < math.inf:
        raise ValueError(text)
    return hours


def latest(hours: float) -> float:
    """Hours after which a run with a budget of ``hours`` is stopped."""
    return round(_LATEST * hours, 4)


def budget_hours(text: str) -> float | None:
    """Hours of ``--budget``, ``None`` where it is not given.

    Raises:
        UserError: if it cannot be read.
    """
    if not text:
        return None
    try:
        return parse_budget(text)
    except ValueError:
        raise UserError(f"--budget {text!r}: write a time above 0, as 30m, 2h or 1.5d") from None
