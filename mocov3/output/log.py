"""What the output of every run is made of: terminal, files of JSON lines, loggers, the time of steps; and warnings.

Each task has a log of its own, which adds what its lines say.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from mocov3.config import RunConfig, logger_names
from mocov3.data.loading.slots import Corrupt
from mocov3.errors import printable
from mocov3.metrics import JsonLine, Meter, Progress, plain
from mocov3.output.loggers import Loggers
from mocov3.output.terminal import Terminal, style_of

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


@dataclass(frozen=True)
class Session:
    """What one process does of a run, as far as its output must know it."""

    iterations: int
    """Steps of an epoch."""
    first_epoch: int = 0
    first_step: int = 0
    """Where the process begins; what a former one wrote of later steps is cut off."""
    writes: bool = True
    """Whether this rank writes files."""
    shows: bool = True
    """Whether it shows anything."""
    script_door: bool = False
    """Whether one of the reference's scripts was called, whose lines are then shown."""


class Log:
    """Output of one run. On ranks that do not write, every call does nothing.

    Args:
        config: of the run; loggers are told all of it.
        session: what this process does of it.
        meters: of the reference's line, behind those of the time.
    """

    def __init__(self, config: RunConfig, session: Session, meters: Sequence[Meter]) -> None:
        self.folder, self.writes = Path(config.output_dir), session.writes
        style = style_of(quiet=config.quiet, json=config.json, script_door=session.script_door)
        iterations, first_step = session.iterations, session.first_step
        self.terminal = Terminal(
            style, epochs=config.epochs, iterations=iterations, done=first_step, active=session.shows
        )
        self._time, self._data = Meter("Time", "6.3f"), Meter("Data", "6.3f")
        self._meters = [self._time, self._data, *meters]
        self._progress = Progress(iterations, self._meters)
        self._clock, self._epoch, self._waited = Stopwatch(), -1, 0.0
        self._images = self._seconds = self._waiting = 0.0  # since the last line
        self._files: list[LineFile] = []
        names = logger_names(config.logger) if session.writes else ()
        quiet = style == "quiet"
        self.loggers = Loggers(names, self.folder, config=vars(config), first_step=first_step, quiet=quiet, warn=warn)

    def open(self, name: str, keep: Callable[[JsonLine], bool]) -> tuple["LineFile", list[JsonLine]]:
        """A file of the run's folder to write lines to, and the lines of a former run, those to keep."""
        lines = cut(self.folder / name, keep) if self.writes else []
        self._files.append(LineFile(self.folder / name if self.writes else None))
        return self._files[-1], lines

    def say(self, text: str) -> None:
        """A line of explanation, at the beginning or end of things."""
        self.terminal.say(text)

    def result(self, text: str) -> None:
        """What the run comes to."""
        self.terminal.result(text)

    def batch_came(self) -> None:
        """A batch has arrived; the time since the last step was spent waiting for it."""
        self._waited = self._clock.lap()

    def step_ended(self, epoch: int, step: int, images: int) -> None:
        """A step over so many images has ended; averages are those of its epoch, as in the reference."""
        if epoch != self._epoch:
            self._epoch = epoch
            for meter in self._meters:
                meter.total, meter.count = 0.0, 0
        seconds = self._waited + self._clock.lap()
        self._time.update(seconds)
        self._data.update(self._waited)
        self._images += images
        self._seconds += seconds
        self._waiting += self._waited
        self.terminal.advance(step + 1)

    def restart_clock(self) -> None:
        """Time from here: what went before was not training."""
        self._clock.lap()

    def speed(self) -> tuple[float, float]:
        """Images a second, and the share of the time spent waiting for them, since the last call."""
        seconds = max(self._seconds, 1e-9)
        speed = self._images / seconds, self._waiting / seconds
        self._images = self._seconds = self._waiting = 0.0
        return speed

    def sync(self) -> None:
        """Flush what was logged so far to the disk, as far as the disk takes it."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        """Finish files, loggers and bar."""
        self.terminal.close()
        for file in self._files:
            file.close()
        self.loggers.close()

    def _write(self, file: "LineFile", values: Mapping[str, object]) -> None:
        """A line for a file and for who reads JSON on standard output."""
        file.write(values)
        self.terminal.json(plain(values))


class TrainingLog(Log):
    """Output of a run that trains a network: ``metrics.jsonl``, and the unreadable images that were replaced.

    Args:
        config: of the run.
        session: what this process does of it.
        corrupt: indices of the unreadable images met by a former process.
    """

    def __init__(self, config: RunConfig, session: Session, corrupt: Container[int] = ()) -> None:
        self._lr, self._loss = Meter("LR", ".4e"), Meter("Loss", ".4e")
        super().__init__(config, session, [self._lr, self._loss])
        # a resumed run continues from its checkpoint: what was logged after it never happened
        self._metrics, self.former = self.open(METRICS, lambda line: line["step"] < session.first_step)
        self._corrupt, _ = self.open(CORRUPT, lambda line: line["index"] in corrupt)

    def corrupt(self, images: Sequence[Corrupt], epoch: int) -> None:
        """List unreadable images that are met for the first time."""
        for image in images:
            self._corrupt.write({"epoch": epoch, **asdict(image)})
        if images and self.writes:
            warn(
                f"{len(images)} unreadable images replaced (listed in {CORRUPT}), first: {images[0].name}: "
                f"{images[0].reason}"
            )

    def last_known(self, name: str) -> float | None:
        """The last value of a number that few lines have, in lines of a former process."""
        return next((line[name] for line in reversed(self.former) if isinstance(line.get(name), float)), None)


class LineFile:
    """A file that JSON lines are appended to; lines that a full or lost disk refuses are kept and retried.

    Args:
        path: the file; ``None`` on ranks that do not write.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False
        self._file: BinaryIO | None = None

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line, handed to the system at once."""
        if self.path is None:
            return
        self._waiting += json.dumps(plain(values)).encode() + b"\n"
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


def cut(path: Path, keep: Callable[[JsonLine], bool]) -> list[JsonLine]:
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


class Stopwatch:
    """Seconds since the last call, and shares of them."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
