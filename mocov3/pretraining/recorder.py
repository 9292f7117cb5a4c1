"""From steps to metrics: keeps losses on the device until a print step, then reads everything at once."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mocov3.data import Batch
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


class Recorder:
    """Turns outcomes of steps into metrics lines.

    Args:
        world: this rank.
        log: where lines go.
        counters: counted on from a former run.
        batch_size: images a step over all ranks.
        print_freq: iterations between lines.
        images: indices of the images of all ranks in (epoch, iteration).
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
    ) -> None:
        self.world, self.log, self.counters, self.images = world, log, counters, images
        self.batch_size, self.print_freq = batch_size, print_freq
        self.skips = Skips()
        self._pending: list[Recorded] = []
        self._last = log.last

    def step_done(self, batch: Batch, outcome: Outcome, *, step: int, lr: float, m: float, skipped: Tensor) -> None:
        """Record one step; at print steps read the device and write a line."""
        work, statistics = batch.work, outcome.statistics
        self._pending.append(Recorded(step, work.epoch, work.iteration, outcome.loss, outcome.ok, lr))
        self.counters.meet(batch.corrupt)
        if work.iteration % self.print_freq:
            self.log.step_ended(work.epoch, step, self.batch_size)
            return
        # the device is read before the clock is: it may have steps left to do
        extra = [statistics.retrieved.float() / statistics.queries, statistics.feature_std.float()]
        extra += [statistics.drift.float()] if statistics.drift is not None else []
        losses, (retrieval_accuracy, feature_std, *drift) = self._read(extra)
        first, last = outcome.grad_norms.tolist()
        rank = self._effective_rank(statistics.embeddings)
        self.log.step_ended(work.epoch, step, self.batch_size)
        self.counters.gather(self.world, self.log, work.epoch)
        images_per_second, data_wait = self.log.speed()
        self._last = MetricsLine(
            step=step,
            epoch=work.epoch,
            iteration=work.iteration,
            loss=losses[-1],
            loss_start=self.log.start,
            loss_floor=self.log.floor,
            retrieval_accuracy=retrieval_accuracy,
            lr=lr,
            momentum=m,
            feature_std=feature_std,
            grad_norm_first=first,
            grad_norm_last=last,
            images_per_second=images_per_second,
            data_wait=data_wait,
            skipped=self.counters.skipped + int(skipped),
            resumed=self.counters.resumed,
            corrupt=len(self.counters.corrupt),
            effective_rank=rank,
            drift=drift[0] if drift else None,
        )
        self.log.metrics(self._last)

    def _effective_rank(self, embeddings: Tensor | None) -> float | None:
        if embeddings is None:
            return None
        gram = self.world.sum(embeddings.T @ embeddings).cpu()
        return rank_of_gram(gram) if bool(torch.isfinite(gram).all()) else None

    def flush(self) -> None:
        """Send the losses since the last line on; every rank must call it at the same step."""
        if self._pending:
            self._read([])

    def _read(self, extra: list[Tensor]) -> tuple[list[float], list[float]]:
        """Read the device, once: losses of the steps since the last reading, and means over ranks of ``extra``."""
        pending, self._pending = self._pending, []
        values = torch.stack([*(p.loss.float() for p in pending), *extra, *(p.ok.float() for p in pending)])
        means = (self.world.sum(values) / self.world.size).tolist()  # ranks agree on ok
        n = len(pending)
        losses, oks = means[:n], means[n + len(extra) :]
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
        return losses, means[n : n + len(extra)]

    def knn(self, accuracy: float, *, epoch: int, step: int) -> None:
        """Write a line with the k-NN accuracy, beside the numbers of the last line."""
        if self._last is not None:
            self.log.knn(dataclasses.replace(self._last, knn=accuracy, epoch=epoch, step=step), epoch)
