"""What cheaper pre-training costs and gives: ``python benchmarks/cheaper.py [--epochs 8] [--seeds 3]``.

A small ViT (width 64, depth 4, patches of 4 px) trains on the embedded images by ``mocov3 pretrain``'s own loop, once
as usual and once by each way of ``WAYS``; seconds are of processor time of the whole training, loading included, on one
thread. Printed: k-NN accuracy on the test images and cost, mean over seeds. Results are kept in ``--results`` as they
come, so that a stopped measurement can be resumed; ``--readme FILE`` puts the table into a Markdown file.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mocov3.config.command_lines import parse_pretrain
from mocov3.data import CentreView, open_source
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, extract
from mocov3.evaluation.neighbours import knn_accuracy
from mocov3.models import backbones
from mocov3.pretraining.loop import Pretraining
from mocov3.running.folder import owned
from mocov3.running.job import Job

NETWORK = {"embed_dim": 64, "depth": 4, "num_heads": 2}
FLAGS = [
    # views weaker than the recipe's now are, as when docs/cheaper.md was measured
    "fashion-mnist",
    "--recipe",
    "fashion_mnist",
    "--crop-min",
    ".3",
    "--brightness",
    ".4",
    "--contrast",
    ".4",
    "--blur-probability",
    "0",
    "--solarize-probability",
    "0",
    "-a",
    "vit_tiny",
    "--patch-size",
    "4",
    "--lr",
    "3e-3",
    "--warmup-epochs",
    "1",
    "--stop-grad-conv1",
    "--moco-mlp-dim",
    "256",
    "-j",
    "0",
    "-p",
    "1000",
    "--device",
    "cpu",
    "--quiet",
    "--checkpoint-every",
    "1000",
]
PLAIN = "plain"
WAYS = {
    PLAIN: "",
    "token dropout": "--token-keep 0.25:0.8",
    "larger patches": "--patch-size-schedule 7:0.8",
    "smaller images": "--image-size-schedule 16:0.8",
}
MARKS = "<!-- cheaper -->", "<!-- /cheaper -->"


def train(flags: list[str], epochs: int, seed: int) -> dict[str, float]:
    """Processor seconds of a training, and what its features are worth."""
    world = World(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        given = [*FLAGS, *flags, "--epochs", str(epochs), "--seed", str(seed), "--output-dir", folder]
        config = parse_pretrain(given, prog="cheaper")
        config.check()
        began = time.process_time()
        with owned(world, folder) as owner, Pretraining(world, Job(config), owner) as run:
            for batch in run.batches():
                lr, m = run.schedule(batch)
                run.advance(batch, run.step(*run.views(batch), lr=lr, m=m), lr, m)
        seconds = time.process_time() - began
        encoder, preset = run.model.base_encoder, config.preset
        sources = [open_source("fashion-mnist", part) for part in ("train", "val")]
        view = CentreView(config.image_size, preset.evaluation_zoom)
        extractor = Extractor(encoder, encoder.features, view, preset.mean, preset.std)
        bank, queries = (extract(extractor, s, world) for s in sources)
        labels = [torch.as_tensor(s.labels, dtype=torch.long) for s in sources]
    return {"seconds": seconds, "knn": knn_accuracy(bank, labels[0], queries, labels[1])}


def table(results: dict[str, dict[str, float]], epochs: int) -> str:
    """Mean over the seeds that all ways have, in Markdown."""
    ways = [way for way in WAYS if any(key.startswith(f"{way}/{epochs}/") for key in results)]
    seeds = [s for s in range(100) if all(f"{way}/{epochs}/{s}" in results for way in {PLAIN, *ways})]
    lines = ["| way | flags | k-NN, % | CPU-seconds | of plain |", "|---|---|---:|---:|---:|"]
    if not seeds:
        return "\n".join(lines)
    cost = mean(results[f"{PLAIN}/{epochs}/{s}"]["seconds"] for s in seeds)
    for way in ways:
        runs = [results[f"{way}/{epochs}/{s}"] for s in seeds]
        knn, seconds = [f["knn"] for f in runs], mean(f["seconds"] for f in runs)
        spread = f" ± {stdev(knn):.1f}" if len(knn) > 1 else ""
        flags = f"`{WAYS[way]}`" if WAYS[way] else ""
        lines.append(f"| {way} | {flags} | {mean(knn):.1f}{spread} | {seconds:.0f} | {seconds / cost:.2f} |")
    spread = f"seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds"
    lines += ["", f"{epochs} epochs, {spread if len(seeds) > 1 else f'seed {seeds[0]} alone: a first look'}."]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--results", type=Path, default=Path("cheaper.json"))
    parser.add_argument("--readme", type=Path, help="Markdown file to put the table into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    backbones._VITS["vit_tiny"] = NETWORK  # no arch of the program is this small
    results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for seed in range(args.seeds):
        for way in args.ways:
            key = f"{way}/{args.epochs}/{seed}"
            if key not in results:
                results[key] = train(WAYS[way].split(), args.epochs, seed)
                args.results.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{key}: {results[key]['knn']:.1f} %, {results[key]['seconds']:.0f} s", flush=True)
    text = table(results, args.epochs)
    print("\n" + text)
    if args.readme:
        before, _, rest = args.readme.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        args.readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
