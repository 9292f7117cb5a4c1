"""What a run shows on the terminal: one bar, or short lines where output goes to a file. Every task shows through here.

A style is one of ``bar`` (a bar on a terminal, else a line now and then), ``lines`` (the reference's log lines),
``json`` (metrics lines on standard output, all else on standard error) and ``quiet`` (warnings and the result only).
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mocov3.errors import lenient_output
from mocov3.metrics import JsonLine

STYLES = ("bar", "lines", "json", "quiet")
WIDTH = 80
"""Columns that lines in a file keep to."""
_LEAST_BAR, _REFRESH = 6, 4


class Terminal:
    """Shows one run. Where it is not active, every call does nothing.

    Args:
        style: see above.
        epochs: of the whole run.
        iterations: of an epoch.
        done: steps of a former run.
        active: whether this rank shows anything.
    """

    def __init__(self, style: str, *, epochs: int, iterations: int, done: int = 0, active: bool = True) -> None:
        self.style, self.active = style, active
        self.epochs, self.iterations = epochs, iterations
        self.clock = Clock(epochs * iterations, done)
        self.parts: Sequence[str] = ()
        lenient_output()  # ranks that were started have streams of their own
        self._arrow = "→" if _can_print("→") else ">"
        self._live: Any = None
        # a terminal that cannot move its cursor gets lines
        self.moves = sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")

    def say(self, text: str) -> None:
        """A line of explanation, at the beginning or end of things."""
        if self.active and self.style != "quiet":
            self._print(text)

    def result(self, text: str) -> None:
        """What the run comes to: a line that every style shows."""
        if self.active:
            self._print(text)

    def line(self, text: str) -> None:
        """One of the reference's lines."""
        if self.active and self.style == "lines":
            print(text, flush=True)

    def json(self, values: JsonLine) -> None:
        """A line of metrics as JSON."""
        if self.active and self.style == "json":
            print(json.dumps(values), flush=True)

    def advance(self, done: int) -> None:
        """So many steps of the whole run are done; the bar moves."""
        if not self.active or self.style != "bar":
            return
        self.clock.advance(done)
        if self.moves:
            self._start()

    def expect(self, steps: int) -> None:
        """The whole run is so many steps long, as far as is known now."""
        self.clock.total, self.epochs = steps, math.ceil(steps / max(self.iterations, 1))

    def status(self, parts: Sequence[str]) -> None:
        """How the run stands, from the most important part to the least; what finds no room is left out."""
        if not self.active or self.style != "bar":
            return
        self.parts = parts
        if self.moves:
            self._start()
        else:
            share = f"{100 * self.clock.done // max(self.clock.total, 1)}%"
            print(fit([self.epoch, share], parts, [self.clock.left], WIDTH), flush=True)

    def between(self, loss: float, start: float, floor: float) -> str:
        """A loss with its start and floor."""
        return f"loss {loss:.3f} ({start:.1f}{self._arrow}{floor:.1f})"

    @property
    def epoch(self) -> str:
        """Number of the running epoch, from 1."""
        return f"epoch {min(max(self.clock.done - 1, 0) // max(self.iterations, 1) + 1, self.epochs)}/{self.epochs}"

    def close(self) -> None:
        """Leave the bar as it stands, and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        if self.style == "json":
            print(text, file=sys.stderr, flush=True)
        elif self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _start(self) -> None:
        if self._live is not None:
            return
        from rich.live import Live

        # standard error that goes elsewhere stays there
        self._live = Live(_Bar(self), refresh_per_second=_REFRESH, redirect_stderr=sys.stderr.isatty())
        self._live.start(refresh=True)  # drawn at once: what is said while a thread draws the first row lands behind it

    def row(self, width: int) -> tuple[str, int, str]:
        """What stands left of the bar, the columns left for it, what stands right of it."""
        tail = fit([], self.parts, [self.clock.left], width - len(self.epoch) - _LEAST_BAR - 2)
        return self.epoch, width - len(self.epoch) - len(tail) - 2, tail


def style_of(*, quiet: bool, json: bool, script_door: bool) -> str:
    """The style that flags and door ask for."""
    return "quiet" if quiet else "json" if json else "lines" if script_door else "bar"


class Clock:
    """How far a run is, and how long it will take: at the mean speed of this process, its first step apart.

    Args:
        total: steps of the whole run.
        done: steps of a former run.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._first: tuple[int, float] | None = None
        self._now = 0.0

    def advance(self, done: int, now: float | None = None) -> None:
        """So many steps are done at ``now`` (seconds of any clock)."""
        self.done, self._now = done, time.monotonic() if now is None else now
        if self._first is None:
            self._first = (done, self._now)

    @property
    def left(self) -> str:
        """Time left, as 0:12:33 or 2 d 03:10; -:--:-- until it is known."""
        if self._first is None or self.done <= self._first[0]:
            return "-:--:--"
        steps, seconds = self.done - self._first[0], self._now - self._first[1]
        return duration(max(self.total - self.done, 0) * seconds / steps)


def duration(seconds: float) -> str:
    """``0:12:33``; from two days on ``2 d 03:10``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"


def fit(head: Sequence[str], parts: Sequence[str], tail: Sequence[str], width: int) -> str:
    """Head, as many of the parts as fit into ``width`` columns, tail, with spaces between."""
    shown: list[str] = []
    for part in parts:
        if part and len(" ".join([*head, *shown, part, *tail])) <= width:
            shown.append(part)
    return " ".join([*head, *shown, *tail])


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class _Bar:
    """The row as rich draws it: rebuilt at every refresh, for the terminal's present width."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal

    def __rich_console__(self, console: object, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head, bar, tail = self.terminal.row(options.max_width)
        clock = self.terminal.clock
        row = Table.grid(padding=(0, 1))
        cells: list[Any] = [Text(head, no_wrap=True), Text(tail, no_wrap=True, overflow="crop")]
        if bar >= _LEAST_BAR:
            cells.insert(1, ProgressBar(total=max(clock.total, 1), completed=clock.done, width=bar))
        row.add_row(*cells)
        yield row
