"""From steps to metrics lines; counts what is counted over the whole run, resumes included."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mocov3.data import Batch, Work
from mocov3.data.device.sending import Arriving
from mocov3.distributed import World
from mocov3.finetuning.evaluate import Accuracy, Areas
from mocov3.finetuning.log import TuneLine, TuneLog
from mocov3.finetuning.step import Outcome
from mocov3.running.counters import Counters


@dataclass
class TuneCounters(Counters):
    """What a checkpoint of fine-tuning carries along."""

    best: float = 0.0
    """Best top-1 accuracy so far, of findings best mean AUROC, in %."""
    loss_sum: float = 0.0
    """Of the running epoch."""
    loss_count: int = 0


class Due(NamedTuple):
    """A line whose numbers are on their way from the device: loss, gradient norm, whether the step counted."""

    work: Work
    step: int
    lr: float
    numbers: Arriving


@dataclass
class TuneRecorder:
    """Turns outcomes of steps into lines.

    Args:
        world: this rank.
        log: where lines go.
        counters: counted on from a former run.
        batch_size: images a step over all ranks.
        print_freq: iterations between lines.
        repeats: repetitions of an image in the indices of batches.
    """

    world: World
    log: TuneLog
    counters: TuneCounters
    batch_size: int
    print_freq: int
    repeats: int
    bad: int = 0
    """Steps in a row that did not count, up to the last that was read."""
    _due: Due | None = None

    def step_done(self, batches: Sequence[Batch], outcome: Outcome, *, step: int, lr: float) -> None:
        """Record one step; a GPU, which has the next one to do meanwhile, is read a step later."""
        self.flush()
        work = batches[0].work
        self.counters.meet(replace(bad, index=bad.index // self.repeats) for batch in batches for bad in batch.corrupt)
        self._due = Due(work, step, lr, Arriving(torch.stack([o.to(outcome.loss.dtype) for o in outcome])))
        if self.world.device.type != "cuda":
            self.flush()

    def flush(self) -> None:
        """Write the line of the last step; every rank comes here at the same step."""
        if (due := self._due) is None:
            return
        self._due = None
        counters, work, step = self.counters, due.work, due.step
        loss, grad_norm, ok = due.numbers.wait().tolist()
        self.bad = 0 if ok else self.bad + 1
        if ok:
            counters.loss_sum += loss
            counters.loss_count += 1
        else:
            counters.skipped += 1
        self.log.step_ended(work.epoch, step, self.batch_size)
        show = work.iteration % self.print_freq == 0
        if show:
            counters.gather(self.world, self.log, work.epoch)
        speed, waiting = self.log.speed() if show else (None, None)
        line = self._line(step, work.epoch, work.iteration, due.lr)
        line = replace(line, loss=loss, grad_norm=grad_norm, images_per_second=speed, data_wait=waiting)
        self.log.step(line, show=show)

    def epoch_done(self, epoch: int, step: int, lr: float, accuracy: Accuracy | Areas | None) -> bool:
        """Record the end of an epoch; whether its accuracy (of findings its AUROC) is the best so far."""
        self.flush()
        counters = self.counters
        entry = {"train_lr": lr, "train_loss": counters.loss_sum / max(counters.loss_count, 1)}
        counters.loss_sum, counters.loss_count = 0.0, 0
        better = False
        if accuracy is not None:
            better = accuracy.score > counters.best
            counters.best = max(counters.best, accuracy.score)
            values = accuracy.values
            told = ("acc1", "acc5", "auroc", "average_precision")
            entry |= {"test_loss": accuracy.loss, **{f"test_{name}": values[name] for name in told if name in values}}
            self.log.evaluated(TuneLine(**{**vars(self._line(step, epoch, -1, lr)), **values}))
        self.log.epoch({**entry, "epoch": epoch})
        return better

    def _line(self, step: int, epoch: int, iteration: int, lr: float) -> TuneLine:
        """A line without measurements."""
        c = self.counters
        return TuneLine(step, epoch, iteration, lr, skipped=c.skipped, corrupt=len(c.corrupt), resumed=c.resumed)
