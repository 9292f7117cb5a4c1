"""Short runs that learn, collapse, are unstable or wait for data: what the report's diagnosis is held to.

``python benchmarks/diagnoses.py [NAME…]`` trains them (about 20 s each on a core; all unless named), prints
the diagnosis of each beside what it was made to be, and with ``--write FILE`` stores their metrics, as in
``tests/recorded/diagnoses.json``.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mocov3.config import PretrainConfig

ROOT = Path(__file__).parent.parent
SMALL = [
    "--recipe",
    "defaults",
    "--image-size",
    "16",
    "--view-preset",
    "gray",
    "--crop-min",
    ".3",
    "-b",
    "32",
    "--epochs",
    "5",
    "--warmup-epochs",
    "1",
    "--moco-t",
    ".2",
    "--moco-dim",
    "64",
    "--moco-mlp-dim",
    "128",
    "-j",
    "1",
    "-p",
    "4",
    "--seed",
    "0",
    "--device",
    "cpu",
    "--checkpoint-every",
    "100",
    "--quiet",
    "--moco-m-cos",
]
RESNET = ["-a", "resnet10_w32", "--optimizer", "adamw", "--lr", "8e-3", "--wd", ".05"]
LARS = ["-a", "resnet10_w32", "--optimizer", "lars", "--lr", "1.5"]
VIT = ["-a", "vit_small", "--patch-size", "4", "--optimizer", "adamw", "--wd", ".1"]  # made narrow and shallow below
SHARP = ["-b", "8", "--moco-t", ".05", "--epochs", "2", "--warmup-epochs", "0", "--max-steps", "250", "-p", "1"]
BARE = ["--moco-m", "0"]

RUNS: dict[str, tuple[str, list[str]]] = {
    # name: (diagnosis, flags); names with "bare" have no predictor, those with "big" read large images
    "resnet": ("learning", [*RESNET]),
    "resnet_lars": ("learning", [*LARS]),
    "resnet_tau1": ("learning", [*RESNET, "--moco-t", "1"]),
    "vit_frozen": ("learning", [*VIT, "--lr", "2e-3", "--stop-grad-conv1"]),
    "vit_lr5": ("learning", [*VIT, "--lr", "1e-2"]),
    "vit_lr10": ("learning", [*VIT, "--lr", "2e-2"]),
    "resnet_bare": ("learning", [*RESNET, *BARE]),
    "collapse_bare_lr100": ("collapsed", [*RESNET, *BARE, "--lr", ".8"]),
    "collapse_lr100": ("collapsed", [*RESNET, "--lr", ".8"]),
    "collapse_lars_bare": ("collapsed", [*LARS, *BARE, "--lr", "150"]),
    "collapse_vit_lr100": ("collapsed", [*VIT, "--lr", ".2"]),
    "collapse_wd": ("collapsed", [*RESNET, "--wd", "300"]),
    "spike_vit": ("unstable", [*VIT, *SHARP, "--lr", ".5"]),
    "spike_vit_again": ("unstable", [*VIT, *SHARP, "--lr", ".4", "--seed", "1"]),
    "spike_vit_higher": ("unstable", [*VIT, *SHARP, "--lr", ".6", "--seed", "2"]),
    "starve_big": ("starved", [*RESNET]),
    "starve_big_vit": ("starved", [*VIT, "--lr", "2e-3", "--stop-grad-conv1"]),
    "starve_big_alone": ("starved", [*RESNET, "-j", "0"]),
    "early": ("early", [*RESNET, "--max-steps", "8"]),
}


def images(folder: Path, name: str, count: int = 0) -> Path:
    """1,200 embedded images as small files; 192 of 1.4 Mpx each for the names with ``big``; or ``count``."""
    from PIL import Image

    from mocov3.data import FashionMnist

    big = "big" in name
    place = folder / ("big" if big else "small")
    if place.exists():
        return place
    place.mkdir()
    images = FashionMnist("train").images[: count or (192 if big else 1200)]
    noise = np.random.Generator(np.random.PCG64(0))
    for i, image in enumerate(images):
        shown = Image.fromarray(image)
        if big:
            grain = noise.integers(0, 24, (1024, 1365), dtype=np.uint8)
            shown = Image.fromarray(np.asarray(shown.resize((1365, 1024))) // 2 + grain)
        shown.save(place / f"{i:04d}.png", compress_level=1)
    return place


def train(name: str, data: Path, out: Path, more: Sequence[str]) -> None:
    """Train one run in this process."""
    from torch import nn

    from mocov3 import models
    from mocov3.config.command_lines import parse_pretrain
    from mocov3.pretraining import assemble
    from mocov3.pretraining.task import main

    flags = RUNS[name][1]
    build: Any = models.build
    if "vit_small" in flags:
        build = partial(build, embed_dim=64, depth=10 if "deep" in name else 4, num_heads=4)
    if "bare" in name:
        whole = build

        def build(*args: Any, **settings: Any) -> Any:
            model = whole(*args, **settings)
            model.predictor = nn.Identity()
            return model

    assemble.models = type("", (), {"build": staticmethod(build)})  # type: ignore[assignment]
    epochs = ["--epochs", "16"] if "big" in name else []
    argv = [str(data), *SMALL, *flags, *epochs, *more, "--output-dir", str(out)]
    raise SystemExit(main(parse_pretrain(argv, prog="diagnoses"), script_door=False))


def train_apart(name: str, place: Path, more: Sequence[str] = (), count: int = 0) -> None:
    """Train one run in a process of its own, into ``place/name``; ``more`` flags come last."""
    data, out = images(place, name, count), place / name
    command = [sys.executable, __file__, "--train", name, str(data), str(out), *more]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def stored(name: str, folder: Path) -> dict[str, Any]:
    """A run as the tests keep it: what it was made to be, flags that matter to a diagnosis, columns of five digits."""
    from mocov3.config.fields import read_yaml

    config = PretrainConfig(**read_yaml(folder / "config.yaml", PretrainConfig))
    shown = (
        "arch",
        "batch_size",
        "epochs",
        "warmup_epochs",
        "lr",
        "optimizer",
        "weight_decay",
        "moco_t",
        "moco_m",
        "moco_dim",
        "stop_grad_conv1",
    )
    fields = {f.name: f for f in dataclasses.fields(config)}
    flags = []
    for field in shown:
        value = getattr(config, field)
        flag = (fields[field].metadata["names"] or (f"--{field.replace('_', '-')}",))[-1]
        flags += (
            ([flag] if value is True else [])
            if isinstance(value, bool)
            else [flag, f"{value:g}" if isinstance(value, float) else str(value)]
        )
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = {
        key: [float(f"{v:.4g}") if isinstance(v := line[key], float) else v for line in lines]
        for key in lines[0]
        if key not in ("knn", "version")
    }
    return {"made to be": RUNS[name][0], "flags": flags, "columns": columns}


def main() -> int:
    """Train, judge, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--write", default="", help="file to store the metrics in")
    parser.add_argument("--keep", default="", help="folder to leave the runs in; those that are there are not trained")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        name, data, out, *more = args.train
        train(name, Path(data), Path(out), more)
    from mocov3.report.diagnosis import diagnose
    from mocov3.report.runs import read_run

    records, right = {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.keep or temporary)
        place.mkdir(exist_ok=True, parents=True)
        names = args.names or list(RUNS)
        for name in names:
            if not (place / name / "metrics.jsonl").exists():
                train_apart(name, place)
            diagnosis = diagnose(read_run(place / name))
            right += diagnosis.state == RUNS[name][0]
            print(
                f"{name}: made to be {RUNS[name][0]}, found {diagnosis.state}. {diagnosis.findings[0].reason}",
                flush=True,
            )
            records[name] = stored(name, place / name)
    print(f"{right} of {len(names)} right")
    if args.write:
        about = f"python benchmarks/diagnoses.py --write {args.write}"
        runs = ",\n".join(f"{json.dumps(n)}: {json.dumps(r, separators=(',', ':'))}" for n, r in records.items())
        Path(args.write).write_text(f'{{"made by": {json.dumps(about)},\n"runs": {{\n{runs}\n}}}}\n')
    return 0 if right == len(names) else 1


if __name__ == "__main__":
    raise SystemExit(main())
