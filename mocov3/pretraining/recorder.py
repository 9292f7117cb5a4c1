"""From steps to metrics: keeps losses on the device until a print step, then reads everything at once.

A GPU is read a step later: then it has the next step to do meanwhile.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mocov3.data import Batch, Work
from mocov3.data.device.sending import Arriving
from mocov3.distributed import World
from mocov3.evaluation.quality import rank_of_gram
from mocov3.metrics import MetricsLine
from mocov3.pretraining.log import PretrainingLog
from mocov3.pretraining.step import Outcome
from mocov3.running.counters import Counters


class Recorded(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    epoch: int
    iteration: int
    loss: Tensor
    ok: Tensor
    lr: float


@dataclass
class Skips:
    """Steps that changed nothing since their loss or gradient was not finite, or a spike."""

    in_a_row: int = 0
    """How many were skipped in a row, up to the last step that was read."""
    longest: list[Recorded] = field(default_factory=list)
    """The longest row so far."""
    _row: list[Recorded] = field(default_factory=list)

    def read(self, pending: Recorded, ok: bool) -> None:
        """Count a step."""
        self._row = [] if ok else [*self._row, pending]
        self.in_a_row = len(self._row)
        if self.in_a_row > len(self.longest):
            self.longest = list(self._row)


@dataclass
class Due:
    """A line of metrics whose numbers are on their way from the device."""

    work: Work
    step: int
    lr: float
    m: float
    pending: list[Recorded]
    numbers: Arriving
    """Means over ranks: losses of ``pending``, what the line needs besides, and whether each step counted."""
    gram: Arriving | None
    """Of the embeddings of all ranks."""


class Recorder:
    """Turns outcomes of steps into metrics lines.

    Args:
        world: this rank.
        log: where lines go.
        counters: counted on from a former run.
        batch_size: images a step over all ranks.
        print_freq: iterations between lines.
        images: indices of the images of all ranks in (epoch, iteration).
        late: read the device a step after the print step.
    """

    def __init__(
        self,
        world: World,
        log: PretrainingLog,
        counters: Counters,
        *,
        batch_size: int,
        print_freq: int,
        images: Callable[[int, int], list[int]],
        late: bool = False,
    ) -> None:
        self.world, self.log, self.counters, self.images = world, log, counters, images
        self.batch_size, self.print_freq, self.late = batch_size, print_freq, late
        self.skips = Skips()
        self._pending: list[Recorded] = []
        self._due: Due | None = None
        self._loss = 0.0
        self._last = log.last

    def step_done(self, batch: Batch, outcome: Outcome, *, step: int, lr: float, m: float, skipped: Tensor) -> None:
        """Record one step; at print steps ask the device for what a line needs."""
        self._write_due()
        work, statistics = batch.work, outcome.statistics
        self._pending.append(Recorded(step, work.epoch, work.iteration, outcome.loss, outcome.ok, lr))
        self.counters.meet(batch.corrupt)
        if work.iteration % self.print_freq:
            self.log.step_ended(work.epoch, step, self.batch_size)
            return
        retrieved = statistics.retrieved.float() / statistics.queries
        extra = torch.stack([retrieved, statistics.feature_std.float(), skipped.float()])
        gram = None
        if (made := statistics.embeddings) is not None:
            gram = Arriving(self.world.sum(made.T @ made))
        pending, numbers = self._ask(torch.cat([extra, outcome.grad_norms.float()]))
        self._due = Due(work, step, lr, m, pending, numbers, gram)
        if not self.late:
            self._write_due()

    def _ask(self, extra: Tensor) -> tuple[list[Recorded], Arriving]:
        """The steps since the last reading, and their numbers with ``extra`` between, as means over ranks."""
        pending, self._pending = self._pending, []
        losses, oks = (torch.stack(parts).float() for parts in zip(*((p.loss, p.ok) for p in pending), strict=True))
        return pending, Arriving(self.world.sum(torch.cat([losses, extra, oks])) / self.world.size)

    def _write_due(self) -> None:
        """Write the line of the last print step; every rank comes here at the same step."""
        if (due := self._due) is None:
            return
        self._due = None
        retrieval_accuracy, feature_std, skipped, first, last = self._read(due.pending, due.numbers)
        rank = None if due.gram is None else _rank(due.gram.wait())
        work = due.work
        # the device is read before the clock is: it may have had steps left to do
        self.log.step_ended(work.epoch, due.step, self.batch_size)
        self.counters.gather(self.world, self.log, work.epoch)
        images_per_second, data_wait = self.log.speed()
        self._last = MetricsLine(
            step=due.step,
            epoch=work.epoch,
            iteration=work.iteration,
            loss=self._loss,
            loss_start=self.log.start,
            loss_floor=self.log.floor,
            retrieval_accuracy=retrieval_accuracy,
            lr=due.lr,
            momentum=due.m,
            feature_std=feature_std,
            grad_norm_first=first,
            grad_norm_last=last,
            images_per_second=images_per_second,
            data_wait=data_wait,
            skipped=self.counters.skipped + int(skipped),
            resumed=self.counters.resumed,
            corrupt=len(self.counters.corrupt),
            effective_rank=rank,
        )
        self.log.metrics(self._last)

    def flush(self) -> None:
        """Write the line that is due, and send the losses since on; every rank must call it at the same step."""
        self._write_due()
        if self._pending:
            self._read(*self._ask(torch.empty(0, device=self.world.device)))

    def _read(self, pending: list[Recorded], numbers: Arriving) -> list[float]:
        """Read the device: count skipped steps, and return what was asked for besides."""
        means = numbers.wait().tolist()
        n = len(pending)
        losses, extra, oks = means[:n], means[n:-n], means[-n:]
        self._loss = losses[-1]
        self.log.losses([(p.step, loss, p.lr) for p, loss in zip(pending, losses, strict=True)])
        for p, loss, ok in zip(pending, losses, oks, strict=True):
            self.skips.read(p, bool(ok))
            if not ok:
                self.log.skipped(
                    step=p.step,
                    epoch=p.epoch,
                    iteration=p.iteration,
                    loss=loss,
                    images=self.images(p.epoch, p.iteration),
                )
        return extra

    def knn(self, accuracy: float, *, epoch: int, step: int) -> None:
        """Write a line with the k-NN accuracy, beside the numbers of the last line."""
        self._write_due()
        if self._last is not None:
            self.log.knn(dataclasses.replace(self._last, knn=accuracy, epoch=epoch, step=step), epoch)


def _rank(gram: Tensor) -> float | None:
    return rank_of_gram(gram) if bool(torch.isfinite(gram).all()) else None
