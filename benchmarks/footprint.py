"""Counted memory of a training step against the measured peak: ``python benchmarks/footprint.py``.

What ``--micro-batch auto`` and ``mocov3 plan`` rest on. Each case is a process of its own: its largest resident set
after two steps, less what it held before the model was built. Exit code 1 if a count is off by more than 15 %.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

BOUND = 0.15
CASES = {
    "vit_small, 64 px, batch 96": ("vit_small", 64, 96, 0, "adamw"),
    "vit_small, 64 px, batch 192 in 48": ("vit_small", 64, 192, 48, "adamw"),
    "resnet18, 64 px, batch 128": ("resnet18", 64, 128, 0, "lars"),
    "resnet50, 64 px, batch 48": ("resnet50", 64, 48, 0, "lars"),
    "resnet50, 64 px, batch 96 in 32": ("resnet50", 64, 96, 32, "lars"),
    "resnet34, 96 px, batch 64": ("resnet34", 96, 64, 0, "adamw"),
    "vit_conv_small, 64 px, batch 96": ("vit_conv_small", 64, 96, 0, "adamw"),
    "vit_base, 48 px, batch 128 in 32": ("vit_base", 48, 128, 32, "lars"),
    "timm/convnext_atto, 64 px, batch 96": ("timm/convnext_atto", 64, 96, 0, "adamw"),
}
"""Name → arch, side, batch, micro-batch, optimizer. The allowance for allocators was fitted to the first five."""


def measured(arch: str, side: int, batch: int, micro_batch: int, optimizer: str) -> float:
    """Bytes that two steps add to this process at their peak."""
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
    world, precision = World(0, 1, device), Precision("fp32", device)
    small = models.build("resnet10_w32", dim=8, mlp_dim=8).train()  # what libraries allocate when first used
    optimiser = build_optimizer(small.parameters(), optimizer, weight_decay=0.0, momentum=0.9)
    Step(small, optimiser, world=world, precision=precision)(*torch.randn(2, 4, 3, 32, 32), lr=0.1, m=0.9)
    pixels = np.random.default_rng(0).integers(0, 256, (2, batch, side, side, 3), dtype=np.uint8)
    held = _resident()
    model = models.build(arch, image_size=side, temperature=0.2)
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = build_optimizer(model.parameters(), optimizer, weight_decay=1e-6, momentum=0.9)
    step = Step(model, optimiser, world=world, precision=precision, micro_batch=micro_batch)
    for _ in range(2):
        x1, x2 = (PixelViewBatch(p, device, (0.5,) * 3, (0.2,) * 3) for p in pixels)
        step(x1, x2, lr=1e-4, m=0.99)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) - held


def _resident() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def counted(arch: str, side: int, batch: int, micro_batch: int, optimizer: str) -> float:
    """The same, counted."""
    from mocov3 import models
    from mocov3.pretraining.footprint import footprint

    return footprint(lambda: models.build(arch, image_size=side), side, optimizer=optimizer).peak(batch, micro_batch)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="measure this case only, in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(*CASES[args.case])))
        return 0
    worst = 0.0
    print("| step | counted | measured | counted / measured |\n|---|---:|---:|---:|")
    for name, case in CASES.items():
        done = subprocess.run([sys.executable, __file__, "--case", name], check=True, capture_output=True, text=True)
        peak, expected = float(done.stdout), counted(*case)
        worst = max(worst, abs(expected / peak - 1))
        print(f"| {name} | {expected / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {expected / peak:.2f} |", flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
