"""Fuzz the readers of images and checkpoints by coverage: ``python tests/coverage_fuzz.py -runs=10000`` (atheris)."""

import contextlib
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    print("atheris is not installed")
    sys.exit(3)  # libFuzzer's own codes, 77 among them, are findings

with atheris.instrument_imports(include=["mocov3", "PIL", "zipfile", "pickletools"]):
    from mocov3.data import TwoViews
    from mocov3.data.views.decode import DecodeError
    from mocov3.errors import UserError
    from mocov3.weights.vetting import vet

FILE = Path(tempfile.mkdtemp()) / "file"
VIEWS = TwoViews(16)


def one(data):
    """The first byte says which reader gets the rest."""
    if data[:1] < b"\x80":
        with contextlib.suppress(DecodeError):
            VIEWS(data[1:], seed=0, epoch=0, index=0)
        return
    FILE.write_bytes(data[1:])
    # tensorfiles.read turns what the standard library raises on other bytes into one line
    with contextlib.suppress(UserError, ValueError, IndexError, KeyError, TypeError, EOFError):
        vet(FILE)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
