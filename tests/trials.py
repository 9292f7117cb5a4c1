"""How often a test of reliability tries: a few times in the suite, many in ``make soak``, which keeps the count."""

import json
import os
from pathlib import Path

SOAK = bool(os.environ.get("MOCOV3_SOAK"))
PATIENCE = 10 if SOAK else 1
"""Factor of the time that a process may take: a soak of hours shares its machine."""
_RECORD = os.environ.get("MOCOV3_RELIABILITY")


def trials(suite: int, soak: int) -> int:
    """Number of trials: ``soak`` under ``make soak``, else ``suite``. MOCOV3_SOAK=0.1 does a tenth of the soak."""
    share = float(os.environ.get("MOCOV3_SOAK") or 0)
    return max(suite, round(soak * share)) if share else suite


def record(promise: str, count: int, outcome: str) -> None:
    """Add a row to the table of docs/reliability.md, where MOCOV3_RELIABILITY names the file of rows."""
    if _RECORD:
        with Path(_RECORD).open("a") as file:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
            file.write(json.dumps({"promise": promise, "trials": count, "outcome": outcome, "test": test}) + "\n")


def passed() -> set[str]:
    """Tests that a former soak has recorded in the same file (``benchmarks/soak.py --keep``)."""
    if not _RECORD or not Path(_RECORD).exists():
        return set()
    return {json.loads(line)["test"] for line in Path(_RECORD).read_text().splitlines()}
