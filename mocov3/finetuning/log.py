"""Output of a fine-tuning run: terminal, ``metrics.jsonl``, DeiT's ``log.txt``, loggers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mocov3.metrics import Meter, Progress, measured
from mocov3.output.log import METRICS, LineFile, cut, warn
from mocov3.output.loggers import Loggers
from mocov3.output.terminal import Terminal

DEIT_LOG = "log.txt"


@dataclasses.dataclass(frozen=True)
class TuneLine:
    """One line of ``metrics.jsonl``. ``None`` where a quantity was not measured at this step."""

    step: int
    """Optimisation steps completed before this one."""
    epoch: int
    iteration: int
    loss: float | None
    """Mean over ranks of this step's loss."""
    lr: float
    grad_norm: float | None
    """Euclidean norm of the gradient before clipping."""
    images_per_second: float | None
    data_wait: float | None
    """Share of the time since the last line spent waiting for images."""
    skipped: int
    """Steps so far with a loss or gradient that was not finite, which changed nothing."""
    corrupt: int
    """Distinct unreadable images met so far."""
    resumed: int
    acc1: float | None = None
    """Top-1 accuracy in % of the weights (not of their average), at evaluations."""
    acc5: float | None = None
    mean_class_acc1: float | None = None
    """Mean over classes of their top-1 accuracy in %."""
    test_loss: float | None = None
    task: str = "finetune"
    version: int = 1


class TuneLog:
    """On ranks that do not write, every call does nothing.

    Args:
        folder: the run directory.
        active: whether this rank writes files.
        shown: whether it shows anything.
        style: of ``mocov3.output.terminal``.
        epochs: of the whole run.
        iterations: of an epoch.
        first_step: step at which this process begins; later lines of a former one are cut off.
        first_epoch: likewise for the epochs of ``log.txt``.
        loggers: names of ``mocov3.output.loggers``.
        config: what loggers are told of the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        shown: bool,
        style: str,
        epochs: int,
        iterations: int,
        first_step: int,
        first_epoch: int,
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.active, self.folder = active, folder
        self.terminal = Terminal(style, epochs=epochs, iterations=iterations, done=first_step, active=shown)
        self._time, self._data = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self._lr, self._loss = Meter("LR", ".4e"), Meter("Loss", ".4e")
        self._progress = Progress(iterations, [self._time, self._data, self._lr, self._loss])
        self._epoch = -1
        self._accuracy: float | None = None
        if not active:
            return
        entries = cut(folder / METRICS, lambda entry: entry["step"] < first_step)
        self._accuracy = next((e["acc1"] for e in reversed(entries) if isinstance(e.get("acc1"), float)), None)
        cut(folder / DEIT_LOG, lambda entry: entry["epoch"] < first_epoch)
        self._metrics, self._deit = LineFile(folder / METRICS), LineFile(folder / DEIT_LOG)
        self._loggers = Loggers(
            loggers, folder, config=config or {}, first_step=first_step, quiet=style == "quiet", warn=warn
        )

    def say(self, text: str) -> None:
        """A line of explanation."""
        if self.active:
            self.terminal.say(text)

    def step(self, line: TuneLine, *, seconds: float, waited: float, show: bool) -> None:
        """Record a step; with ``show`` write and print its line."""
        if not self.active:
            return
        if line.epoch != self._epoch:
            self._epoch = line.epoch
            for meter in (self._time, self._data, self._lr, self._loss):
                meter.total, meter.count = 0.0, 0
        for meter, value in ((self._time, seconds), (self._data, waited), (self._lr, line.lr), (self._loss, line.loss)):
            meter.update(value if value is not None else float("nan"))
        self._loggers.scalars({"loss": line.loss}, line.step)
        self.terminal.advance(line.step + 1)
        if show:
            self._write(line)
            self.terminal.line(self._progress.line(line.epoch, line.iteration))
            self.terminal.status(self._parts(line))

    def evaluated(self, line: TuneLine) -> None:
        """Write the accuracies at the end of an epoch."""
        if self.active:
            self._accuracy = line.acc1
            self._write(line)

    def epoch(self, entry: dict[str, Any]) -> None:
        """A line of DeiT's ``log.txt``."""
        if self.active:
            self._deit.write(json.dumps(entry))

    def _write(self, line: TuneLine) -> None:
        values = dataclasses.asdict(line)
        self._metrics.write(json.dumps(values))
        self.terminal.json(values)
        self._loggers.scalars(measured(line), line.step)

    def _parts(self, line: TuneLine) -> list[str]:
        return [
            f"loss {line.loss:.3f}" if line.loss is not None else "loss not finite",
            f"Acc@1 {self._accuracy:.1f}" if self._accuracy is not None else "",
            f"{line.images_per_second or 0:.0f} img/s",
            f"wait {100 * (line.data_wait or 0):.0f}%",
            f"lr {line.lr:.1e}",
        ]

    def sync(self) -> None:
        """Flush what was logged so far to the disk, as far as the disk takes it."""
        if self.active:
            self._metrics.sync()
            self._deit.sync()

    def close(self) -> None:
        """Finish the files and the bar."""
        self.terminal.close()
        if self.active:
            self._metrics.close()
            self._deit.close()
            self._loggers.close()
