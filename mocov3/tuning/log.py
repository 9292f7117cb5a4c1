"""Output of a fine-tuning run: log lines, ``metrics.jsonl``, DeiT's ``log.txt``, TensorBoard."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from mocov3.log import METRICS
from mocov3.metrics import Meter, Progress

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
    """Share of the time since the last line spent waiting for pictures."""
    skipped: int
    """Steps so far with a loss or gradient that was not finite, which changed nothing."""
    corrupt: int
    """Distinct unreadable pictures met so far."""
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
        active: whether this rank writes.
        quiet: print nothing.
        iterations: of an epoch.
        first_step: step at which this process begins; later lines of a former one are cut off.
        first_epoch: likewise for the epochs of ``log.txt``.
    """

    def __init__(
        self, folder: Path, *, active: bool, quiet: bool, iterations: int, first_step: int, first_epoch: int
    ) -> None:
        self.active, self.quiet, self.folder = active, quiet, folder
        self._time, self._data = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self._lr, self._loss = Meter("LR", ".4e"), Meter("Loss", ".4e")
        self._progress = Progress(iterations, [self._time, self._data, self._lr, self._loss])
        self._epoch = -1
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        _cut(folder / METRICS, "step", first_step)
        _cut(folder / DEIT_LOG, "epoch", first_epoch)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def say(self, text: str) -> None:
        """A line of explanation."""
        if self.active and not self.quiet:
            print(text, flush=True)

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
        if line.loss is not None:
            self._board.add_scalar("loss", line.loss, line.step)
        if show:
            self._write(line, ("lr", "grad_norm", "images_per_second", "data_wait"))
            self.say(self._progress.line(line.epoch, line.iteration))

    def evaluated(self, line: TuneLine) -> None:
        """Write the accuracies at the end of an epoch."""
        if self.active:
            self._write(line, ("acc1", "acc5", "mean_class_acc1", "test_loss"))

    def epoch(self, entry: dict[str, Any]) -> None:
        """A line of DeiT's ``log.txt``."""
        if self.active:
            with (self.folder / DEIT_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _write(self, line: TuneLine, tags: tuple[str, ...]) -> None:
        self._metrics.write(json.dumps(dataclasses.asdict(line)) + "\n")
        self._metrics.flush()
        for tag in tags:
            if (value := getattr(line, tag)) is not None:
                self._board.add_scalar(tag, value, line.step)

    def close(self) -> None:
        """Finish the files."""
        if self.active:
            self._metrics.close()
            self._board.close()


def _cut(path: Path, name: str, first: int) -> None:
    # a resumed run goes on from its checkpoint: what was logged after it never happened
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _number(line, name) < first]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _number(line: str, name: str) -> float:
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return float("inf")
