"""From steps to metrics: keeps losses on the device until a print step, then reads everything at once."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mocov3.data import Batch
from mocov3.data.loader import Corrupt
from mocov3.distributed import World
from mocov3.log import RunLog, Stopwatch
from mocov3.metrics import MetricsLine
from mocov3.step import Outcome


@dataclass
class Counters:
    """What is counted over the whole run, resumes included."""

    resumed: int = 0
    skipped: int = 0
    corrupt: dict[int, str] = field(default_factory=dict)
    """Unreadable pictures met so far: index → name."""


class Recorder:
    """Turns outcomes of steps into metrics lines.

    Args:
        world: this rank.
        log: where lines go.
        counters: counted on from a former run.
        batch_size: pictures a step over all ranks.
        print_freq: iterations between lines.
    """

    def __init__(self, world: World, log: RunLog, counters: Counters, *, batch_size: int, print_freq: int) -> None:
        self.world, self.log, self.counters = world, log, counters
        self.batch_size, self.print_freq = batch_size, print_freq
        self._pending: list[tuple[int, Tensor, float]] = []
        self._met: list[Corrupt] = []
        self._step_time, self._line_time = Stopwatch(), Stopwatch()
        self._fetched = self._waited = 0.0
        self._pictures = 0
        self._last = log.last

    def restart_clock(self) -> None:
        """Time from here: what went before was not training."""
        self._step_time.lap()

    def batch_came(self) -> None:
        """A batch has arrived; the time since the last step was spent waiting for it."""
        self._fetched = self._step_time.lap()
        self._waited += self._fetched

    def step_done(self, batch: Batch, outcome: Outcome, *, step: int, lr: float, m: float, skipped: Tensor) -> None:
        """Record one step; at print steps read the device and write a line."""
        self._pending.append((step, outcome.loss, lr))
        self._met += batch.corrupt
        self._pictures += self.batch_size
        self.log.timed(batch.work.epoch, self._step_time.lap() + self._fetched, self._fetched)
        if batch.work.iteration % self.print_freq == 0:
            self._write(batch, outcome, step, lr, m, int(skipped))

    def _write(self, batch: Batch, outcome: Outcome, step: int, lr: float, m: float, skipped: int) -> None:
        found = outcome.statistics
        values = torch.stack(
            [
                *(loss.float() for _, loss, _ in self._pending),
                found.retrieved.float() / found.queries,
                found.feature_std.float(),
            ]
        )
        # one reading of the device, and one sum over ranks, for all of them
        *losses, retrieval, spread = (self.world.sum(values) / self.world.size).tolist()
        first, last = outcome.grad_norms.tolist()
        self.count_corrupt(batch.work.epoch)
        seconds = max(self._line_time.lap(), 1e-9)
        self._last = MetricsLine(
            step=step,
            epoch=batch.work.epoch,
            iteration=batch.work.iteration,
            loss=losses[-1],
            loss_start=self.log.start,
            loss_floor=self.log.floor,
            retrieval_accuracy=retrieval,
            lr=lr,
            momentum=m,
            feature_std=spread,
            grad_norm_first=first,
            grad_norm_last=last,
            images_per_second=self._pictures / seconds,
            data_wait=min(self._waited / seconds, 1.0),
            skipped=self.counters.skipped + skipped,
            resumed=self.counters.resumed,
            corrupt=len(self.counters.corrupt),
        )
        self._waited, self._pictures = 0.0, 0
        history = [(s, loss, rate) for (s, _, rate), loss in zip(self._pending, losses, strict=True)]
        self.log.losses(history)
        self.log.metrics(self._last)
        self._pending.clear()

    def flush(self) -> None:
        """Send the losses since the last line on; every rank must call it at the same step."""
        if self._pending:
            values = torch.stack([loss.float() for _, loss, _ in self._pending])
            losses = (self.world.sum(values) / self.world.size).tolist()
            self.log.losses([(s, loss, rate) for (s, _, rate), loss in zip(self._pending, losses, strict=True)])
            self._pending.clear()

    def count_corrupt(self, epoch: int) -> None:
        """Gather the unreadable pictures that ranks met, and list those met for the first time."""
        met = [c for part in self.world.gather(self._met) for c in part]
        new = {c.index: c for c in met if c.index not in self.counters.corrupt}
        self.counters.corrupt.update({i: c.name for i, c in new.items()})
        self._met.clear()
        self.log.corrupt([new[i] for i in sorted(new)], epoch)

    def knn(self, accuracy: float, *, epoch: int, step: int) -> None:
        """Write a line with the k-NN accuracy, beside the numbers of the last line."""
        if self._last is not None:
            self.log.knn(dataclasses.replace(self._last, knn=accuracy, epoch=epoch, step=step), epoch)
