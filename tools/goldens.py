"""The golden tests under several sets of instructions: which pass, and how far float32 is from the recorded numbers.

python tools/goldens.py [--runs float32|all|suite] [SETTING …]

Every setting runs all golden tests (``tests/**/test_golden_*.py``: A to H, L, M) in a process of its own. ``all`` adds
every run in float64, which does not depend on the processor; it takes long, so only the first setting gets it unless
``--runs`` says otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from goldens import FIGURES  # noqa: E402
from processors import SETTINGS  # noqa: E402


def largest(figures: Path) -> list[str]:
    """A line for every family, arithmetic and quantity: largest deviation, bound, where."""
    worst: dict[tuple[str, str, str], tuple[float, float, str]] = {}
    for line in figures.read_text().splitlines() if figures.exists() else []:
        entry = json.loads(line)
        family, dtype = entry["of"][0], "float64" if "float64" in entry["of"] else "float32"
        for quantity, (value, bound) in entry["deviations"].items():
            before = worst.get((family, dtype, quantity), (-1.0, 1.0, ""))
            if value / bound > before[0] / before[1]:
                worst[family, dtype, quantity] = (value, bound, entry["of"])
    return [
        f"    {family} {dtype} {quantity:18} {value:8.1e} of {bound:8.1e}   {of}"
        for (family, dtype, quantity), (value, bound, of) in sorted(worst.items())
    ]


def run(setting: str, runs: str) -> bool:
    """Run all golden tests under a setting and print what came of it; whether all passed."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        environment = {**os.environ, **SETTINGS[setting], "GOLDEN_RUNS": runs, FIGURES: str(figures)}
        tests = sorted(str(path) for path in (ROOT / "tests").rglob("test_golden_*.py"))
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=line",
            "--timeout=3600",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        words = done.stdout.strip().splitlines() or [done.stderr]
        print(f"{setting} ({runs}; {time.monotonic() - began:.0f} s): {words[-1]}", flush=True)
        print("\n".join([f"    {w}" for w in words if w.startswith("FAILED")] + largest(figures)), flush=True)
    return done.returncode == 0


def main() -> int:
    """Run what the command line asks for; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--runs", choices=("suite", "float32", "all"), help="which runs (see tests/goldens.py)")
    given = parser.parse_args()
    names = given.settings or list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    passed = [run(name, given.runs or ("float32" if i else "all")) for i, name in enumerate(names)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
