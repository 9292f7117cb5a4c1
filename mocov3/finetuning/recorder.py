"""From steps to metrics lines; counts what is counted over the whole run, resumes included."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mocov3.data import Batch
from mocov3.distributed import World
from mocov3.finetuning.evaluate import Accuracy
from mocov3.finetuning.log import TuneLine, TuneLog
from mocov3.finetuning.step import Outcome
from mocov3.running.counters import Counters


@dataclass
class TuneCounters(Counters):
    """What a checkpoint of fine-tuning carries along."""

    best: float = 0.0
    """Best top-1 accuracy so far, in %."""
    loss_sum: float = 0.0
    """Of the running epoch."""
    loss_count: int = 0


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

    def step_done(self, batches: Sequence[Batch], outcome: Outcome, *, step: int, lr: float) -> None:
        """Record one step."""
        counters, work = self.counters, batches[0].work
        counters.meet(replace(bad, index=bad.index // self.repeats) for batch in batches for bad in batch.corrupt)
        if outcome.ok:
            counters.loss_sum += outcome.loss
            counters.loss_count += 1
        else:
            counters.skipped += 1
        self.log.step_ended(work.epoch, step, self.batch_size)
        show = work.iteration % self.print_freq == 0
        if show:
            counters.gather(self.world, self.log, work.epoch)
        speed, waiting = self.log.speed() if show else (None, None)
        line = self._line(step, work.epoch, work.iteration, lr)
        line = replace(line, loss=outcome.loss, grad_norm=outcome.grad_norm, images_per_second=speed, data_wait=waiting)
        self.log.step(line, show=show)

    def epoch_done(self, epoch: int, step: int, lr: float, accuracy: Accuracy | None) -> bool:
        """Record the end of an epoch; whether its accuracy is the best so far."""
        counters = self.counters
        entry = {"train_lr": lr, "train_loss": counters.loss_sum / max(counters.loss_count, 1)}
        counters.loss_sum, counters.loss_count = 0.0, 0
        better = False
        if accuracy is not None:
            better = accuracy.acc1 > counters.best
            counters.best = max(counters.best, accuracy.acc1)
            entry |= {"test_loss": accuracy.loss, "test_acc1": accuracy.acc1, "test_acc5": accuracy.acc5}
            self.log.evaluated(
                replace(
                    self._line(step, epoch, -1, lr),
                    acc1=accuracy.acc1,
                    acc5=accuracy.acc5,
                    mean_class_acc1=accuracy.mean_class_acc1,
                    test_loss=accuracy.loss,
                )
            )
        self.log.epoch({**entry, "epoch": epoch})
        return better

    def _line(self, step: int, epoch: int, iteration: int, lr: float) -> TuneLine:
        """A line without measurements."""
        c = self.counters
        return TuneLine(step, epoch, iteration, lr, skipped=c.skipped, corrupt=len(c.corrupt), resumed=c.resumed)
