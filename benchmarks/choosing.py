"""Which checkpoint of a run to keep, chosen without labels: measures against "the last one" and the training loss.

    python benchmarks/choosing.py --kind photographs=CIFAR10/train.parquet:0.2,CIFAR10/test.parquet \\
        --kind clothes=fashion-mnist,fashion-mnist --kind drawings=OUT/drawings,OUT/drawings,OUT/drawings-all.csv
    python benchmarks/choosing.py --rehearse

A kind of images is NAME=TRAIN,JUDGED[,LABELS]: what two runs each train on, labelled images to judge by, and a list of
their labels where they do not know them (``benchmarks/own_images.py`` makes drawings). One run has the recipe of
CPUs, the other nearly whole crops, which overfits. ``CHECKPOINTS`` of every run are judged by ``mocov3 compare``:
k-NN is leave-one-out on at most 2,000 images, measures are of the same images without their labels.

Within every run each measure chooses a checkpoint. Regret is how many points of k-NN its choice has less than the best
checkpoint. The measure that has the least regret on two kinds is judged on the third. Runs and their judgements are
kept in ``--out``; what is there is not made again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from adapt import mocov3

from mocov3.data import open_source
from mocov3.weights.checkpoint import listed

Judged = dict[str, Any]
CHECKPOINTS = 12
RECIPES = {"recipe": ["--crop-min", ".2"], "whole crops": ["--crop-min", ".8", "--lr", "2e-2"]}
COMMON = "-a resnet10_w16 --image-size 32 --recipe defaults --optimizer adamw -b 128 --lr 8e-3 --wd .05 --moco-t .2"
COMMON += " --moco-m-cos --moco-dim 128 --moco-mlp-dim 512 --warmup-epochs 1 --seed 0 --logger none --quiet -j 0"
PICKS: dict[str, Callable[[Judged], float]] = {
    "last checkpoint": lambda row: row["step"],
    "training loss": lambda row: -row["loss"],
    "share found again": lambda row: row["retrieval"],
    "RankMe": lambda row: row["rankme"],
    "α-ReQ nearest 1": lambda row: -abs(row["alpha"] - 1),
    "LiDAR": lambda row: row["lidar"],
    "alignment": lambda row: -row["alignment"],
    "uniformity": lambda row: -row["uniformity"],
    "IdEst, smallest": lambda row: -row["dimension"],
    "IdEst, largest": lambda row: row["dimension"],
}
"""What chooses → larger is better."""
PLAIN = ("last checkpoint", "training loss")
"""What a measure must beat."""


def run(folder: Path, kind: Sequence[str], recipe: Sequence[str], seen: int, more: Sequence[str]) -> list[Judged]:
    """Train until so many images are seen, and judge the checkpoints."""
    train, images, *labels = kind
    epochs = CHECKPOINTS * max(round(seen / len(open_source(train, "train")) / CHECKPOINTS), 1)
    flags = [*COMMON.split(), *recipe, *more, "--epochs", epochs, "--checkpoint-every", epochs // CHECKPOINTS]
    mocov3("pretrain", train, *flags, "--output-dir", folder, "--resume", "auto")
    files = [file for file in listed(folder) if file.suffixes[-2:] == [".pth", ".tar"]]
    out, _ = mocov3("compare", *files, images, "--json", "-j", 0, *(["--labels", labels[0]] if labels else []))
    losses = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        losses.setdefault(line["epoch"], []).append(line["loss"])
    rows = []
    for row in map(json.loads, out.splitlines()):
        if row["kind"] == "checkpoint":
            epoch = int(Path(row["name"]).name.split("_")[1].split(".")[0])
            rows.append({**row, "step": epoch, "loss": mean(losses[epoch])})
    return rows


def regret(rows: Sequence[Judged], pick: str) -> float:
    """Points of k-NN that the pick is below the best checkpoint."""
    return max(row["knn"] for row in rows) - max(rows, key=PICKS[pick])["knn"]


def tables(results: dict[str, dict[str, list[Judged]]]) -> str:
    """Regrets by run, and what two kinds choose for the third, in Markdown."""
    runs = [(kind, name, rows) for kind, by_recipe in results.items() for name, rows in by_recipe.items()]
    spread = [max(r["knn"] for r in rows) - min(r["knn"] for r in rows) for _, _, rows in runs]
    lines = ["| points of k-NN below the best checkpoint of the run | " + " | ".join(f"{k}, {n}" for k, n, _ in runs)]
    lines[0] += " | mean |"
    lines += ["|---|" + "---:|" * (len(runs) + 1)]
    for pick in PICKS:
        regrets = [regret(rows, pick) for _, _, rows in runs]
        lines.append(f"| {pick} | {' | '.join(f'{r:.1f}' for r in regrets)} | {mean(regrets):.2f} |")
    lines.append(f"| best less worst | {' | '.join(f'{s:.1f}' for s in spread)} | {mean(spread):.2f} |")
    lines += ["", "| left out | chosen by the others | its regret there | of the last | of the training loss |"]
    lines += ["|---|---|---:|---:|---:|"]
    for left_out in results:
        others = [rows for kind, _, rows in runs if kind != left_out]
        here = [rows for kind, _, rows in runs if kind == left_out]
        best = min((p for p in PICKS if p not in PLAIN), key=lambda p: mean(regret(rows, p) for rows in others))
        cells = [f"{mean(regret(rows, pick) for rows in here):.2f}" for pick in (best, *PLAIN)]
        lines.append(f"| {left_out} | {best} | {' | '.join(cells)} |")
    count = sum(len(rows) for _, _, rows in runs)
    lines += ["", f"{count} checkpoints of {len(runs)} runs on {len(results)} kinds of images."]
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", default=[], metavar="NAME=TRAIN,JUDGED[,LABELS]")
    parser.add_argument("--seen", type=int, default=120_000, help="images that a run sees, repeated ones counted")
    parser.add_argument("--out", type=Path, default=Path("runs/choosing"))
    parser.add_argument("--rehearse", action="store_true", help="two short runs of a few embedded images")
    args = parser.parse_args()
    more: list[str] = []
    recipes = RECIPES
    with tempfile.TemporaryDirectory() as scratch:
        if args.rehearse:
            args.kind = [f"{name}=fashion-mnist:0.005,fashion-mnist:0.1" for name in ("some", "others")]
            args.seen, args.out, recipes = 1, Path(scratch), {"recipe": RECIPES["recipe"]}
            more = ["-b", "16", "--moco-mlp-dim", "32"]
        if not args.kind:
            parser.error("--kind names the images")
        results: dict[str, dict[str, list[Judged]]] = {}
        for name, _, words in (text.partition("=") for text in args.kind):
            for recipe, flags in recipes.items():
                folder = args.out / f"{name}-{recipe.replace(' ', '-')}"
                kept = folder / "judged.json"
                if not kept.exists():
                    rows = run(folder, words.split(","), flags, args.seen, more)
                    kept.write_text(json.dumps(rows) + "\n")
                    print(
                        f"{name}, {recipe}: k-NN {min(r['knn'] for r in rows):.1f} to {max(r['knn'] for r in rows):.1f}"
                    )
                results.setdefault(name, {})[recipe] = json.loads(kept.read_text())
        print("\n" + tables(results) + ("\n\nA rehearsal: the numbers mean nothing." if args.rehearse else ""))


if __name__ == "__main__":
    main()
