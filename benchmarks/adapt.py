"""Adapting existing weights: what a new kind of images gains, what the old kind loses, by way and number of images.

    python benchmarks/adapt.py --old CIFAR10 --out runs/adapt    # every run that is missing, two at a time
    python benchmarks/adapt.py --out runs/adapt --tables         # the tables, of what is there
    python benchmarks/adapt.py --rehearse                        # everything at toy size, without data

Old kind: labelled colour photographs with a train and a validation or test part (``--old``: anything that mocov3 takes,
as the two Parquet files of CIFAR-10). New kind: embedded Fashion-MNIST images, 28 px and grey, as a camera mounted
askew might see them: turned, shifted, scaled, darker, noisy. A base is trained on the old kind, then on 200, 1,000 and
5,000 of the new in the ways of ``WAYS``: 28 trainings with the base. All k-NN is leave-one-out on images that neither a
training nor a guard has seen; blends of start and end are judged as well and cost no training. A result is written when
its run ends (OUT/results.jsonl), and a run that was stopped resumes. The base trains on all cores, the others each on
one (``--together``). ``--device cuda`` where there is a GPU.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mocov3.data import FashionMnist, Source, open_source
from mocov3.errors import KEEP_YOURS

Result = dict[str, Any]
RATE = 2e-3
"""For 256 images; at the batches of adapting each step has the rate of the base's own steps."""
RUINOUS = 100 * RATE
BLENDS = "0,.25,.5,.75,1"
WAYS: dict[str, list[str]] = {
    "unprotected": ["--lr", str(RATE)],
    "layer decay": ["--lr", str(RATE), "--layer-decay", ".75", "--freeze-epochs", "1"],
    "LoRA": ["--lr", str(2 * RATE), "--lora", "8"],
    "LoRA, preserved": ["--lr", str(2 * RATE), "--lora", "8", "--preserve", "1"],
    "LoRA, preserved, last block": ["--lr", str(RATE), "--lora", "8", "--preserve", "1", "--unfreeze-last", "1"],
    "LoRA, preserved, guarded": ["--lr", str(2 * RATE), "--lora", "8", "--preserve", "1"],
    "ruinous, guarded": ["--lr", str(RUINOUS)],
}
FIRST = ("unprotected", "layer decay", "LoRA, preserved", "LoRA, preserved, guarded")
"""Ways of which other seeds are trained before anything else."""
GUARDED = tuple(way for way in WAYS if way.endswith("guarded"))
EPOCHS = {200: 60, 1000: 40, 5000: 20}
NETWORK = ["-a", "vit_conv_micro", "--image-size", "32", "--optimizer", "adamw", "--weight-decay", ".05"]
NETWORK += ["--moco-t", ".2", "--moco-m-cos", "--moco-dim", "128", "--moco-mlp-dim", "512", "--crop-min", ".2"]
NETWORK += ["--recipe", "defaults", "--logger", "none", "--quiet", "--precision", "bf16", "-j", "0", "--seed"]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    patch: int
    base_images: int
    base_epochs: int
    base_batch: int
    batch: int
    guard: int
    """Old images for the guard, half of which decide."""
    unseen: int
    """New images for the quality without labels and the run's own test."""
    judged: int
    """Images of each kind that nothing but the judgement sees."""
    epochs: dict[int, int]
    """New images → epochs."""


FULL = Sizes(8, 50_000, 11, 256, 128, 4000, 1000, 4000, EPOCHS)
TOY = Sizes(16, 64, 1, 16, 16, 40, 20, 40, {32: 1})


def plan(sizes: Sizes) -> Iterator[tuple[str, int, int]]:
    """(way, images, seed) of every training but the base's, 27 at full size: what matters most first."""
    *fewer, most = sorted(sizes.epochs)
    yield from ((way, most, 0) for way in WAYS)
    if sizes is FULL:
        yield from ((way, most, seed) for seed in (1, 2) for way in FIRST)
    yield from ((way, images, 0) for images in fewer for way in FIRST[:3])
    if fewer:
        yield "LoRA", fewer[-1], 0
        yield "LoRA, preserved, guarded", fewer[-1], 0
    if sizes is FULL:
        rest = [way for way in WAYS if way not in FIRST and not way.startswith("ruinous")]
        yield from ((way, most, seed) for seed in (1, 2) for way in rest)


def other_camera(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image turned, shifted, scaled, darker and noisy."""
    matrix = cv2.getRotationMatrix2D((13.5, 13.5), rng.uniform(-20, 20), rng.uniform(0.75, 1.1))
    matrix[:, 2] += rng.uniform(-3, 3, 2)
    levels = 0.6 * cv2.warpAffine(pixels, matrix, (28, 28)).astype(float) + 20 + rng.normal(0, 5, (28, 28))
    return np.clip(levels, 0, 255).astype(np.uint8)


def write(folder: Path, images: Sequence[tuple[np.ndarray, str]], first: int = 0) -> None:
    """Images as PNG in folders of their classes."""
    for number, (pixels, label) in enumerate(images, first):
        place = folder / label.replace("/", "-")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:05d}.png")


def old_images(source: Source, count: int) -> list[tuple[np.ndarray, str]]:
    """A fixed draw of labelled images at 32 px."""
    assert source.labels is not None, "--old needs labels"
    chosen = np.random.Generator(np.random.PCG64(0)).permutation(len(source))[:count]
    images = []
    for index in chosen.tolist():
        data = source.read(index)
        whole = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(data)
        pixels = np.asarray(whole.convert("RGB").resize((32, 32), Image.Resampling.BOX))
        images.append((pixels, source.classes[source.labels[index]]))
    return images


def toy_images(count: int, seed: int) -> list[tuple[np.ndarray, str]]:
    """Noise in three colours, for the rehearsal."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tint = np.eye(3) * 120
    noise = rng.integers(0, 120, (count, 32, 32, 3))
    return [((image + tint[i % 3]).astype(np.uint8), f"class{i % 3}") for i, image in enumerate(noise)]


def make_images(out: Path, old: str, sizes: Sizes) -> None:
    """OUT/data: base (train), guard, old, and for every number of new images a folder of train and val; new."""
    data = out / "data"
    if (data / "complete").exists():
        return
    if old:
        train, val = old_images(open_source(old, "train"), sizes.base_images), open_source(old, "val")
        unseen = old_images(val, sizes.guard + sizes.judged)
    else:
        train, unseen = toy_images(sizes.base_images, 0), toy_images(sizes.guard + sizes.judged, 1)
    write(data / "base", train)
    write(data / "guard", unseen[: sizes.guard])
    write(data / "old", unseen[sizes.guard :])
    rng = np.random.Generator(np.random.PCG64(0))
    parts = [FashionMnist("train"), FashionMnist("val")]
    pixels = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    new = [(other_camera(p, rng), FashionMnist.classes[label]) for p, label in zip(pixels, labels, strict=True)]
    most = max(sizes.epochs)
    for count in sizes.epochs:
        write(data / f"new{count}" / "train", [(p, "images") for p, _ in new[:count]])  # without labels
        write(data / f"new{count}" / "val", new[most : most + sizes.unseen])
    write(data / "new", new[most + sizes.unseen :][: sizes.judged])
    (data / "complete").touch()


def mocov3(*args: object, codes: tuple[int, ...] = (0,), threads: str = "1") -> tuple[str, int]:
    """Run a command of ours; what it printed, and its exit code."""
    command = [sys.executable, "-m", "mocov3", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout, done.returncode


def judged(file: Path, folder: Path, device: str, *, blend: bool) -> dict[str, Result]:
    """Rows of ``mocov3 compare`` by name; the file's is called ``end``, blends by their fraction."""
    flags = ["--blend", BLENDS] if blend else []
    out, _ = mocov3("compare", file, folder, "--json", "--device", device, "-j", 0, *flags)
    rows = {}
    for row in map(json.loads, out.splitlines()):
        name = "start" if row["kind"] == "start" else row["name"].removeprefix(f"{file} ")
        rows["end" if name == str(file) else name] = row
    return rows


def train_base(out: Path, sizes: Sizes, device: str) -> tuple[Path, Result]:
    """The base, and how it stands beside pixels on old images."""
    flags = [*NETWORK, 0, "--patch-size", sizes.patch, "-b", sizes.base_batch, "--lr", 1e-3]
    flags += ["--epochs", sizes.base_epochs, "--warmup-epochs", min(1, sizes.base_epochs - 1), "--schedule", "wsd"]
    flags += ["--device", device, "--keep-last", 1, "--output-dir", out / "base", "--resume", "auto"]
    flags += ["--compile"] * (sizes is FULL)
    mocov3("pretrain", out / "data" / "base", *flags, threads=str(os.cpu_count()))
    file = out / "base" / f"checkpoint_{sizes.base_epochs - 1:04d}.pth.tar"
    rows = judged(file, out / "data" / "old", device, blend=False)
    return file, {"old": rows["end"]["knn"], "pixels": rows["pixels"]["knn"]}


def adapt(out: Path, base: Path, way: str, images: int, seed: int, sizes: Sizes, device: str) -> Result:
    """One training, and what it did to both kinds."""
    data, epochs = out / "data", sizes.epochs[images]
    folder = out / f"{way.replace(', ', '-').replace(' ', '-')}-{images}-{seed}"
    flags = [*NETWORK, seed, "--patch-size", sizes.patch, "-b", min(sizes.batch, images // 2), *WAYS[way]]
    flags += ["--epochs", max(epochs, 2), "--warmup-epochs", 1, "--moco-m", ".996", "--init", base, "--keep-last", 1]
    flags += ["--guard", data / "guard", "--guard-drop", 2 if way in GUARDED else 100, "--new-labels", "folders"]
    flags += ["--quality-every", max(epochs // 5, 1), "--device", device, "--resume", "auto", "--output-dir", folder]
    began = time.monotonic()
    said, code = mocov3("pretrain", data / f"new{images}", *flags, codes=(0, KEEP_YOURS))
    seconds = time.monotonic() - began
    last = sorted(folder.glob("checkpoint_*.pth.tar"))[-1]
    file = folder / "best_unlabelled.pth.tar" if way in GUARDED else last
    curve = [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]
    blend = way not in GUARDED and seed == 0
    rows = {kind: judged(file, data / kind, device, blend=blend) for kind in ("old", "new")}
    return {
        "way": way,
        "images": images,
        "seed": seed,
        "seconds": seconds,
        "exit": code,
        "said": said.splitlines()[-3:],
        "curve": [{"agreement": line["agreement"], "drop": line["verdict"]["drop"]} for line in curve],
        **{kind: {name: {"knn": row["knn"], "pair": row.get("against_start")} for name, row in table.items()}
           for kind, table in rows.items()},
    }  # fmt: skip


def measure(out: Path, old: str, sizes: Sizes, device: str, base: Path | None, together: int) -> list[Result]:
    """Every run that is missing, so many at a time; all results."""
    make_images(out, old, sizes)
    results_file = out / "results.jsonl"
    results = read(out)
    if base is None:
        base, standing = train_base(out, sizes, device)
        (out / "base.json").write_text(json.dumps(standing))
    there = {(r["way"], r["images"], r["seed"]) for r in results}
    with ThreadPoolExecutor(together) as pool:
        runs = [pool.submit(adapt, out, base, *run, sizes, device) for run in plan(sizes) if run not in there]
        for run in as_completed(runs):
            results.append(run.result())
            with results_file.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(_row([results[-1]]), flush=True)
    return results


def read(out: Path) -> list[Result]:
    """Results so far."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _row(results: list[Result]) -> str:
    first = results[0]
    cells = [first["way"], f"{first['images']:,}"]
    for kind in ("old", "new"):
        gains = [r[kind]["end"]["knn"] - r[kind]["start"]["knn"] for r in results]
        cells += [" ".join(f"{r[kind]['end']['knn']:.1f}" for r in results), f"{mean(gains):+.1f}"]
    cells.append(" ".join("keep yours" if r["exit"] == KEEP_YOURS else "use" for r in results))
    return f"| {' | '.join(cells)} |"


def tables(out: Path, results: list[Result]) -> str:
    """What is known so far, in Markdown."""
    lines = []
    if (out / "base.json").exists():
        base = json.loads((out / "base.json").read_text())
        lines += [f"Base: k-NN {base['old']:.1f} % on the old kind, pixels {base['pixels']:.1f} %.", ""]
    lines += ["| way | images | old kind, by seed | mean change | new kind, by seed | mean change | the run says |"]
    lines += ["|---|---:|---|---:|---|---:|---|"]
    groups: dict[tuple[str, int], list[Result]] = {}
    ways = list(WAYS)
    for result in sorted(results, key=lambda r: (-r["images"], ways.index(r["way"]), r["seed"])):
        groups.setdefault((result["way"], result["images"]), []).append(result)
    lines += [_row(group) for group in groups.values()]
    lines += ["", "| seed 0, blend of | " + " | ".join(BLENDS.split(",")) + " |", "|---|" + "---|" * 5]
    for (way, images), group in groups.items():
        names = [f"blend {float(f):g}" for f in BLENDS.split(",")]
        if names[0] in group[0]["old"]:
            cells = [" / ".join(f"{group[0][kind][n]['knn']:.1f}" for kind in ("old", "new")) for n in names]
            lines.append(f"| {way}, {images:,} (old / new) | " + " | ".join(cells) + " |")
    points = sorted((p["agreement"], p["drop"]) for r in results for p in r["curve"] if p["agreement"] is not None)
    lines += ["", "| neighbours as at the start, % | judgements | points lost on the old kind: least, mean, most |"]
    lines += ["|---|---:|---|"]
    for low in range(90, -1, -10):
        if drops := [drop for agreement, drop in points if low <= agreement < low + 10 + (low == 90)]:
            lines.append(f"| {low}–{low + 10} | {len(drops)} | {min(drops):.1f}, {mean(drops):.1f}, {max(drops):.1f} |")
    minutes = sum(r["seconds"] for r in results) / 60
    lines += ["", f"{len(results)} trainings of the new kind, {minutes:.0f} minutes. No foundation model was at hand."]
    return "\n".join(lines)


def main() -> int:
    """Measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="", help="labelled photographs, as CIFAR-10's Parquet files in a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt"), help="images, runs and results")
    parser.add_argument("--base", type=Path, help="weights trained on the old kind, in place of a training here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", type=int, default=2, help="trainings at a time, each on one thread")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    parser.add_argument("--rehearse", action="store_true", help="everything once, at toy size, without data")
    args = parser.parse_args()
    if args.tables:
        print(tables(args.out, read(args.out)))
        return 0
    if args.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(Path(folder), "", TOY, args.device, None, args.together)
            print(tables(Path(folder), results) + "\n\nA rehearsal at toy size: the numbers mean nothing.")
        return 0
    if not args.old:
        parser.error("--old names the labelled photographs")
    print(tables(args.out, measure(args.out, args.old, FULL, args.device, args.base, args.together)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
