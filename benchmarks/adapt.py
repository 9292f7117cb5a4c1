"""What starting from existing weights brings: half of a set, then another half that looks different.

    python benchmarks/adapt.py                  # about 6 minutes a seed on one quiet core
    python benchmarks/adapt.py --seeds 0

Half A is embedded Fashion-MNIST images 0–3,999 as they are, half B images 4,000–7,999 as a camera that is mounted
otherwise might show them: turned by up to 20°, shifted by up to 3 px, scaled by 0.75–1.1, darker, noisy. Trained on A
for 30 epochs, then on B for 3 (and 10) by ``--recipe adapt``; beside it B from scratch for 30, ten times the steps.
k-NN is leave-one-out over the 2,000 test images of each kind, as ``mocov3 compare`` judges them. Prints the table of
docs/own-images.md.
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

EPOCHS, ADAPTED = 30, (3, 10)
_COMMON = ["--image-size", "28", "-j", "0", "--device", "cpu", "--quiet"]


def other_camera(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image turned, shifted, scaled, darker and noisy."""
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
    """k-NN in % of the networks of a seed, on the old kind of images (A) and on the new (B)."""
    seeded = [*_COMMON, "--seed", seed]

    def train(name: str, half: str, epochs: int, *flags: object) -> Path:
        mocov3("pretrain", halves / half, "--epochs", epochs, "--output-dir", folder / name, *flags, *seeded)
        return folder / name / f"checkpoint_{epochs - 1:04d}.pth.tar"

    old = train("old", "A", EPOCHS)
    files = {old: "old"}
    for epochs in ADAPTED:
        files[train(f"adapted{epochs}", "B", epochs, "--recipe", "adapt", "--init", old)] = f"adapted{epochs}"
    for epochs in (EPOCHS, ADAPTED[0]):
        files[train(f"scratch{epochs}", "B", epochs)] = f"scratch{epochs}"
    accuracies: dict[str, float] = {}
    for half in "AB":
        for row in map(json.loads, mocov3("compare", *files, halves / half, "--json").splitlines()):
            accuracies[f"{files.get(Path(row['name']), row['name'].split()[0])} {half}"] = row["knn"]
    return accuracies


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between them")
    args = parser.parse_args()
    seeds = [int(s) for s in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        make_halves(Path(name))
        by_seed = [one_seed(Path(name), Path(name) / f"seed{seed}", seed) for seed in seeds]
    print("| network | old kind | new kind |\n|---|---|---|")
    titles = {
        "old": f"trained on the old kind, {EPOCHS} epochs",
        f"adapted{ADAPTED[0]}": f"then on the new by `--recipe adapt`, {ADAPTED[0]} epochs",
        f"adapted{ADAPTED[1]}": f"the same, {ADAPTED[1]} epochs",
        f"scratch{EPOCHS}": f"trained on the new kind alone, {EPOCHS} epochs",
        f"scratch{ADAPTED[0]}": f"the same, {ADAPTED[0]} epochs",
        "untrained": "untrained",
        "pixels": "pixels",
    }
    for key, title in titles.items():
        print(
            f"| {title} | " + " | ".join(" ".join(f"{f[f'{key} {half}']:.1f}" for f in by_seed) for half in "AB") + " |"
        )
    print(f"\nSeeds {args.seeds}; `python benchmarks/adapt.py`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
