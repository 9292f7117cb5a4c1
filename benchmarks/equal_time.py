"""Choices of pre-training compared at equal time: ``python benchmarks/equal_time.py QUESTION [--seeds 3]``.

    python benchmarks/equal_time.py local --train DIR/train.parquet --test DIR/test.parquet --readme docs/budget.md
    python benchmarks/equal_time.py vit --minutes 60 --train … --test …
    python benchmarks/equal_time.py size --train OUT/textures --minutes 5 --seeds 1
    python benchmarks/equal_time.py schedule --rehearse

Every way of a question trains by ``mocov3 pretrain``'s own loop, on one thread, for about ``--minutes`` of processor
time, loading included: a few steps are timed, which gives it as many epochs as fit (those of
``EQUAL_STEPS``: all as many as the first way). Printed: k-NN (k 20, τ 0.07) and ridge accuracy on the
test images, images seen and processor minutes, mean over seeds. Runs are kept in ``--results`` as they come, so that a
measurement that was stopped can be resumed. ``--rehearse`` runs everything on a few of the embedded images for a few
steps; it writes nothing.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3.config import PretrainConfig
from mocov3.config.command_lines import parse_pretrain
from mocov3.data import CentreView, Source, open_source
from mocov3.data.sources.opening import Subset
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, extract
from mocov3.evaluation.neighbours import knn_accuracy
from mocov3.models.products import multiplies_bf16
from mocov3.pretraining.length import Clock
from mocov3.pretraining.loop import Pretraining
from mocov3.running.folder import owned
from mocov3.running.job import Job

RESNET = (
    "-a resnet10_w16 --image-size 32 --crop-min .2 --optimizer adamw -b 128 --lr 8e-3 --wd .05 --moco-t .2 "
    "--moco-m-cos --moco-dim 128 --moco-mlp-dim 512 --warmup-epochs 1"
)
FREE = f"{RESNET} --schedule wsd"
SIXTEEN = f"{FREE} --precision bf16"
NO_BLUR = "--blur-probability 0,0"
PLAIN = f"{SIXTEEN} {NO_BLUR}"
WIDER = PLAIN.replace("w16", "w32")
VIT = "--recipe vit_small_images --warmup-epochs 1 --schedule wsd"
VIT16 = f"{VIT} --precision bf16"
VIT_HERE = VIT16 if multiplies_bf16() else VIT
BESIDE_LOCAL = f"{FREE} {NO_BLUR} --local-views 2:16"
EQUAL_STEPS = ("schedule", "views", "settings", "precision", "vit_precision", "optimizer")
"""Questions whose ways all take the first one's epochs."""
QUESTIONS: dict[str, dict[str, str]] = {
    "local": {
        "two views": WIDER,
        "2 local": f"{WIDER} --local-views 2:16",
        "4 local": f"{WIDER} --local-views 4:16",
        "4 local, half weight": f"{WIDER} --local-views 4:16 --local-weight .5",
        "4 local of 12 px": f"{WIDER} --local-views 4:12",
        "resnet10_w16, two views": PLAIN,
        "resnet10_w16, 2 local": f"{PLAIN} --local-views 2:16",
    },
    "schedule": {
        "cosine": RESNET,
        **{f"wsd, {share}": f"{RESNET} --schedule wsd --decay-share {share}" for share in (0.1, 0.2, 0.4)},
    },
    "width": {"resnet10_w16": PLAIN, "resnet10_w32": WIDER, "resnet10_w48": PLAIN.replace("w16", "w48")},
    "precision": {"32 bits": FREE, "16 bits": SIXTEEN},
    "views": {
        "of the paper": SIXTEEN,
        "no blur": PLAIN,
        "no blur, no solarizing": f"{PLAIN} --solarize-probability 0,0",
        "no blur, crops from 8 %": f"{PLAIN} --crop-min .08",
    },
    "settings": {
        "no blur": PLAIN,
        "τ .1": f"{PLAIN} --moco-t .1",
        "lr 4e-3": f"{PLAIN} --lr 4e-3",
        "lr 16e-3": f"{PLAIN} --lr 16e-3",
        "batch 256": f"{PLAIN} -b 256",
        "m .97": f"{PLAIN} --moco-m .97",
    },
    "optimizer": {
        "adamw": BESIDE_LOCAL,
        **{f"muon, lr {lr}": f"{BESIDE_LOCAL} --optimizer muon --lr {lr}" for lr in ("8e-3", "1.6e-2", "3.2e-2")},
        "adamw, lr 1.6e-2": f"{BESIDE_LOCAL} --lr 1.6e-2",
    },
    "size": {
        "32 px": FREE,
        "32 px, 2 local": f"{FREE} --local-views 2:16",
        "48 px": f"{FREE} --image-size 48",
        "64 px": f"{FREE} --image-size 64",
        "64 px, the first half at 32": f"{FREE} --image-size 64 --image-size-schedule 32:.5",
        "64 px, the first 80 % at 32": f"{FREE} --image-size 64 --image-size-schedule 32:.8",
        "64 px, resnet10_w32": f"{FREE} --image-size 64 -a resnet10_w32",
    },
    "vit_precision": {"32 bits": VIT, "16 bits": VIT16},
    "vit": {
        "the recipe": VIT_HERE,
        "patches of 4": f"{VIT_HERE} --patch-size 4",
        "patches projected": f"{VIT_HERE} -a vit_micro",
        "projection frozen": f"{VIT_HERE} -a vit_micro --stop-grad-conv1",
        "patches of 4, projected, a quarter kept": f"{VIT_HERE} -a vit_micro --patch-size 4 --token-keep .25:.8",
        "lr 5e-4": f"{VIT_HERE} --lr 5e-4",
        "lr 2e-3": f"{VIT_HERE} --lr 2e-3",
        "muon": f"{VIT_HERE} --optimizer muon --lr 1.6e-2",
    },
}
COMMON = "-j 0 -p 1000000 --device cpu --quiet --checkpoint-every 1000000 --logger none"
MARKS = "<!-- equal time: {} -->", "<!-- /equal time: {} -->"
_TIMED = 12
_RIDGE = 0.01


class Measurement:
    """What is measured, and on what.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.world = args, World(0, 1, torch.device("cpu"))
        self.more = "-b 16 --moco-mlp-dim 32" if args.rehearse else ""

    def configuration(self, flags: str, epochs: int, seed: int, folder: str) -> PretrainConfig:
        """Of a run."""
        words = f"{COMMON} {flags} {self.more} --epochs {epochs} --seed {seed}".split()
        config = parse_pretrain([self.args.train, *words, "--output-dir", folder], prog="equal_time")
        config.check()
        return config

    def epochs(self, flags: str, seed: int) -> int:
        """As many as take ``--minutes``, by a few steps."""
        if self.args.rehearse:
            return 2
        with tempfile.TemporaryDirectory() as folder:
            config = self.configuration(flags, 100, seed, folder)
            with owned(self.world, folder) as owner, Pretraining(self.world, Job(config), owner) as run:
                times = list(itertools.islice(self.steps(run), _TIMED))
                seconds = mean(times[2:]) * run.iterations
        return max(round(60 * self.args.minutes / seconds), 2)

    def steps(self, run: Pretraining) -> Iterator[float]:
        """Train; processor seconds of every step, loading included."""
        began = time.process_time()
        for batch in run.batches():
            lr, m = run.schedule(batch)
            run.seed_draws()
            run.advance(batch, run.step(*run.views(batch), lr=lr, m=m), lr, m)
            run.decide()
            ended = time.process_time()
            yield ended - began
            began = ended
            if run.is_complete() or (self.args.rehearse and run.position.step >= 6):
                return

    def trained(
        self, flags: str, epochs: int, seed: int, *, budget: float = 0.0
    ) -> tuple[dict[str, float], Pretraining, PretrainConfig]:
        """A run, of so many epochs, or by ``--schedule wsd`` of so many processor seconds: what it took, its end, and
        its settings.
        """
        flags += f" --budget {budget / 60}m" if budget else ""
        with tempfile.TemporaryDirectory() as folder:
            config = self.configuration(flags, epochs, seed, folder)
            with owned(self.world, folder) as owner, Pretraining(self.world, Job(config), owner) as run:
                if budget:
                    run.length.clock = Clock(budget, began=time.time(), now=time.process_time)
                seconds = sum(self.steps(run))
        steps = run.position.step
        result = {"seconds": seconds, "images": steps * config.batch_size, "epochs": steps / run.iterations}
        return result, run, config

    def train(self, flags: str, epochs: int, seed: int) -> dict[str, float]:
        """A run, and what its features are worth."""
        result, run, config = self.trained(flags, epochs, seed)
        return {**result, **self.scores(run, config)}

    def scores(self, run: Pretraining, config: PretrainConfig) -> dict[str, float]:
        """k-NN and ridge accuracy, in %."""
        sources: list[Any] = [open_source(self.args.train, "train"), open_source(self.args.test, self.args.part)]
        if self.args.rehearse:
            sources = [Subset(source, np.arange(400)) for source in sources]
        return score(extractor_of(run, config), *sources)


def extractor_of(run: Pretraining, config: PretrainConfig) -> Extractor:
    """What makes a trained network's features of images."""
    encoder, preset = run.model.base_encoder, config.preset
    view = CentreView(config.image_size, preset.evaluation_zoom)
    return Extractor(encoder, encoder.features, view, preset.mean, preset.std)


def score(extractor: Extractor, bank: Source, queries: Source) -> dict[str, float]:
    """k-NN (k 20, τ 0.07) and ridge accuracy of features, in %."""
    sources = bank, queries
    x = [extract(extractor, source, World(0, 1, torch.device("cpu"))) for source in sources]
    y = [torch.as_tensor(source.labels, dtype=torch.long) for source in sources]
    return {"knn": knn_accuracy(x[0], y[0], x[1], y[1]), "ridge": ridge(x[0], y[0], x[1], y[1])}


def ridge(x: Tensor, y: Tensor, queries: Tensor, wanted: Tensor) -> float:
    """Accuracy in % of a linear regression to the classes on standardised features, penalty 0.01 of the images."""
    offset, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    a, b = (torch.cat([(f - offset) / scale, torch.ones(len(f), 1)], 1).double() for f in (x, queries))
    gram = a.T @ a + _RIDGE * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    weights = torch.linalg.solve(gram, a.T @ F.one_hot(y).double())
    return 100 * float(((b @ weights).argmax(1) == wanted).double().mean())


def table(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """Mean over the seeds that all ways have, in Markdown."""
    ways = [w for w in args.ways if any(k.startswith(f"{args.question}/{w}/{args.minutes:g}/") for k in results)]
    keys = {w: f"{args.question}/{w}/{args.minutes:g}" for w in ways}
    seeds = [s for s in range(100) if ways and all(f"{keys[w]}/{s}" in results for w in ways)]
    lines = ["| way | k-NN, % | ridge, % | epochs | images seen | CPU minutes |", "|---|---:|---:|---:|---:|---:|"]
    if not seeds:
        return "\n".join(lines)
    for way in ways:
        runs = [results[f"{keys[way]}/{seed}"] for seed in seeds]
        cells = [spread([run[name] for run in runs]) for name in ("knn", "ridge")]
        epochs, images, seconds = (mean(run[name] for run in runs) for name in ("epochs", "images", "seconds"))
        lines.append(f"| {way} | {' | '.join(cells)} | {epochs:.0f} | {images:,.0f} | {seconds / 60:.1f} |")
    several = f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds."
    lines += ["", several if len(seeds) > 1 else f"Seed {seeds[0]} alone: a first look."]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and of several the standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--train", default="fashion-mnist", help="labelled training images")
    parser.add_argument("--test", default="", help="labelled test images (default: the val part of --train)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", help="some of the question's")
    parser.add_argument("--results", type=Path, default=Path("equal_time.json"))
    parser.add_argument("--readme", type=Path, help="Markdown file to put the table into")
    parser.add_argument("--rehearse", action="store_true", help="a few steps, a few images; writes nothing")
    args = parser.parse_args()
    args.part = "train" if args.test else "val"
    args.test = args.test or args.train
    if args.rehearse:
        args.minutes, args.seeds, args.readme = 0.1, 1, None
        args.results = Path(tempfile.mkdtemp()) / "rehearsal.json"
    args.ways = args.ways or list(QUESTIONS[args.question])
    return args


def main() -> None:
    """Measure what is missing, print, write."""
    args = parse()
    torch.set_num_threads(1)
    measurement = Measurement(args)
    for place, part in ((args.train, "train"), (args.test, args.part)):
        open_source(place, part)  # before anything is trained: a part may not be there
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    ways = QUESTIONS[args.question]
    for seed in range(args.seeds):
        for way in args.ways:
            key = f"{args.question}/{way}/{args.minutes:g}/{seed}"
            if key in results:
                continue
            of = next(iter(ways)) if args.question in EQUAL_STEPS else way
            timed = results.setdefault("epochs", {})
            if (name := f"{args.question}/{of}/{args.minutes:g}") not in timed:
                timed[name] = measurement.epochs(ways[of], seed)
            results[key] = measurement.train(ways[way], timed[name], seed)
            args.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: k-NN {results[key]['knn']:.1f} %, {results[key]['seconds']:.0f} s", flush=True)
    text = table(results, args)
    print("\n" + text)
    if args.readme:
        marks = [mark.format(args.question) for mark in MARKS]
        before, _, rest = args.readme.read_text(encoding="utf-8").partition(marks[0])
        after = rest.partition(marks[1])[2]
        args.readme.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
