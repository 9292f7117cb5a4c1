"""The one exception that is the user's to fix: printed as one line, exit code 2, never a traceback."""

import io
import sys
from difflib import get_close_matches
from typing import ClassVar


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to fix it."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class RankLost(Exception):
    """Another rank is lost. The message is one line; the run can be resumed from its last checkpoint."""

    exit_code: ClassVar[int] = 1


def stopped_by(signal: int) -> int:
    """The exit code of a process that a signal of this number ended, or told to end."""
    return 128 + signal


def printable(text: str) -> str:
    """``text`` with control and undecodable characters escaped, so that no name can forge output lines."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def lenient_output() -> None:
    """Keep characters that an old encoding lacks from ending a run: → is shown as ? there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def nearest(name: str, known: list[str]) -> str:
    """A hint that names the known names nearest to ``name``."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
