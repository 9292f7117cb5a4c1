"""How long a run is, and the rates of its steps: by epochs, or for ``--schedule wsd`` by decisions, also the clock's.

With ``--budget`` rank 0 decides by the clock when cheap stages end, when the decay begins and how many steps it takes;
later decisions correct its pace. All else is a function of the step and of the decisions, so that a run is bit-equal
from the recorded decisions.
"""

import dataclasses
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mocov3 import schedules
from mocov3.config import PretrainConfig
from mocov3.config.cheap import Stage, ends_of, ends_text, stage_of, stages
from mocov3.config.schedule import budget_hours, decays_of, decays_text
from mocov3.distributed import World
from mocov3.schedules import Decay
from mocov3.weights.checkpoint import Position

ENDLESS = 1 << 40
"""Epoch that no run comes to."""
_ASKED = 4
"""Steps between questions to rank 0, where there are others."""
_RECENT = 0.2
"""Share of the time so far by which the pace is measured, ``_LEAST`` seconds at least."""
_LEAST = 3.0
_OFF = 0.02
"""Share of the budget by which the predicted end may be off before the pace of the decay is corrected."""
_SETTLED = 0.25
"""Share of a decision's steps before the next one."""
_FEW = 8
"""Steps at the end that are not corrected any more."""
_AGAIN = 0.01
"""Share of the decay after which what the disk refused is decided once more."""
_FORESEEN = 0.05
"""Share of the budget after which what it allows is compared with the warm-up."""


class Clock:
    """The time a run has had, without the time it was down, and what of the budget is left.

    Args:
        budget: seconds.
        began: when this process was started, by ``time.time``.
        before: seconds that former processes of the run were up.
        now: tells seconds.
    """

    def __init__(
        self, budget: float, *, began: float, before: float = 0.0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.budget, self._now = budget, now
        self._start = now() - max(time.time() - began, 0.0) - before
        self.reserve = min(0.01 * budget, 1.0)
        """Seconds for what follows the last step: judging, writing."""
        self._seen: deque[tuple[float, int]] = deque()
        self._not_before = 0.0

    def spent(self) -> float:
        """Seconds so far."""
        return self._now() - self._start

    def closing(self, seconds: float) -> None:
        """Note that judging and writing took so long."""
        self.reserve = max(self.reserve, seconds)

    def postpone(self, share: float) -> None:
        """Decide nothing for a while; the decay takes ``share`` of the budget."""
        self._not_before = self.spent() + _AGAIN * share * self.budget

    def is_postponed(self) -> bool:
        """Whether nothing is to be decided yet."""
        return self.spent() < self._not_before

    def note(self, step: int) -> None:
        """Note that so many steps are done."""
        spent = self.spent()
        self._seen.append((spent, step))
        while len(self._seen) > 2 and self._seen[1][0] < spent - max(_RECENT * spent, _LEAST):
            self._seen.popleft()

    def forget_pace(self) -> None:
        """Measure the pace anew: what a step does has changed."""
        self._seen.clear()

    def is_past(self, share: float) -> bool:
        """Whether this share of the budget is spent."""
        return self.spent() >= share * (self.budget - self.reserve)

    def pace(self) -> float:
        """Seconds a step, of late."""
        (first, a), (last, b) = self._seen[0], self._seen[-1]
        return max(last - first, 1e-9) / max(b - a, 1)

    def possible(self) -> int:
        """Steps that what is left of the budget has time for; 0 where the pace is not known yet."""
        if len(self._seen) < 2:
            return 0
        return max(int((self.budget - self.reserve - self.spent()) / self.pace()), 1)

    def decay(self, step: int, decays: Sequence[Decay], share: float) -> int:
        """Steps that the decay, or what is left of it, should take from here; 0 where nothing is to be decided."""
        possible = self.possible()
        if not decays:
            return possible if self.is_past(1 - share) else 0
        last = decays[-1]
        rest = last.end - step
        if rest < _FEW or step - last.step < _SETTLED * last.steps:
            return 0
        return possible if abs(possible - rest) * self.pace() > _OFF * self.budget else 0


class Decisions(NamedTuple):
    """What a run decided on its way."""

    decays: tuple[Decay, ...] = ()
    stage_ends: tuple[int, ...] = ()
    """Steps before which a cheap stage ended."""

    @classmethod
    def of(cls, config: PretrainConfig) -> "Decisions":
        """Those that a configuration records.

        Raises:
            UserError: if they cannot be read.
        """
        return cls(tuple(decays_of(config.decay)), tuple(ends_of(config.stage_ends)))

    def recorded(self, config: PretrainConfig) -> PretrainConfig:
        """The configuration, with these decisions."""
        return dataclasses.replace(config, decay=decays_text(self.decays), stage_ends=ends_text(self.stage_ends))

    def news(self, before: "Decisions", stages: Sequence[Stage]) -> list[str]:
        """What was decided, in words."""
        news = []
        if len(self.stage_ends) > len(before.stage_ends):
            stage = stages[len(self.stage_ends)]
            kept = f", {stage.keep:.0%} of the tokens" if stage.keep < 1 else ""
            news.append(
                f"step {self.stage_ends[-1]}: the cheap part ends; views of {stage.image_size} px"
                f"{f', patches of {stage.patch_size} px{kept}' if any(s.grid for s in stages) else ''}"
            )
        if self.decays[-1:] != before.decays[-1:] or (self.decays and self == before):
            what = "the decay goes on for" if before.decays else "the stable part ends; the decay takes"
            news.append(f"step {self.decays[-1].step}: {what} {self.decays[-1].steps} steps")
        return news


class Length:
    """Rates, stages and end of a run.

    Args:
        config: of the run, which records the decisions so far.
        world: this rank.
        iterations: steps of an epoch.
        clock: where the clock decides, on every rank; rank 0's is asked.
    """

    def __init__(self, config: PretrainConfig, world: World, iterations: int, clock: Clock | None = None) -> None:
        self.config, self.world, self.iterations, self.clock = config, world, iterations, clock
        self.decisions = Decisions.of(config)
        self.stages = stages(config)
        self._stages_by_clock = clock is not None or bool(self.decisions.stage_ends)
        self._looked_ahead = False
        self._not_before = 0
        if clock is not None or self.decisions.decays:  # the end is not known in epochs: the last stage lasts
            self.stages[-1] = self.stages[-1]._replace(end=ENDLESS)

    @property
    def decays(self) -> tuple[Decay, ...]:
        """The decay's decisions so far."""
        return self.decisions.decays

    def stage(self, position: Position) -> Stage:
        """How the next step is trained; where the clock ends stages, they are not bound to epochs."""
        if not self._stages_by_clock:
            return stage_of(self.stages, position.epoch)
        index = bisect_right(self.decisions.stage_ends, position.step)
        return self.stages[index]._replace(first=0, end=ENDLESS)

    def rates(self, epoch: float, step: int) -> tuple[float, float]:
        """Learning rate and momentum of a step, at so many epochs."""
        c = self.config
        if c.schedule == "cosine":
            lr = schedules.learning_rate(epoch, peak=c.peak_lr, warmup_epochs=c.warmup_epochs, epochs=c.epochs)
            return lr, schedules.momentum(epoch, start=c.moco_m, epochs=c.epochs, cosine=c.moco_m_cos)
        progress = schedules.decay_progress(step, self.decays)
        lr = schedules.stable_rate(epoch, progress, peak=c.peak_lr, warmup_epochs=c.warmup_epochs)
        return lr, schedules.momentum(progress, start=c.moco_m, epochs=1, cosine=c.moco_m_cos)

    def is_over(self, position: Position) -> bool:
        """Whether the run has come to its end."""
        if self.decays:
            return position.step >= self.decays[-1].end
        return self.clock is None and position.epoch >= self.config.epochs

    def expected(self, step: int) -> int:
        """Steps of the whole run, as far as is known when ``step`` are done."""
        if self.decays:
            return self.decays[-1].end
        possible = self.clock.possible() if self.clock is not None else 0
        return step + possible if possible else self.config.epochs * self.iterations

    def due(self, position: Position) -> Decisions | None:
        """All decisions, where one is to be taken before the next step; the same on every rank, which all call it."""
        if self.config.schedule == "cosine" or self.is_over(position):
            return None
        step = position.step
        if self.clock is None:
            return self._planned(step)
        self.clock.note(step)
        if self.world.size > 1 and step % _ASKED:
            return None
        decays, ends = self.decisions
        decides = self.world.main and not self.clock.is_postponed()
        if len(ends) < len(self.stages) - 1 and self.world.any(int(decides and self._stage_is_over())):
            self.clock.forget_pace()
            return Decisions(decays, (*ends, step))
        steps = self.clock.decay(step, decays, self.config.decay_share) if decides else 0
        steps = self.world.any(steps)
        return Decisions((*decays, Decay(step, steps)), ends) if steps else None

    def _stage_is_over(self) -> bool:
        stage = self.stages[len(self.decisions.stage_ends)]
        return self.clock is not None and self.clock.is_past(stage.share)

    def _planned(self, step: int) -> Decisions | None:
        """The decay of a run by epochs; of one with recorded decisions its first, so that its start is kept."""
        if self.decays:
            return self.decisions if self.decays[0].step == step else None
        end = self.config.epochs * self.iterations
        begin = round((1 - self.config.decay_share) * end)
        decay = Decay(step, max(end - step, 1))
        return self.decisions._replace(decays=(decay,)) if step >= max(begin, self._not_before) else None

    def foreseen(self, step: int) -> str:
        """Once, early on: that the clock will not leave time for the warm-up, where it won't; else nothing."""
        if self.clock is None or self._looked_ahead or not self.clock.is_past(_FORESEEN):
            return ""
        self._looked_ahead = True
        c, stable = self.config, (1 - self.config.decay_share) * self.expected(step) / self.iterations
        frozen = f"--freeze-epochs {c.freeze_epochs} and " if c.freeze_epochs else ""
        if self.decays or c.freeze_epochs + c.warmup_epochs <= stable:
            return ""
        return (
            f"--budget {c.budget} leaves about {stable:.1f} epochs before the learning rate falls, less than {frozen}"
            f"--warmup-epochs {c.warmup_epochs}: it will not come to its peak; give fewer of them, or a longer budget"
        )

    def take(self, decisions: Decisions) -> None:
        """Go by these decisions."""
        self.decisions = decisions

    def postpone(self, step: int) -> None:
        """Decide nothing for a while: what was decided at ``step`` could not be kept."""
        share = self.config.decay_share
        self._not_before = step + round(_AGAIN * share * self.config.epochs * self.iterations)
        if self.clock is not None:
            self.clock.postpone(share)

    def begins_decay(self, step: int) -> bool:
        """Whether the stable part ends before ``step``."""
        return bool(self.decays) and self.decays[0].step == step


def clock_of(config: PretrainConfig, *, began: float, seconds: float | None, resumed: bool) -> Clock | None:
    """The clock of ``--schedule wsd`` with ``--budget``; none where all decisions are given.

    Args:
        config: of the run.
        began: when this process was started.
        seconds: that former processes were up, as the checkpoint says; ``None`` where it says nothing.
        resumed: whether there is a checkpoint of this run.
    """
    hours = budget_hours(config.budget) if config.schedule == "wsd" else None
    if hours is None or (seconds is None if resumed else bool(config.decay)):
        return None
    return Clock(3600 * hours, began=began, before=seconds or 0.0)
