"""Reliability, at length: every test of faults with many trials, and the table of docs/reliability.md.

    make soak                                     # hours
    python benchmarks/soak.py --share 0.1         # a tenth of the trials
    python benchmarks/soak.py --keep soak.jsonl   # can be stopped: what has passed is in the file and not run again

Runs the tests of the suite (tests/trials.py says how often they try), then fuzzes the readers of images and of
checkpoints by coverage (atheris, where it is installed), and writes the counts into docs/reliability.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: make soak -->\n", "<!-- end of table -->"
TESTS = [
    "tests/pretraining/test_killing.py",
    "tests/pretraining/test_faults.py",
    "tests/weights/test_fuzz.py",
    "tests/test_fuzz_files.py",
]


def main() -> int:
    """Run, count, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials to do")
    parser.add_argument("--keep", default="", help="file of what has passed, at this share")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(args.keep).absolute() if args.keep else Path(folder) / "rows.jsonl"
        environment = {**os.environ, "MOCOV3_SOAK": str(args.share), "MOCOV3_RELIABILITY": str(rows)}
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=0", "-p", "no:xdist", *TESTS]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        table = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    runs = max(round(20_000 * args.share), 100)
    fuzzer = [sys.executable, str(ROOT / "tests" / "coverage_fuzz.py"), f"-runs={runs}", "-max_len=4096"]
    done = subprocess.run(fuzzer, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        table.append(
            {
                "promise": "images and checkpoints fuzzed by coverage (atheris)",
                "trials": runs,
                "outcome": "no traceback, no hang",
            }
        )
    elif done.returncode == 3:  # tests/coverage_fuzz.py: atheris is not installed
        print(done.stdout, end="")
    else:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
        code = code or done.returncode
    lines = ["| promise | trials | outcome |", "|---|---|---|"]
    lines += [f"| {row['promise']} | {row['trials']} | {row['outcome']} |" for row in table]
    seconds = time.monotonic() - began
    lines += [
        "",
        f"`python benchmarks/soak.py --share {args.share:g}`, {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; "
        f"{'all passed' if code == 0 else 'with failures'}.",
    ]
    print("\n".join(lines))
    if code == 0:
        text = PAGE.read_text()
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])
    return code


if __name__ == "__main__":
    sys.exit(main())
