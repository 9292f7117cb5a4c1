"""Output of a fine-tuning run: terminal, ``metrics.jsonl``, DeiT's ``log.txt``, loggers."""

import dataclasses
from collections.abc import Container

from mocov3.config import FinetuneConfig
from mocov3.metrics import JsonLine, measured
from mocov3.output.log import Session, TrainingLog

DEIT_LOG = "log.txt"


@dataclasses.dataclass(frozen=True)
class TuneLine:
    """One line of ``metrics.jsonl``. ``None`` where a quantity was not measured at this step."""

    step: int
    """Optimisation steps completed before this one."""
    epoch: int
    iteration: int
    lr: float
    skipped: int
    """Steps so far with a loss or gradient that was not finite, which changed nothing."""
    corrupt: int
    """Distinct unreadable images met so far."""
    resumed: int
    loss: float | None = None
    """Mean over ranks of this step's loss."""
    grad_norm: float | None = None
    """Euclidean norm of the gradient before clipping."""
    images_per_second: float | None = None
    data_wait: float | None = None
    """Share of the time since the last line spent waiting for images."""
    acc1: float | None = None
    """Top-1 accuracy in % of the weights (not of their average), at evaluations."""
    acc5: float | None = None
    mean_class_acc1: float | None = None
    """Mean over classes of their top-1 accuracy in %."""
    test_loss: float | None = None
    auroc: float | None = None
    """Mean over findings in %, in place of accuracies where an image has several findings."""
    average_precision: float | None = None
    task: str = "finetune"
    version: int = 1


class TuneLog(TrainingLog):
    """Output of a fine-tuning run. On ranks that do not write, every call does nothing.

    Args:
        config: of the run.
        session: what this process does of it.
        corrupt: indices of the unreadable images met by a former process.
    """

    def __init__(self, config: FinetuneConfig, session: Session, corrupt: Container[int] = ()) -> None:
        super().__init__(config, session, corrupt)
        self.called = "AUROC" if config.labels else "Acc@1"
        self._accuracy = self.last_known("auroc" if config.labels else "acc1")
        self._deit, _ = self.open(DEIT_LOG, lambda line: line["epoch"] < session.first_epoch)

    def step(self, line: TuneLine, *, show: bool) -> None:
        """Record a step; with ``show`` write and print its line."""
        for meter, value in ((self._lr, line.lr), (self._loss, line.loss)):
            meter.update(value if value is not None else float("nan"))
        self.loggers.scalars({"loss": line.loss}, line.step)
        if show:
            self.line(line)
            self.terminal.line(self._progress.line(line.epoch, line.iteration))
            self.terminal.status(self._parts(line))

    def evaluated(self, line: TuneLine) -> None:
        """Write the accuracies at the end of an epoch."""
        self._accuracy = line.acc1 if line.auroc is None else line.auroc
        self.line(line)

    def epoch(self, entry: JsonLine) -> None:
        """A line of DeiT's ``log.txt``."""
        self._deit.write(entry)

    def line(self, line: TuneLine) -> None:
        """Write a line of metrics."""
        self._write(self._metrics, dataclasses.asdict(line))
        self.loggers.scalars(measured(line), line.step)

    def _parts(self, line: TuneLine) -> list[str]:
        return [
            f"loss {line.loss:.3f}" if line.loss is not None else "loss not finite",
            f"{self.called} {self._accuracy:.1f}" if self._accuracy is not None else "",
            f"{line.images_per_second or 0:.0f} img/s",
            f"wait {100 * (line.data_wait or 0):.0f}%",
            f"lr {line.lr:.1e}",
        ]
