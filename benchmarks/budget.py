"""What ``mocov3 pretrain DIR --budget`` makes of its time: epochs against the plan, waiting, the end, what was learned.

    python benchmarks/budget.py --data DIR --minutes 5 --judge LABELLED     # three seeds, called as a user calls it
    python benchmarks/budget.py --data DIR --minutes 6 --seeds 1 --disturb  # others use the cores for a third of it

Printed for each seed: how long the run took of its budget; the epochs that were planned before the first step, and
those that were done; the share of time that steps waited for images after the first epoch; the run's last line, which
tells whether the schedule came to its end. With ``--judge`` (a folder of class folders) also k-NN accuracy of the last
checkpoint, of the untrained network and of plain pixels: leave-one-out on at most 2,000 images (``mocov3
compare``), with ``--group-by`` by those of other groups.
``--disturb`` keeps as many processes as there are cores busy for the second third of the budget. Results are kept in
``--results`` as they come: what was stopped goes on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from adapt import mocov3

ROOT = Path(__file__).parent.parent
Result = dict[str, Any]


def trained(folder: Path, args: argparse.Namespace, seed: int) -> Result:
    """Run, maybe disturbed; how it went."""
    budget = 60 * args.minutes
    words = f"--budget {args.minutes:g}m --device cpu --seed {seed} --output-dir {folder}"
    command = [sys.executable, "-m", "mocov3", "pretrain", args.data, *words.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as open_yet, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        began = time.monotonic()
        run = subprocess.Popen(command, stdout=output, env=environment)
        if args.disturb:
            time.sleep(budget / 3)
            others = [
                open_yet.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                for _ in range(os.cpu_count() or 1)
            ]
            time.sleep(budget / 3)
            for other in others:
                other.kill()
        code = run.wait()
        took = time.monotonic() - began
        output.seek(0)
        printed = output.read()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    planned = _number(r"^\s+epochs\s+(\d+)", printed)
    return {
        "took": took,
        "code": code,
        "planned": planned,
        "done": (lines[-1]["step"] + 1) / _number(r"(\d+) steps of \d+ an epoch", printed),
        "waited": _share_waited([line for line in lines if line["epoch"]]),
        "end": printed.splitlines()[-1],
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    assert found, text
    return int(found[1])


def _share_waited(lines: Sequence[Result]) -> float:
    """Of the time of these lines, which are of equally many images each."""
    seconds = [1 / line["images_per_second"] for line in lines]
    waited = sum(s * line["data_wait"] for s, line in zip(seconds, lines, strict=True))
    return waited / sum(seconds) if lines else float("nan")


def judged(folder: Path, labelled: str, group_by: str) -> Result:
    """k-NN accuracy of the last checkpoint, of the network untrained and of pixels, in %."""
    last = max(folder.glob("checkpoint_*.pth.tar"), key=lambda file: file.stat().st_mtime)
    groups = ["--group-by", group_by] if group_by else []
    output, _ = mocov3("compare", last, labelled, "--json", *groups, threads=str(os.cpu_count()))
    return {row["kind"]: row["knn"] for row in map(json.loads, output.splitlines()) if "knn" in row}


def table(results: dict[str, Result]) -> str:
    """A line a seed, in Markdown."""
    names = [name for name in ("pixels", "untrained", "checkpoint") if all(name in r for r in results.values())]
    heads = [
        "seed",
        "seconds",
        "epochs planned",
        "done",
        "waited after the first, %",
        *(f"{n}: k-NN, %" for n in names),
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for seed, r in results.items():
        cells = [seed, f"{r['took']:.0f}", f"{r['planned']}", f"{r['done']:.1f}", f"{100 * r['waited']:.1f}"]
        lines.append(f"| {' | '.join(cells + [f'{r[name]:.1f}' for name in names])} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="images to train on")
    parser.add_argument("--minutes", type=float, default=6.0, help="the budget")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge", default="", metavar="LABELLED", help="images in class folders")
    parser.add_argument("--group-by", default="", metavar="GROUPS", help="judge by images of other groups")
    parser.add_argument("--disturb", action="store_true", help="for the second third of the budget")
    parser.add_argument("--results", type=Path, default=Path("budget.json"))
    args = parser.parse_args()
    results: dict[str, Result] = json.loads(args.results.read_text()) if args.results.exists() else {}
    budget = 60 * args.minutes
    for seed in map(str, range(args.seeds)):
        if seed not in results:
            with tempfile.TemporaryDirectory() as folder:
                results[seed] = trained(Path(folder, "run"), args, int(seed))
                if args.judge:
                    results[seed] |= judged(Path(folder, "run"), args.judge, args.group_by)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
        result = results[seed]
        off = 100 * (result["took"] / budget - 1)
        print(f"seed {seed}: {result['took']:.0f} s of {budget:.0f} s ({off:+.1f} %), exit code {result['code']}")
        print(result["end"], flush=True)
    print("\n" + table(results))


if __name__ == "__main__":
    main()
