"""The only owner of output: log lines or progress bar, ``metrics.jsonl``, TensorBoard events, warnings."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from mocov3.data.loader import Corrupt
from mocov3.errors import printable
from mocov3.metrics import Meter, MetricsLine, Progress

METRICS = "metrics.jsonl"
CORRUPT = "corrupt.jsonl"


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"mocov3: {printable(text)}", file=sys.stderr, flush=True)


class RunLog:
    """Output of a training run. On ranks that do not write, every call does nothing.

    Args:
        folder: the run directory.
        active: whether this rank writes.
        style: ``lines`` (the reference's log lines), ``bar`` (progress bar on a terminal, else short lines),
            ``json`` (metrics lines), ``quiet``.
        epochs: of the whole run.
        iterations: of an epoch.
        start: loss at the start and its floor, for the bar.
        floor: see ``start``.
        first_step: step at which this process begins; later lines of a former one are cut off.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        style: str,
        epochs: int,
        iterations: int,
        start: float,
        floor: float,
        first_step: int,
    ) -> None:
        self.folder, self.active, self.style = folder, active, style
        self.epochs, self.iterations = epochs, iterations
        self.start, self.floor = start, floor
        self._time, self._data = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self._lr, self._loss = Meter("LR", ".4e"), Meter("Loss", ".4e")
        self._progress = Progress(iterations, [self._time, self._data, self._lr, self._loss])
        self._epoch = -1
        self._knn: float | None = None
        self._bar: Any = None
        self.last: MetricsLine | None = None
        """The last line of a former run, without k-NN: what a resume goes on from."""
        if not active:
            return
        self._metrics: TextIO
        self._metrics, self.last = _reopened(folder / METRICS, first_step)
        self._corrupt: TextIO = (folder / CORRUPT).open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", first_step)
        if style == "bar" and sys.stdout.isatty():
            self._bar, self._task = _progress_bar(epochs * iterations, first_step)

    def say(self, text: str) -> None:
        """A line of explanation, at the beginning or end of things."""
        if not self.active or self.style == "quiet":
            return
        if self.style == "json":
            print(text, file=sys.stderr, flush=True)
        elif self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def timed(self, epoch: int, step_seconds: float, data_seconds: float) -> None:
        """Record the time of a step; the line's averages are those of its epoch, as in the reference."""
        if epoch != self._epoch:
            self._epoch = epoch
            for meter in (self._time, self._data, self._lr, self._loss):
                meter.total, meter.count = 0.0, 0
        self._time.update(step_seconds)
        self._data.update(data_seconds)

    def losses(self, history: Sequence[tuple[int, float, float]]) -> None:
        """Record (step, loss, lr) of steps, in order: TensorBoard's tag ``loss`` and the line's averages."""
        if not self.active:
            return
        for step, loss, lr in history:
            self._loss.update(loss)
            self._lr.update(lr)
            self._board.add_scalar("loss", loss, step)

    def metrics(self, line: MetricsLine) -> None:
        """Write one line of metrics, and show it."""
        if not self.active:
            return
        self._write(line)
        for name in ("lr", "momentum", "retrieval_accuracy", "feature_std", "images_per_second", "data_wait",
                     "grad_norm_first", "grad_norm_last", "knn"):  # fmt: skip
            value = getattr(line, name)
            if value is not None:
                self._board.add_scalar(name, value, line.step)
        self._show(line)

    def corrupt(self, pictures: Sequence[Corrupt], epoch: int) -> None:
        """List unreadable pictures that are met for the first time."""
        if not self.active:
            return
        for picture in pictures:
            entry = {"epoch": epoch, "name": picture.name, "index": picture.index, "reason": picture.reason,
                     "replaced_by": picture.replaced_by}  # fmt: skip
            self._corrupt.write(json.dumps(entry) + "\n")
        if pictures:
            self._corrupt.flush()
            warn(f"{len(pictures)} unreadable pictures replaced (listed in {CORRUPT}), first: {pictures[0].name}: "
                 f"{pictures[0].reason}")  # fmt: skip

    def knn(self, line: MetricsLine, epoch: int) -> None:
        """Write the k-NN accuracy at the end of an epoch."""
        if not self.active:
            return
        self._knn = line.knn
        self._write(line)
        self._board.add_scalar("knn", line.knn, line.step)
        self.say(f"Epoch {epoch}: k-NN {line.knn:.2f} %")

    def close(self) -> None:
        """Finish the files and the bar."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.stop()
        self._metrics.close()
        self._corrupt.close()
        self._board.close()

    def _write(self, line: MetricsLine) -> None:
        self._metrics.write(json.dumps(line.as_dict()) + "\n")
        self._metrics.flush()

    def _show(self, line: MetricsLine) -> None:
        if self.style == "quiet":
            return
        if self.style == "json":
            print(json.dumps(line.as_dict()), flush=True)
        elif self.style == "lines":
            print(self._progress.line(line.epoch, line.iteration), flush=True)
        elif self._bar is not None:
            self._bar.update(self._task, completed=line.step + 1, description=self._short(line))
        else:
            print(f"epoch {line.epoch + 1}/{self.epochs} step {line.step}: {self._short(line)}", flush=True)

    def _short(self, line: MetricsLine) -> str:
        # 80 columns hold this with the bar
        knn = f" k-NN {self._knn:.1f}" if self._knn is not None else ""
        return (
            f"loss {line.loss:.3f} ({self.start:.2f}→{self.floor:.2f}) found {100 * line.retrieval_accuracy:.0f}%{knn} "
            f"{line.images_per_second:.0f} img/s wait {100 * line.data_wait:.0f}%"
        )


def _reopened(path: Path, first_step: int) -> tuple[TextIO, MetricsLine | None]:
    # a resumed run goes on from its checkpoint: what was logged after it never happened
    last = None
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < first_step]
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        last = _parsed(kept[-1]) if kept else None
    return path.open("a", encoding="utf-8"), last


def _parsed(line: str) -> MetricsLine | None:
    try:
        return MetricsLine(**{**json.loads(line), "knn": None})
    except TypeError:  # of another version
        return None


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return float("inf")


def _tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step or None)


def _progress_bar(total: int, completed: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    bar.start()
    return bar, bar.add_task("starting", total=total, completed=completed)


class Stopwatch:
    """Seconds since the last call, and shares of them."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
