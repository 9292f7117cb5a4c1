"""The tables of docs/scaling.md: ``python benchmarks/scaling.py``. Memory is counted, time computed, nothing trained.

Speeds of one GPU are stated, not measured: ``--speed vit_base=350`` puts in your own.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mocov3.config import PretrainConfig
from mocov3.planning.plan import GIB, LIBRARIES, step_seconds, traffic
from mocov3.pretraining.assemble import count_memory, count_norms
from mocov3.pretraining.footprint import KEPT_FREE

ARCHS = {
    "resnet50": ("lars", 224, 16),
    "vit_small": ("adamw", 224, 16),
    "vit_base": ("adamw", 224, 16),
    "vit_large": ("adamw", 224, 16),
    "vit_huge": ("adamw", 224, 14),
}
SPEEDS = {"resnet50": 700.0, "vit_small": 900.0, "vit_base": 350.0, "vit_large": 110.0}
"""Images a second of one GPU in 16 bits, stated: about a third of the 312 TFLOP/s of an A100."""
GPUS = (8, 16, 32, 64, 128, 256, 512)
CARDS = (12, 24, 80)
BATCH = 4096


def config_of(arch: str) -> PretrainConfig:
    """The recipe's settings that memory depends on."""
    optimizer, side, patch = ARCHS[arch]
    return PretrainConfig(
        arch=arch,
        optimizer=optimizer,
        image_size=side,
        patch_size=patch,
        precision="bf16",
        stop_grad_conv1=arch.startswith("vit"),
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="append", default=[], metavar="ARCH=N", help="images/s of one GPU")
    parser.add_argument("--gigabytes-per-second", type=float, default=25.0)
    args = parser.parse_args()
    speeds = SPEEDS | {name: float(value) for name, value in (text.split("=") for text in args.speed)}
    counts = {arch: count_memory(config_of(arch), sixteen_bits=True) for arch in ARCHS}
    cards = " | ".join(f"one pass / micro-batch of {BATCH}, {card} GB" for card in CARDS)
    print(
        f"| arch | weights, both encoders | gradients | optimizer | an image (2 views) | heads of {BATCH} | {cards} |"
    )
    print("|---|" + "---:|" * (5 + len(CARDS)))
    for arch, c in counts.items():
        fits = []
        for card in CARDS:
            memory = (1 - KEPT_FREE) * (card * GIB - LIBRARIES)
            one = next((n for n in range(BATCH, 0, -1) if n & (n - 1) == 0 and c.peak(n) <= memory), 0)
            fits.append(f"{one or '–'} / {c.fitting(BATCH, card * GIB - LIBRARIES) or '–'}")
        print(
            f"| {arch} | {c.weights / 1e9:.2f} GB | {c.trained / 1e9:.2f} GB | {c.states * c.trained / 1e9:.2f} GB | "
            f"{2 * (c.backbone + c.heads) / 1e6:.0f} MB | {2 * BATCH * c.heads / 1e9:.2f} GB | "
            f"{' | '.join(fits)} |"
        )
    print(f"\n| arch, images/s a GPU | sent a step | {' | '.join(f'{n} GPUs' for n in GPUS)} |")
    print("|---|---:|" + "---:|" * len(GPUS))
    for arch, speed in speeds.items():
        config, c, row = config_of(arch), counts[arch], []
        for gpus in GPUS:
            sent = traffic(
                gpus, BATCH, trained=c.trained, dim=256, norm_channels=count_norms(config), passes=3, fsdp=False
            )
            computing, waiting = step_seconds(
                BATCH // gpus, speed, sent, args.gigabytes_per_second * 1e9, micro=False, fsdp=False
            )
            row.append(f"{100 * computing / (computing + waiting):.0f} %")
        print(f"| {arch}, {speed:.0f} | {sent.all / 1e9:.2f} GB | {' | '.join(row)} |")
    print(f"\nBatch {BATCH} over all, {args.gigabytes_per_second:g} GB/s a GPU.")


if __name__ == "__main__":
    main()
