"""The only owner of the output of a pre-training run: terminal, ``metrics.jsonl``, loggers; and warnings of all."""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from mocov3.data.loading.slots import Corrupt
from mocov3.errors import printable
from mocov3.metrics import Meter, MetricsLine, Progress, measured
from mocov3.output.loggers import ImageBytes, Loggers
from mocov3.output.terminal import Terminal

METRICS = "metrics.jsonl"
CORRUPT = "corrupt.jsonl"
SKIPPED = "skipped.jsonl"


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"mocov3: {printable(text)}", file=sys.stderr, flush=True)


@functools.cache
def warn_once(text: str) -> None:
    """A line on standard error, unless this process wrote it before."""
    warn(text)


def warn_left_out(*sources: object, said: object = None, most: int = 10) -> None:
    """Report once what is left out of ``sources`` or remarkable: their lines ``skipped``, without those of ``said``."""
    before = getattr(said, "skipped", [])
    lines = [line for source in sources for line in getattr(source, "skipped", []) if line not in before]
    lines = list(dict.fromkeys(lines))
    for line in lines[:most]:
        warn(f"data: {line}")
    if len(lines) > most:
        warn(f"data: {len(lines) - most} more such lines")


class RunLog:
    """Output of a training run. On ranks that do not write, every call does nothing.

    Args:
        folder: the run directory.
        active: whether this rank writes.
        style: of ``mocov3.output.terminal``.
        epochs: of the whole run.
        iterations: of an epoch.
        start: loss at the start and its floor, for the bar.
        floor: see ``start``.
        first_step: step at which this process begins; later lines of a former one are cut off.
        corrupt: indices of the unreadable images met before it.
        loggers: names of ``mocov3.output.loggers``.
        config: what loggers are told of the run.
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
        corrupt: Container[int] = (),
        loggers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.active = folder, active
        self.terminal = Terminal(style, epochs=epochs, iterations=iterations, done=first_step, active=active)
        self.start, self.floor = start, floor
        self._time, self._data = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self._lr, self._loss = Meter("LR", ".4e"), Meter("Loss", ".4e")
        self._progress = Progress(iterations, [self._time, self._data, self._lr, self._loss])
        self._epoch = -1
        self._knn: float | None = None
        self.last: MetricsLine | None = None
        """The last line of a former run, without k-NN: what a resume starts from."""
        self.shown: MetricsLine | None = None
        """The last line of this process."""
        if not active:
            return
        # a resumed run continues from its checkpoint: what was logged after it never happened
        entries = cut(folder / METRICS, lambda entry: entry["step"] < first_step)
        cut(folder / SKIPPED, lambda entry: entry["step"] < first_step)
        cut(folder / CORRUPT, lambda entry: entry["index"] in corrupt)
        self.last = _parsed(entries[-1]) if entries else None
        self._knn = next((e["knn"] for e in reversed(entries) if isinstance(e.get("knn"), float)), None)
        self._metrics, self._corrupt = LineFile(folder / METRICS), LineFile(folder / CORRUPT)
        self._skipped = LineFile(folder / SKIPPED)
        self._loggers = Loggers(
            loggers, folder, config=config or {}, first_step=first_step, quiet=style == "quiet", warn=warn
        )

    def say(self, text: str) -> None:
        """A line of explanation, at the beginning or end of things."""
        self.terminal.say(text)

    def result(self, text: str) -> None:
        """What the run comes to."""
        self.terminal.result(text)

    def standing(self, epochs: int) -> str:
        """Where the run stands after so many epochs, in words."""
        if self.shown is None:
            return f"{epochs} epochs"
        knn = f", k-NN {self._knn:.2f} %" if self._knn is not None else ""
        start, floor = f"start {self.start:.2f}", f"floor {self.floor:.2f}"
        return f"{epochs} of {self.terminal.epochs} epochs, loss {self.shown.loss:.4f} ({start}, {floor}){knn}"

    def timed(self, epoch: int, step: int, step_seconds: float, data_seconds: float) -> None:
        """Record the time of a step; the line's averages are those of its epoch, as in the reference."""
        if epoch != self._epoch:
            self._epoch = epoch
            for meter in (self._time, self._data, self._lr, self._loss):
                meter.total, meter.count = 0.0, 0
        self._time.update(step_seconds)
        self._data.update(data_seconds)
        self.terminal.advance(step + 1)

    def losses(self, history: Sequence[tuple[int, float, float]]) -> None:
        """Record (step, loss, lr) of steps, in order: TensorBoard's tag ``loss`` and the line's averages."""
        if not self.active:
            return
        for step, loss, lr in history:
            self._loss.update(loss)
            self._lr.update(lr)
            self._loggers.scalars({"loss": loss}, step)

    def metrics(self, line: MetricsLine) -> None:
        """Write one line of metrics, and show it."""
        if not self.active:
            return
        self._write(line)
        self._loggers.scalars(measured(line), line.step)
        self.terminal.line(self._progress.line(line.epoch, line.iteration))
        self.terminal.status(self._parts(line))
        self.shown = line

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Further numbers, for the loggers alone."""
        if self.active:
            self._loggers.scalars(values, step)

    @property
    def takes_images(self) -> bool:
        """Whether there is a logger that images are worth making for."""
        return self.active and bool(self._loggers)

    def image(self, name: str, image: ImageBytes, step: int) -> None:
        """An image, for the loggers."""
        if self.active:
            self._loggers.image(name, image, step)

    def corrupt(self, images: Sequence[Corrupt], epoch: int) -> None:
        """List unreadable images that are met for the first time."""
        if not self.active:
            return
        for image in images:
            entry = {
                "epoch": epoch,
                "name": image.name,
                "index": image.index,
                "reason": image.reason,
                "replaced_by": image.replaced_by,
            }
            self._corrupt.write(json.dumps(entry))
        if images:
            warn(
                f"{len(images)} unreadable images replaced (listed in {CORRUPT}), first: {images[0].name}: "
                f"{images[0].reason}"
            )

    def skipped(self, *, step: int, epoch: int, iteration: int, loss: float, images: list[int]) -> None:
        """List a step that changed nothing, with its images by index."""
        if not self.active:
            return
        value = loss if math.isfinite(loss) else None
        entry = {"step": step, "epoch": epoch, "iteration": iteration, "loss": value, "pictures": images}
        self._skipped.write(json.dumps(entry))
        warn(f"step {step} skipped: its loss ({loss:.4g}) or gradient was not finite, or a spike (listed in {SKIPPED})")

    def sync(self) -> None:
        """Flush what was logged so far to the disk, as far as the disk takes it."""
        if self.active:
            self._metrics.sync()

    def knn(self, line: MetricsLine, epoch: int) -> None:
        """Write the k-NN accuracy at the end of an epoch."""
        if not self.active:
            return
        self._knn = line.knn
        self._write(line)
        self._loggers.scalars({"knn": line.knn}, line.step)
        self.say(f"Epoch {epoch}: k-NN {line.knn:.2f} %")

    def close(self) -> None:
        """Finish the files and the bar."""
        if not self.active:
            return
        self.terminal.close()
        for file in (self._metrics, self._corrupt, self._skipped):
            file.close()
        self._loggers.close()

    def _write(self, line: MetricsLine) -> None:
        self._metrics.write(json.dumps(line.as_dict()))
        self.terminal.json(line.as_dict())

    def _parts(self, line: MetricsLine) -> list[str]:
        return [
            self.terminal.between(line.loss, self.start, self.floor),
            f"k-NN {self._knn:.1f}" if self._knn is not None else "",
            f"{line.images_per_second:.0f} img/s",
            f"wait {100 * line.data_wait:.0f}%",
            f"found {100 * line.retrieval_accuracy:.0f}%",
        ]


class LineFile:
    """A file that lines are appended to; lines that a full or lost disk refuses are kept and retried."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False
        self._file: Any = None

    def write(self, line: str) -> None:
        """Append a line (its end is added), handed to the system at once."""
        self._waiting += line.encode() + b"\n"
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn(f"{self.path.name} cannot be written ({error.strerror or error}); its lines will be written later")

    def sync(self) -> None:
        """Flush the lines to the disk."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite a file of JSON lines with the entries to keep, and return them."""
    if not path.exists():
        return []
    entries, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            entry = json.loads(line)
            if keep(entry):
                entries.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a kill, or of another program
            continue
    if len(entries) < len(lines):
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        os.replace(partial, path)
    return entries


def _parsed(entry: dict[str, Any]) -> MetricsLine | None:
    try:
        return MetricsLine(**{**entry, "knn": None})
    except TypeError:  # of another version
        return None


class Stopwatch:
    """Seconds since the last call, and shares of them."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
