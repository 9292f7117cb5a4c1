"""Damaged and forged files of every kind that is read, one after the other in a process of its own.

``python tests/fuzzing.py KIND FIRST COUNT FOLDER`` reads the files number FIRST, FIRST + 1 … of a kind: each is made by
its number alone, so one that fails is made again by ``… KIND NUMBER 1 FOLDER`` and lies as FOLDER/input* after it. The
process ends by a traceback where a reader lets through another error than its own, by a signal where a library
crashes, by a stack dump where one file takes too long, and by a message where memory grows or something is looked up
that has no business there.
"""

import faulthandler
import json
import os
import random
import resource
import sys
from pathlib import Path

from damage import Kind
from damaged_data import DATA
from damaged_weights import WEIGHTS, watch

SECONDS = 20
"""That one file may take; whole ones take milliseconds, but the machine may be busy."""
KINDS = {**DATA, **WEIGHTS}


def main(kind_name: str, first: int, count: int, folder: Path) -> None:
    """Read the files, and print how many were refused and how many read."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    from mocov3.data.views.decode import DecodeError
    from mocov3.errors import UserError

    kind = KINDS[kind_name]
    whole = kind.whole()
    for name, data in whole.items():  # all that reading imports and keeps
        _tried(kind, folder / f"whole-{name}", data, (UserError, DecodeError))
    if kind_name == "weights":
        watch()
    refused, begin = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + count):
        rng = random.Random(f"{kind_name} {number}")
        name = rng.choice(list(whole))
        path = folder / f"input-{name}"
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        data = kind.change(rng, name, whole[name])
        (folder / "number").write_text(f"{number} {name}")
        refused += _tried(kind, path, data, (UserError, DecodeError, OSError))
        faulthandler.cancel_dump_traceback_later()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) // 1024
        if grown > kind.mebibytes:
            sys.exit(f"{kind_name} {number} ({name}): memory grew by {grown} MiB")
        path.unlink(missing_ok=True)
    print(json.dumps({"refused": refused, "read": count - refused, "grown": grown}))


def _tried(kind: Kind, path: Path, data: bytes, refusals: tuple[type[Exception], ...]) -> bool:
    path.write_bytes(data)
    try:
        kind.read(path)
    except refusals as error:
        assert str(error)
        assert "\n" not in str(error), error
        return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
