"""The one exception that is the user's to fix: printed as one line, exit code 2, never a traceback."""

import io
import os
import signal
import sys
from difflib import get_close_matches
from typing import Any, ClassVar

_LONGEST = 2000  # characters of a message; a file may have names and lines of any length


KEEP_YOURS = 3
"""Exit code of a run that ended well and whose result is: keep the weights you have."""


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and how to fix it."""

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RankLost(Exception):
    """Another rank is lost. The message is one line; the run can be resumed from its last checkpoint."""

    exit_code: ClassVar[int] = 1


def stopped_by(number: int) -> int:
    """The exit code of a process that a signal of this number ended, or told to end."""
    return 128 + number


def stop_signals() -> list[int]:
    """Signals that ask a run for a checkpoint and its end, as far as this system has them.

    SIGHUP comes when the terminal is closed; ``nohup`` has it ignored, and ignored it stays.
    """
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        names.append("SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def one_line(text: str) -> str:
    """``text`` as a line fit to print; of one that is too long to be read the middle is left out."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def printable(text: str) -> str:
    """``text`` with control and undecodable characters escaped, so that no name can forge output lines."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """What went wrong, without the number and the file that Python puts beside it."""
    return str(getattr(error, "strerror", None) or error)


def no_file(path: str | os.PathLike[str]) -> str:
    """Why a file that is named cannot be read, where it is not a plain file; to go behind its name."""
    if os.path.isdir(path):
        return "is a folder; name the file in it"
    return "is a pipe, socket or device, not a plain file" if os.path.exists(path) else "there is no such file"


_NATURES = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file: git lfs pull"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"BZh", "is compressed by bzip2: unpack it"),
    (b"\xfd7zXZ\0", "is compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard: unpack it"),
    (b"PK\3\4", "is a ZIP archive: unpack it"),
    (b"<!doctype html", "is a web page: fetch it again"),
    (b"<html", "is a web page: fetch it again"),
    (b"%PDF", "is a PDF"),
)


def nature(head: bytes) -> str:
    """What a file is, by its first bytes, where it is often met in another's place; else ''."""
    return next((text for start, text in _NATURES if head[:32].lstrip().lower().startswith(start.lower())), "")


class _Lenient(io.FileIO):
    """A standard stream whose reader, disk or terminal may be gone."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write ``data``, or remember why it was lost."""
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            return len(data)


def lenient_output() -> None:
    """Keep the standard streams from ending a run: closed ones, lost ones, encodings that lack → (shown as ? there)."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file to be opened would be standard output
        os.set_inheritable(file, True)
    os.close(file)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            raw = getattr(stream.buffer, "raw", stream.buffer)
            if type(raw) is not io.FileIO or raw.fileno() != number:  # a console, or what tests put in its place
                stream.reconfigure(errors="replace")
                continue
            stream.flush()
        elif stream is not None:
            continue
        encoding, at_once = (
            (stream.encoding, stream.line_buffering or stream.write_through) if stream else ("utf-8", True)
        )
        lenient = io.BufferedWriter(_Lenient(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(lenient, encoding, "replace", line_buffering=at_once))


def lost_output() -> OSError | None:
    """Why some of what was printed is lost, if it is."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)


def nearest(name: str, known: list[str]) -> str:
    """A hint that names the known names nearest to ``name``."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
