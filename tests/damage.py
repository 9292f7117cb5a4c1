"""How files of any kind are damaged for the tests, from a number alone."""

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)


class Kind(NamedTuple):
    """How files of a kind are made and read."""

    whole: Callable[[], dict[str, bytes]]
    """Name of a file → bytes of whole ones, to damage."""
    change: Callable[[random.Random, str, bytes], bytes]
    read: Callable[[Path], None]
    mebibytes: int
    """By which memory may grow while files are read."""


def damaged(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a few changes: bits, numbers of all sizes, parts left out, repeated or moved, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        size = len(changed)
        at = rng.choice((rng.randrange(size + 1), rng.randrange(min(size, 512) + 1), max(0, size - rng.randrange(512))))
        length = rng.choice((1, 2, 4, 8, 16, 100, 512))
        what = rng.randrange(8)
        if what == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif what in (2, 3):
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((*NUMBERS, size, size + 1, rng.getrandbits(64))) % (1 << 8 * width)
            changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif what == 4:
            del changed[at : at + length]
        elif what == 5:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 1, 3))
        elif what == 6:
            begin = rng.randrange(size + 1)
            changed[at : at + length] = changed[begin : begin + length]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def take_all(steps: list[Callable[[], Any]]) -> None:
    """Take every step, also after one that was refused; the first says whether the file is read."""
    from mocov3.data.views.decode import DecodeError
    from mocov3.errors import UserError

    for step in steps[1:]:
        with contextlib.suppress(UserError, DecodeError):
            step()
    steps[0]()
