"""Whether a run ends with its budget while others use the cores.

    python benchmarks/disturbed.py --data DIR --minutes 6

``mocov3 pretrain DIR --budget`` as a user calls it; for the second third of the budget as many processes as there are
cores keep them busy. Printed: how long the run took of its budget, and its last line, which tells whether the schedule
came to its end (as many epochs as in the end were expected).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Run, disturb, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="images to train on")
    parser.add_argument("--minutes", type=float, default=6.0, help="the budget")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    budget = 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder, ExitStack() as busy:
        words = f"--budget {args.minutes:g}m --device cpu --seed {args.seed} --output-dir {folder}/run"
        command = [sys.executable, "-m", "mocov3", "pretrain", args.data, *words.split()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        began = time.monotonic()
        output = busy.enter_context(Path(folder, "output").open("w+", encoding="utf-8"))
        run = subprocess.Popen(command, stdout=output, env=environment)
        time.sleep(budget / 3)
        others = [
            busy.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            for _ in range(os.cpu_count() or 1)
        ]
        time.sleep(budget / 3)
        for other in others:
            other.kill()
        code = run.wait()
        took = time.monotonic() - began
        output.seek(0)
        print(output.read().splitlines()[-1])
    print(f"took {took:.0f} s of {budget:.0f} s ({100 * (took / budget - 1):+.1f} %), exit code {code}")


if __name__ == "__main__":
    main()
