"""Views in threads of their own against one pass after the other: ``python benchmarks/side_by_side.py [--quick]``.

By turns, on all cores: loss and gradients of a batch alone, on the CPU, of random images. Printed: medians of the
rounds and their ratio.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mocov3 import models
from mocov3.distributed import World
from mocov3.models.precision import precision_of
from mocov3.pretraining.gradients import WholeBatch
from mocov3.pretraining.side_by_side import SideBySide

CASES = {
    "resnet10_w16": ("resnet10_w16", 32, 128, {}),
    "resnet10_w32": ("resnet10_w32", 32, 128, {}),
    "resnet10_w48": ("resnet10_w48", 64, 128, {}),
    "vit_conv_micro": ("vit_conv_micro", 32, 256, {"patch_size": 8}),
    "resnet50": ("resnet50", 224, 8, {}),
}
_DEVICE = torch.device("cpu")


def compare(name: str, precision: str, rounds: int, *, local: bool) -> str:
    """A row of the table."""
    arch, side, batch, settings = CASES[name]
    torch.manual_seed(0)
    model = models.build(arch, image_size=side, temperature=0.2, dim=128, mlp_dim=512, **settings)
    model = model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x1, x2 = (torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last) for _ in "12")
    small = torch.randn(2 * batch, 3, side // 2, side // 2) if local else None
    arithmetic = precision_of(precision, _DEVICE)
    arithmetic.suit(model)
    ways = (
        WholeBatch(model, world=World(0, 1, _DEVICE), precision=arithmetic),
        SideBySide(model, precision=arithmetic),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for way, seconds in zip(ways, times, strict=True):
            began = time.perf_counter()
            way(x1, x2, 0.99, small)
            if turn >= 2:
                seconds.append(time.perf_counter() - began)
    whole, beside = (1000 * median(seconds) for seconds in times)
    what = f"{name}, {side} px, batch {batch}" + (f", two local views of {side // 2} px" if local else "")
    return f"| {what} | {whole:.0f} | {beside:.0f} | {whole / beside:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="one network, two rounds")
    args = parser.parse_args()
    networks, rounds = (["resnet10_w16"], 2) if args.quick else (args.networks, args.rounds)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.precision}\n")
    print("| | one after the other, ms | side by side, ms | ratio |\n|---|---:|---:|---:|")
    for name in networks:
        for local in (False, True) if name.startswith("resnet10") else (False,):
            print(compare(name, args.precision, rounds, local=local), flush=True)


if __name__ == "__main__":
    main()
