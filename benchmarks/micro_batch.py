"""Memory and time of a large batch in micro-batches against a small batch: ``python benchmarks/micro_batch.py``.

Each side is a process of its own with one thread: ViT-S on 64 px views, AdamW, uint8 images as the loader gives them.
Peak memory is the largest resident set (and what of it is beyond the libraries); time is processor time of a step's
update, gradients and normalisation, divided by images. Sides take turns; the best of several rounds counts.

- memory and time: batch 1024 in micro-batches of 64, against batch 64.
- the price of the second forward pass alone: batch 128 in micro-batches of 64, against batch 128 in one pass.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SIDES = {"64": (64, 0), "1024 in 64": (1024, 64), "128": (128, 0), "128 in 64": (128, 64)}
"""Name → batch, micro-batch."""
_IMAGES = 1024
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measure(arch: str, side: int, batch: int, micro_batch: int) -> dict[str, float]:
    """Peak bytes, bytes beyond the libraries, and processor seconds an image, of this process."""
    import numpy as np
    import torch

    from mocov3 import models
    from mocov3.data.device.pixels import PixelViewBatch
    from mocov3.distributed import World
    from mocov3.models.precision import Precision
    from mocov3.optim import build_optimizer
    from mocov3.pretraining.step import Step

    torch.set_num_threads(1)
    device = torch.device("cpu")
    model = models.build(arch, image_size=side, stop_grad_conv1=True, temperature=0.2)
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    libraries = _peak() - sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
    step = Step(
        model, optimizer, world=World(0, 1, device), precision=Precision("fp32", device), micro_batch=micro_batch
    )
    rng = np.random.default_rng(0)
    steps = max(_IMAGES // batch // 2, 1)
    warm = 1 if batch < _IMAGES else 0
    seconds = []
    for _ in range(warm + steps):
        pixels = rng.integers(0, 256, (2, batch, side, side, 3), dtype=np.uint8)
        x1, x2 = (PixelViewBatch(p, device, _MEAN, _STD) for p in pixels)
        began = time.process_time()
        assert step(x1, x2, lr=1e-4, m=0.99).ok
        seconds.append(time.process_time() - began)
    best = min(seconds[warm:])
    return {"peak": _peak(), "training": _peak() - libraries, "seconds": best / batch}


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> int:
    """Run the sides in turn, print the ratios; exit code 1 below the floors (memory 1.25, time 1.35)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure this side only, in this process, and print JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.arch, args.image_size, *SIDES[args.side])))
        return 0
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [
                sys.executable,
                __file__,
                "--arch",
                args.arch,
                "--image-size",
                str(args.image_size),
                "--side",
                side,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[side].append(json.loads(done.stdout))
    best = {side: {key: min(r[key] for r in results) for key in results[0]} for side, results in measured.items()}
    print(f"{args.arch}, {args.image_size} px, {args.rounds} rounds\n")
    print("| batch | peak memory | of it beyond the libraries | ms an image |")
    print("|---|---:|---:|---:|")
    for side, b in best.items():
        print(f"| {side} | {b['peak'] / 1e9:.2f} GB | {b['training'] / 1e9:.2f} GB | {1000 * b['seconds']:.1f} |")

    def ratio(key: str, one: str, other: str) -> float:
        return best[one][key] / best[other][key]

    memory, time_ratio = ratio("peak", "1024 in 64", "64"), ratio("seconds", "1024 in 64", "64")
    beyond = ratio("training", "1024 in 64", "64")
    print(
        f"\n1024 in micro-batches of 64 against 64: memory {memory:.2f}× (beyond the libraries {beyond:.2f}×), "
        f"time an image {time_ratio:.2f}×"
    )
    print(
        f"128 in micro-batches of 64 against 128 in one pass: time {ratio('seconds', '128 in 64', '128'):.2f}×, "
        f"memory {ratio('peak', '128 in 64', '128'):.2f}×"
    )
    return int(memory > 1.25 or time_ratio > 1.35)


if __name__ == "__main__":
    sys.exit(main())
