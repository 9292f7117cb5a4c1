"""k-NN accuracy against batch size: ``python benchmarks/batch_size.py`` (25 minutes of one core).

A tiny ViT (width 64, 3 blocks, patches of 7 px, no batch norm in the backbone) on the embedded Fashion-MNIST images
at 28 px, the same epochs for all, learning rate by the linear rule from the batch that is named, three seeds:

- exact: one step on the whole batch, in micro-batches of 64 (``--micro-batch 64``: equal to one pass).
- accumulated: the gradients of micro-batches of 64 added up, as ``--accum-iter`` does for a classifier: negatives and
  the heads' batch norm stay inside each 64. Same memory, steps, images and learning rates as exact.
- small batch: steps on 64 images.

Every run is printed as a line of JSON when it ends, so that a stopped benchmark can be resumed (``--done FILE``).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor

from mocov3 import models, schedules
from mocov3.config.presets import PRESETS
from mocov3.data import CentreView, FashionMnist, Loader, TwoViews
from mocov3.data.device.pixels import PixelViewBatch, ViewBatch
from mocov3.data.loading.loader import batches
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, extract
from mocov3.evaluation.neighbours import knn_accuracy
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step

MICRO = 64
RUNS = [("small batch", 64), ("exact", 256), ("accumulated", 256), ("exact", 1024), ("accumulated", 1024)]
CPU = World(0, 1, torch.device("cpu"))
PRESET = PRESETS["gray"]


class Accumulated:
    """Gradients of micro-batches, each with its own loss, averaged; the momentum encoder moves once."""

    def __init__(self, model: models.MoCo) -> None:
        self.model = model

    def __call__(self, x1: ViewBatch, x2: ViewBatch, m: float) -> tuple[Tensor, models.Statistics]:
        """Mean loss; leaves the gradients in the parameters."""
        parts = range(0, len(x1), MICRO)
        total = torch.zeros(())
        for i, start in enumerate(parts):
            part = slice(start, start + MICRO)
            loss, statistics = self.model.contrast(x1[part], x2[part], m if i == 0 else 1.0)
            (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        return total, statistics


def train(kind: str, batch: int, seed: int, epochs: int, lr: float) -> dict[str, Any]:
    """One run; accuracy in % and processor seconds."""
    began = time.process_time()
    torch.manual_seed(seed)
    model = models.build(
        "vit_small",
        image_size=28,
        patch_size=7,
        embed_dim=64,
        depth=3,
        num_heads=4,
        dim=64,
        mlp_dim=256,
        temperature=0.2,
        stop_grad_conv1=True,
    ).train()
    optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.05, momentum=0.9)
    step = Step(
        model,
        optimizer,
        world=CPU,
        precision=Precision("fp32", CPU.device),
        micro_batch=MICRO if kind == "exact" else 0,
    )
    if kind == "accumulated":
        step.gradients = Accumulated(model)  # type: ignore[assignment]
    source = FashionMnist("train")
    iterations = len(source) // batch
    works = batches(len(source), seed=seed, batch_size=batch, rank=0, ranks=1, start=(0, 0), epochs=epochs)
    losses = []
    with Loader(source, TwoViews(28, 0.3, PRESET), batch_size=batch, seed=seed, workers=0) as loader:
        for loaded in loader.run(works):
            at = loaded.work.epoch + loaded.work.iteration / iterations
            x1, x2 = (PixelViewBatch(p, CPU.device, PRESET.mean, PRESET.std) for p in loaded.pixels)
            rate = schedules.learning_rate(at, peak=lr * batch / 256, warmup_epochs=epochs / 10, epochs=epochs)
            outcome = step(x1, x2, lr=rate, m=schedules.momentum(at, start=0.99, epochs=epochs, cosine=True))
            assert bool(outcome.ok)
            losses.append(float(outcome.loss))
    seconds = time.process_time() - began
    return {
        "kind": kind,
        "batch": batch,
        "seed": seed,
        "steps": len(losses),
        "knn": round(judge(model), 2),
        "loss": round(float(np.mean(losses[-iterations:])), 4),
        "seconds": round(seconds, 1),
        "epochs": epochs,
        "lr": lr,
    }


def judge(model: models.MoCo) -> float:
    """k-NN accuracy (k 20, τ .07) of 2,000 test images among the 8,000 of training, in %."""
    view = CentreView(28, PRESET.evaluation_zoom)
    sources = FashionMnist("train"), FashionMnist("val")
    extractor = Extractor(model.base_encoder, model.features, view, PRESET.mean, PRESET.std)
    bank, queries = (extract(extractor, s, CPU) for s in sources)
    labels = [torch.as_tensor(s.labels, dtype=torch.long) for s in sources]
    return knn_accuracy(bank, labels[0], queries, labels[1])


def main() -> None:
    """Run what is not done yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="for 256 images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--done", type=Path, help="file of lines of a former run, which is resumed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    if args.done and args.done.exists():
        results = [json.loads(line) for line in args.done.read_text().splitlines() if line.startswith("{")]
    for seed in range(args.seeds):
        for kind, batch in RUNS:
            if any((r["kind"], r["batch"], r["seed"]) == (kind, batch, seed) for r in results):
                continue
            results.append(train(kind, batch, seed, args.epochs, args.lr))
            line = json.dumps(results[-1])
            print(line, flush=True)
            if args.done:
                with args.done.open("a") as file:
                    file.write(line + "\n")
    torch.manual_seed(0)
    print("\n| step | batch | steps | k-NN by seed | mean | loss at the end |\n|---|---:|---:|---|---:|---:|")
    for kind, batch in RUNS:
        rows = sorted((r for r in results if (r["kind"], r["batch"]) == (kind, batch)), key=lambda r: r["seed"])
        scores = [r["knn"] for r in rows]
        print(
            f"| {kind} | {batch} | {rows[0]['steps']} | {' / '.join(f'{s:.1f}' for s in scores)} | "
            f"{np.mean(scores):.1f} | {np.mean([r['loss'] for r in rows]):.3f} |"
        )
    print(f"\n{sum(r['seconds'] for r in results) / 60:.0f} minutes of processor time for training in all.")


if __name__ == "__main__":
    main()
