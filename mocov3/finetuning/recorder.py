"""From steps to metrics lines; counts what is counted over the whole run, resumes included."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mocov3.data import Batch, Work
from mocov3.finetuning.evaluate import Accuracy
from mocov3.finetuning.log import TuneLine, TuneLog
from mocov3.finetuning.step import Outcome
from mocov3.output.log import Stopwatch, warn


@dataclass
class Counters:
    """What a checkpoint carries along."""

    skipped: int = 0
    resumed: int = 0
    best: float = 0.0
    """Best top-1 accuracy so far, in %."""
    loss_sum: float = 0.0
    """Of the running epoch."""
    loss_count: int = 0

    def as_dict(self) -> dict[str, float]:
        """Name → value."""
        return asdict(self)


@dataclass
class TuneRecorder:
    """Turns outcomes of steps into lines.

    Args:
        log: where lines go.
        counters: counted on from a former run.
        batch_size: images a step over all ranks.
        print_freq: iterations between lines.
        repeats: repetitions of an image in the indices of batches.
    """

    log: TuneLog
    counters: Counters
    batch_size: int
    print_freq: int
    repeats: int
    corrupt: dict[int, str] = field(default_factory=dict)
    """Unreadable images met by this process: index → name."""
    last: TuneLine | None = None

    def __post_init__(self) -> None:
        self._step, self._span = Stopwatch(), Stopwatch()
        self._fetched = self._waited = 0.0
        self._images = 0

    def restart_clock(self) -> None:
        """Time from here: what went before was not training."""
        self._step.lap()
        self._span.lap()
        self._images, self._waited = 0, 0.0

    def batches_came(self, batches: Sequence[Batch]) -> None:
        """The batches of a step have arrived; the time since the last step was spent waiting for them."""
        self._fetched = self._step.lap()
        self._waited += self._fetched
        for bad in (bad for batch in batches for bad in batch.corrupt):
            image = bad.index // self.repeats
            if image not in self.corrupt:
                self.corrupt[image] = bad.name
                warn(f"{bad.name} cannot be read ({bad.reason}); another image is used instead")

    def step_done(self, work: Work, outcome: Outcome, *, step: int, lr: float) -> None:
        """Record one step."""
        counters = self.counters
        if outcome.ok:
            counters.loss_sum += outcome.loss
            counters.loss_count += 1
        else:
            counters.skipped += 1
        self._images += self.batch_size
        seconds = self._step.lap() + self._fetched
        show = work.iteration % self.print_freq == 0
        span = max(self._span.lap(), 1e-9) if show else 1.0
        self.last = TuneLine(
            step=step,
            epoch=work.epoch,
            iteration=work.iteration,
            loss=outcome.loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            images_per_second=self._images / span,
            data_wait=min(self._waited / span, 1.0),
            skipped=counters.skipped,
            corrupt=len(self.corrupt),
            resumed=counters.resumed,
        )
        if show:
            self._images, self._waited = 0, 0.0
        self.log.step(self.last, seconds=seconds, waited=self._fetched, show=show)

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
                TuneLine(
                    step=step,
                    epoch=epoch,
                    iteration=-1,
                    loss=None,
                    lr=lr,
                    grad_norm=None,
                    images_per_second=None,
                    data_wait=None,
                    skipped=counters.skipped,
                    corrupt=len(self.corrupt),
                    resumed=counters.resumed,
                    acc1=accuracy.acc1,
                    acc5=accuracy.acc5,
                    mean_class_acc1=accuracy.mean_class_acc1,
                    test_loss=accuracy.loss,
                )
            )
        self.log.epoch({**entry, "epoch": epoch})
        return better
