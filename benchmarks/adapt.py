"""Adapting existing weights: what a new kind of images gains, what the old kind loses, by way and number of images.

    python benchmarks/adapt.py --old CIFAR10 --out runs/adapt    # every run that is missing, two at a time
    python benchmarks/adapt.py --out runs/adapt --tables         # the tables, of what is there
    python benchmarks/adapt.py --rehearse                        # everything at toy size, without data

Old kind: labelled colour photographs with a train and a validation or test part (``--old``: anything that mocov3 takes,
as the two Parquet files of CIFAR-10). New kind: embedded Fashion-MNIST images, 28 px and grey, as a camera mounted
askew might see them: turned, shifted, scaled, darker, noisy. The base is trained on the old kind without labels, then
with them, as weights that know more than new images can teach. What it is adapted to has no labels: 200, 1,000 and
5,000 images in the ways of ``WAYS``, 29 trainings with the base's two. All k-NN is leave-one-out on images that neither
a training nor a guard has seen; blends of start and end are judged as well and cost no training. A result is written
when its run ends (OUT/results.jsonl), and a run that was stopped resumes. The base trains on all cores, the others each
on one (``--together``). ``--device cuda`` where there is a GPU.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from mocov3.data import FashionMnist, Source, open_source
from mocov3.distributed import World
from mocov3.distributed.launch import pick_device
from mocov3.errors import KEEP_YOURS
from mocov3.evaluation.answers import answered
from mocov3.evaluation.features import Extractor, extract
from mocov3.evaluation.frozen import open_frozen
from mocov3.evaluation.label_free import pixel_features
from mocov3.evaluation.network_scores import blended
from mocov3.models import build_backbone

Result = dict[str, Any]
RATE = 2e-3
"""For 256 images; at the batches of adapting each step has the rate of the base's own steps."""
RUINOUS = 100 * RATE
BLENDS = (0.25, 0.5, 0.75)
KINDS = ("old", "new")
SIDE = 32
WAYS: dict[str, list[str]] = {
    "unprotected": ["--lr", str(RATE)],
    "layer decay": ["--lr", str(RATE), "--layer-decay", ".75", "--freeze-epochs", "1"],
    "LoRA": ["--lr", str(2 * RATE), "--lora", "8"],
    "LoRA, preserved": ["--lr", str(2 * RATE), "--lora", "8", "--preserve", "4"],
    "LoRA, preserved, last block": ["--lr", str(RATE), "--lora", "8", "--preserve", "4", "--unfreeze-last", "1"],
    "LoRA, preserved, guarded": ["--lr", str(2 * RATE), "--lora", "8", "--preserve", "4"],
    "ruinous, guarded": ["--lr", str(RUINOUS)],
}
FIRST = ("unprotected", "layer decay", "LoRA, preserved", "LoRA, preserved, guarded")
"""Ways of which other seeds are trained before anything else."""
GUARDED = tuple(way for way in WAYS if way.endswith("guarded"))
STUDENT = {2: 6.314, 3: 2.920}
"""Seeds → Student's t at 95 %, one side."""
EPOCHS = {200: 30, 1000: 20, 5000: 10}
NETWORK = ["-a", "vit_conv_micro", "--image-size", str(SIDE), "--optimizer", "adamw", "--weight-decay", ".05"]
NETWORK += ["--moco-t", ".2", "--moco-m-cos", "--moco-dim", "128", "--moco-mlp-dim", "512", "--crop-min", ".2"]
NETWORK += ["--recipe", "defaults", "--logger", "none", "--quiet", "--precision", "bf16", "-j", "0", "--seed"]
TUNING = ["--data-set", "folder", "--lr", "2e-3", "--transfer-transform", "--aa", "none", "--mixup", "0"]
TUNING += ["--cutmix", "0", "--reprob", "0", "--no-repeated-aug", "--drop-path", "0", "--no-model-ema"]
TUNING += ["--precision", "bf16", "--logger", "none", "--quiet", "-j", "0", "--seed", "0"]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    patch: int
    base_images: int
    base_epochs: int
    tuning_epochs: int
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


FULL = Sizes(8, 50_000, 11, 5, 256, 128, 4000, 1000, 4000, EPOCHS)
TOY = Sizes(16, 64, 1, 1, 16, 16, 40, 20, 40, {32: 1})


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
        pixels = np.asarray(whole.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
        images.append((pixels, source.classes[source.labels[index]]))
    return images


def toy_images(count: int, seed: int) -> list[tuple[np.ndarray, str]]:
    """Noise in three colours, for the rehearsal."""
    rng = np.random.Generator(np.random.PCG64(seed))
    tint = np.eye(3) * 120
    noise = rng.integers(0, 120, (count, 32, 32, 3))
    return [((image + tint[i % 3]).astype(np.uint8), f"class{i % 3}") for i, image in enumerate(noise)]


def make_images(out: Path, old: str, sizes: Sizes) -> None:
    """OUT/data: base, guard, old, new, and a folder of train and val a number of images."""
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


def judged(networks: dict[str, Extractor], folder: Path, device: str) -> dict[str, Result]:
    """Network → k-NN on labelled images, leave-one-out, and what changed since the first of them."""
    source, world = open_source(str(folder)), World(0, 1, pick_device(device, None))
    assert source.labels is not None
    answers, rows = [], {}
    for name, extractor in networks.items():
        extractor.network.to(world.device)
        answers.append(answered(extract(extractor, source, world), source.labels, list(source.classes), None))
        rows[name] = {**answers[-1].line(further=False), "against_first": answers[-1].against(answers[0])}
    return rows


def networks_of(base: Path, file: Path, *, blend: bool) -> dict[str, Extractor]:
    """The base, what was trained from it, and blends of their weights by name."""
    start, end = (open_frozen(str(f), flag="base", image_size=SIDE) for f in (base, file))
    networks = {"start": start.extractor, "end": end.extractor}
    for fraction in BLENDS if blend else ():
        network = blended(start.network, end.network, fraction)
        networks[f"blend {fraction:g}"] = end.extractor._replace(network=network, features=network.features)
    return networks


def standing(base: Path, data: Path, device: str) -> dict[str, dict[str, Result]]:
    """Kind → network → k-NN, before adapting."""
    network = open_frozen(str(base), flag="base", image_size=SIDE)
    torch.manual_seed(0)
    untrained = build_backbone(network.arch, **network.settings).eval()
    networks = {
        "pixels": network.extractor._replace(network=nn.Identity(), features=pixel_features),
        "untrained": network.extractor._replace(network=untrained, features=untrained.features),
        "the base": network.extractor,
    }
    return {kind: judged(networks, data / kind, device) for kind in KINDS}


def train_base(out: Path, sizes: Sizes, device: str) -> Path:
    """The base: pre-trained on the old kind, then trained with its labels."""
    epochs, cores = sizes.base_epochs, str(os.cpu_count())
    flags = [*NETWORK, 0, "--patch-size", sizes.patch, "-b", sizes.base_batch, "--lr", 1e-3]
    flags += ["--epochs", epochs, "--warmup-epochs", min(1, epochs - 1), "--schedule", "wsd"]
    flags += ["--device", device, "--keep-last", 1, "--output-dir", out / "base", "--resume", "auto"]
    flags += ["--compile"] * (sizes is FULL)
    mocov3("pretrain", out / "data" / "base", *flags, threads=cores)
    pretrained, labelled = out / "base" / f"checkpoint_{epochs - 1:04d}.pth.tar", out / "data" / "labelled"
    labelled.mkdir(exist_ok=True)
    for part, folder in (("train", "base"), ("val", "guard")):
        if not (labelled / part).is_symlink():
            (labelled / part).symlink_to(Path("..") / folder)
    flags = [*TUNING, "--data-path", labelled, "--finetune", pretrained, "-b", sizes.base_batch, "--device", device]
    flags += ["--epochs", sizes.tuning_epochs, "--eval-freq", sizes.tuning_epochs]
    flags += ["--warmup-epochs", min(1, sizes.tuning_epochs - 1), "--output-dir", out / "tuned", "--resume", "auto"]
    mocov3("finetune", *flags, threads=cores)
    return out / "tuned" / "checkpoint.pth"


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
    networks = networks_of(base, file, blend=blend)
    rows = {kind: judged(networks, data / kind, device) for kind in KINDS}
    return {
        "way": way,
        "images": images,
        "seed": seed,
        "seconds": seconds,
        "exit": code,
        "said": said.splitlines()[-3:],
        "curve": [{"agreement": line["agreement"], "drop": line["verdict"]["drop"]} for line in curve],
        **rows,
    }


def measure(out: Path, old: str, sizes: Sizes, device: str, base: Path | None, together: int) -> list[Result]:
    """Every run that is missing, so many at a time; all results."""
    make_images(out, old, sizes)
    results_file = out / "results.jsonl"
    results = read(out)
    base = base or train_base(out, sizes, device)
    if not (out / "base.json").exists():
        (out / "base.json").write_text(json.dumps(standing(base, out / "data", device)))
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
    for kind in KINDS:
        gains = [r[kind]["end"]["knn"] - r[kind]["start"]["knn"] for r in results]
        bound = ""
        if len(gains) in STUDENT:
            bound = f", at least {mean(gains) - STUDENT[len(gains)] * stdev(gains) / math.sqrt(len(gains)):+.1f}"
        cells += [" ".join(f"{r[kind]['end']['knn']:.1f}" for r in results), f"{mean(gains):+.1f}{bound}"]
    guarded = first["way"] in GUARDED
    cells.append(" ".join("keep yours" if r["exit"] == KEEP_YOURS else "use" for r in results) if guarded else "")
    return f"| {' | '.join(cells)} |"


def tables(out: Path, results: list[Result]) -> str:
    """What is known so far, in Markdown."""
    lines = []
    if (out / "base.json").exists():
        base = json.loads((out / "base.json").read_text())
        lines += ["| before adapting | old kind | new kind |", "|---|---:|---:|"]
        lines += [
            f"| {name} | {base['old'][name]['knn']:.1f} | {base['new'][name]['knn']:.1f} |" for name in base["old"]
        ]
        lines += [""]
    lines += ["| way | images | old kind, by seed | change (95 %) | new kind, by seed | change (95 %) | guarded: |"]
    lines += ["|---|---:|---|---:|---|---:|---|"]
    groups: dict[tuple[str, int], list[Result]] = {}
    ways = list(WAYS)
    for result in sorted(results, key=lambda r: (-r["images"], ways.index(r["way"]), r["seed"])):
        groups.setdefault((result["way"], result["images"]), []).append(result)
    lines += [_row(group) for group in groups.values()]
    names = ["start", *(f"blend {f:g}" for f in BLENDS), "end"]
    lines += ["", "| old / new kind, seed 0 | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for (way, images), group in groups.items():
        if names[1] in group[0]["old"]:
            cells = [" / ".join(f"{group[0][kind][n]['knn']:.1f}" for kind in KINDS) for n in names]
            lines.append(f"| {way}, {images:,} | " + " | ".join(cells) + " |")
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
    torch.set_num_threads(1)  # judgements run beside trainings
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
