"""Steps in 32 and in 16 bits on a CPU: ``python benchmarks/precision.py [--rounds 3] [--quick]``.

A step of pre-training is timed in float32, in bfloat16 with torch's fused attention, and in bfloat16 as it is trained
(attention by matrix products), by turns; the best of the rounds counts. Processors without instructions for products of
bfloat16 matrices (AMX, AVX512-BF16) lose by it.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from mocov3.config import PretrainConfig
from mocov3.models.precision import Precision
from mocov3.models.products import multiplies_bf16
from mocov3.planning.speed import images_per_second

SMALL = {"image_size": 32, "moco_dim": 128, "moco_mlp_dim": 512, "optimizer": "adamw", "device": "cpu"}
NETWORKS = {
    "vit_micro, 32 px, patches of 4": ({**SMALL, "arch": "vit_micro", "patch_size": 4}, 128),
    "vit_tiny, 32 px, patches of 4": ({**SMALL, "arch": "vit_tiny", "patch_size": 4}, 64),
    "vit_small, 224 px": ({**SMALL, "arch": "vit_small", "image_size": 224}, 8),
    "resnet10_w16, 32 px": ({**SMALL, "arch": "resnet10_w16"}, 256),
    "resnet10_w32, 32 px": ({**SMALL, "arch": "resnet10_w32"}, 256),
}


def measured(fields: dict[str, object], batch: int, rounds: int) -> tuple[float, float, float]:
    """Images a second in float32, in bfloat16 with fused attention, in bfloat16."""
    best = [0.0, 0.0, 0.0]
    for _ in range(rounds):
        for i, name in enumerate(("fp32", "bf16", "bf16")):
            config = PretrainConfig(data="x", precision=name, **fields)  # type: ignore[arg-type]
            suit = (lambda self, network: None) if i == 1 else Precision.suit
            with patch.object(Precision, "suit", suit):
                best[i] = max(best[i], images_per_second(config, batch))
    return best[0], best[1], best[2]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of the smallest: does it run?")
    args = parser.parse_args()
    has = "has" if multiplies_bf16() else "has no"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; this processor {has} products of bfloat16\n")
    print("| network, batch | float32, images/s | bfloat16, fused attention | bfloat16 | ratio |")
    print("|---|---:|---:|---:|---:|")
    for name, (fields, batch) in list(NETWORKS.items())[: 1 if args.quick else None]:
        full, fused, half = measured(fields, 16 if args.quick else batch, 1 if args.quick else args.rounds)
        print(f"| {name}, {batch} | {full:.0f} | {fused:.0f} | {half:.0f} | {half / full:.2f} |", flush=True)


if __name__ == "__main__":
    main()
