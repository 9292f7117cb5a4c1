"""Which tests ``make test-fast`` leaves out, from a run of the suite: writes tests/recorded/slow.txt.

    python -m pytest -q --durations=0 -n 2 --dist loadfile --no-loadscope-reorder > run.txt
    python tools/slow_tests.py run.txt --seconds 1.5

A test is slow if it and what it alone sets up took longer, on the machine the list is made on; its name stands without
parameters, so that all its cases count as one.
"""

import argparse
import collections
import re
import sys
from pathlib import Path

LIST = Path(__file__).parent.parent / "tests" / "recorded" / "slow.txt"
_LINE = re.compile(r"^\s*([\d.]+)s (call|setup|teardown)\s+(\S+)")


def main() -> int:
    """Write the list and say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output of pytest --durations=0")
    parser.add_argument("--seconds", type=float, default=1.5, help="longest that a quick test may take (default 1.5)")
    args = parser.parse_args()
    longest: dict[str, float] = {}
    seconds: dict[str, float] = collections.defaultdict(float)
    for line in args.run.read_text(encoding="utf-8").splitlines():
        if match := _LINE.match(line):
            node = match[3].split("[", 1)[0]
            seconds[node] += float(match[1])
            longest[node] = max(longest.get(node, 0.0), float(match[1]))
    if not longest:
        sys.exit(f"{args.run}: holds no durations; run pytest with --durations=0")
    slow = sorted(node for node, value in longest.items() if value > args.seconds)
    LIST.write_text("\n".join(slow) + "\n", encoding="utf-8")
    rest = sum(value for node, value in seconds.items() if node not in set(slow))
    print(
        f"{len(slow)} tests are slow; {len(longest) - len(slow)} that show in the run are quick and took {rest:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
