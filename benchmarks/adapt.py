"""What going on from existing weights brings: half of a set, then another half that looks different.

    python benchmarks/adapt.py                  # about 6 minutes a seed on one quiet core
    python benchmarks/adapt.py --seeds 0

Half A is embedded Fashion-MNIST pictures 0–3,999 as they are, half B pictures 4,000–7,999 as a camera that is mounted
otherwise might show them: turned by up to 20°, shifted by up to 3 px, scaled by 0.75–1.1, darker, noisy. Trained on A
for 30 epochs, then on B for 3 by ``--recipe adapt``; beside it B from scratch for 30 epochs, ten times the steps. k-NN
is leave-one-out over the 2,000 test pictures of each kind, as ``mocov3 compare`` judges them. Prints the table of
docs/own-pictures.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mocov3.data import FashionMnist

EPOCHS, ADAPTED = 30, 3
_COMMON = ["--image-size", "28", "-j", "0", "--device", "cpu", "--quiet"]


def other_camera(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture turned, shifted, scaled, darker and noisy."""
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), rng.uniform(-20, 20), rng.uniform(0.75, 1.1))
    matrix[:, 2] += rng.uniform(-3, 3, 2)
    levels = 0.6 * cv2.warpAffine(pixels, matrix, (28, 28)).astype(float) + 20 + rng.normal(0, 5, (28, 28))
    return np.clip(levels, 0, 255).astype(np.uint8)


def make_halves(folder: Path) -> None:
    """FOLDER/A and FOLDER/B, each with class folders in train and val."""
    sources = {"train": FashionMnist("train"), "val": FashionMnist("val")}
    rng = np.random.Generator(np.random.PCG64(0))
    for half, first in (("A", 0), ("B", 4000)):
        for split, (start, stop) in {"train": (first, first + 4000), "val": (0, 2000)}.items():
            source = sources[split]
            for i in range(start, stop):
                pixels = source.images[i] if half == "A" else other_camera(source.images[i], rng)
                place = folder / half / split / str(source.labels[i])
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place / f"{i}.png")


def mocov3(*args: object) -> str:
    """Run a command of ours; returns what it printed."""
    command = [sys.executable, "-m", "mocov3", *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def one_seed(halves: Path, folder: Path, seed: int) -> dict[str, float]:
    """k-NN in % of the networks of a seed, on the old kind of pictures and on the new."""
    seeded = [*_COMMON, "--seed", seed]
    mocov3("pretrain", halves / "A", "--epochs", EPOCHS, "--output-dir", folder / "old", *seeded)
    old = folder / "old" / f"checkpoint_{EPOCHS - 1:04d}.pth.tar"
    mocov3("pretrain", halves / "B", "--recipe", "adapt", "--init", old, "--epochs", ADAPTED, "--output-dir",
           folder / "adapted", *seeded)  # fmt: skip
    mocov3("pretrain", halves / "B", "--epochs", EPOCHS, "--output-dir", folder / "scratch", *seeded)
    adapted = folder / "adapted" / f"checkpoint_{ADAPTED - 1:04d}.pth.tar"
    scratch = folder / "scratch" / f"checkpoint_{EPOCHS - 1:04d}.pth.tar"
    found: dict[str, float] = {}
    for half in "AB":
        said = mocov3("compare", old, adapted, scratch, halves / half, "--json")
        for row in map(json.loads, said.splitlines()):
            name = {str(old): "old", str(adapted): "adapted", str(scratch): "scratch"}.get(row["name"], row["name"])
            found[f"{name} {half}"] = row["knn"]
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between them")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        make_halves(Path(name))
        found = [one_seed(Path(name), Path(name) / f"seed{seed}", seed) for seed in seeds]
    print("| network | k-NN %, old kind | new kind |\n|---|---|---|")
    untrained = next(k for k in found[0] if k.startswith("untrained"))[:-2]
    for title, key in ((f"trained on the old kind, {EPOCHS} epochs", "old"),
                       (f"then on the new by --recipe adapt, {ADAPTED} epochs", "adapted"),
                       (f"trained on the new kind alone, {EPOCHS} epochs", "scratch"),
                       (untrained, untrained), ("pixels", "pixels")):  # fmt: skip
        cells = [" ".join(f"{f[f'{key} {half}']:.1f}" for f in found) for half in "AB"]
        means = [np.mean([f[f"{key} {half}"] for f in found]) for half in "AB"]
        print(f"| {title} | {cells[0]} (mean {means[0]:.1f}) | {cells[1]} (mean {means[1]:.1f}) |")
    print(f"\nSeeds {args.seeds}; `python benchmarks/adapt.py`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
