"""What decoding libraries say of files (warnings, lines of a log): kept for whoever counts it, never printed."""

import contextlib
import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import _imaging

from mocov3.errors import printable

_LOGGERS = ("PIL.TiffImagePlugin", "tifffile", "pydicom", "pylibjpeg")
_MODULES = r"(PIL|pillow_heif|pillow_jxl|tifffile|pydicom|pylibjpeg|openjpeg|libjpeg)\b"
_of_thread = threading.local()
_print_warning: Any = warnings.showwarning


def note(text: str) -> None:
    """Keep a remark on the image that this thread decodes; the first one counts."""
    if not getattr(_of_thread, "remark", ""):
        _of_thread.remark = text


def taken() -> str:
    """The first remark since the last call in this thread, fit to print, or nothing."""
    text, _of_thread.remark = getattr(_of_thread, "remark", ""), ""
    return printable(text)[:200]


@contextlib.contextmanager
def kept(*, dropped: bool = False) -> Iterator[None]:
    """What libraries say in this thread meanwhile is noted. Other threads, and other modules, are not touched.

    With ``dropped`` it is not even noted: of files whose words are nobody's business.
    """
    global _print_warning
    if warnings.showwarning is not _show:  # not yet, or undone by a ``catch_warnings`` that ended
        _print_warning, warnings.showwarning = warnings.showwarning, _show
        warnings.filterwarnings("always", module=_MODULES)
    _listen()
    before, _of_thread.listens = getattr(_of_thread, "listens", False), True
    words = getattr(_of_thread, "remark", "")
    try:
        yield
    finally:
        _of_thread.listens = before
        if dropped:
            _of_thread.remark = words


class Tally:
    """Images that something was remarked of, each counted once."""

    def __init__(self) -> None:
        self._seen = bytearray()
        self._first = (0, "")

    def add(self, remarked: Iterable[tuple[int, str]], images: int) -> None:
        """Count (index, remark) of some of ``images``."""
        for remark in remarked:
            self._first = min(self._first, remark) if self._seen else remark
            self._seen = self._seen or bytearray(images)
            self._seen[remark[0]] = 1

    def say(self, name: Callable[[int], str], say: Callable[[str], None]) -> None:
        """Say how many there were since the last call, and the first of them; nothing where there was none."""
        if count := sum(self._seen):
            index, text = self._first
            say(f"data: {count} images were read with remarks, first: {printable(name(index))}: {text}")
        self._seen = bytearray()


def _show(message: Warning | str, *where: object, **more: object) -> None:
    if getattr(_of_thread, "listens", False):
        note(str(message))
    else:
        _print_warning(message, *where, **more)


def _dropped(record: logging.LogRecord) -> bool:
    if not getattr(_of_thread, "listens", False):
        return True
    note(record.getMessage())
    return False


@functools.cache
def _listen() -> None:
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_dropped)
    # libtiff prints what Pillow then raises, and tags that it passes over; its handler is reached through Pillow's
    # library where it is a shared one of its own
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(_imaging.__file__)
        for handler in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
