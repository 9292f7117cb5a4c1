"""``--recipe adapt``: how existing weights are trained on, by kind of network and number of images. A table, pure.

A row names what was measured (``benchmarks/adapt.py``); the plan marks everything else as not measured.
"""

import math
from dataclasses import dataclass

from mocov3.config.archs import is_vit
from mocov3.planning.choices import Choice

NOT_MEASURED = "not measured"
HEADS_FIRST, THAW = 1, 1
"""Epochs of the heads alone, and of warm-up: of the heads at the start, of the backbone when it thaws."""


@dataclass(frozen=True)
class Row:
    """How one kind of network is adapted to at most so many images."""

    kind: str
    most: float
    """Images up to which it holds; the first row that fits counts."""
    lr: float
    """Highest rate, for 256 images a step."""
    epochs: int
    lora: int = 0
    """Rank of pairs; 0: all weights are trained."""
    layer_decay: float = 1.0
    preserve: float = 0.0
    measured: tuple[str, ...] = ()
    """Names of the fields above that were measured."""
    where: str = ""
    """On what."""


VIT, TINY, OTHER = "ViT", "small ResNet of CPUs", "other network"
TABLE = (
    Row(VIT, math.inf, lr=1.5e-4, epochs=20, layer_decay=0.75),
    Row(
        TINY,
        10_000,
        lr=8e-3,
        epochs=20,
        layer_decay=0.75,
        measured=("lr", "layer_decay", "preserve"),
        where="measured on 4,000 images (docs/own-images.md)",
    ),
    Row(TINY, math.inf, lr=8e-3, epochs=20, layer_decay=0.75),
    Row(OTHER, math.inf, lr=0.3, epochs=20, layer_decay=0.75),
)


def row_of(arch: str, images: int) -> Row:
    """The row of a network and a number of images."""
    kind = VIT if is_vit(arch) or arch.startswith("timm/") else TINY if arch.startswith("resnet10") else OTHER
    return next(row for row in TABLE if row.kind == kind and images <= row.most)


def choices_of(row: Row) -> list[Choice]:
    """What a row says, each with whether that was measured."""
    what = {
        "lr": "the rate that this kind of network is pre-trained with",
        "lora": "pairs beside the matrices, which stay" if row.lora else "all weights are trained, no pairs",
        "layer_decay": "slower from block to block towards the input" if row.layer_decay < 1 else "all blocks alike",
        "preserve": "held near the start" if row.preserve else "not held near the start (--preserve)",
        "epochs": "passes over the images",
    }
    choices = [
        Choice(name, getattr(row, name), f"{text}; {row.where if name in row.measured else NOT_MEASURED}")
        for name, text in what.items()
    ]
    heads = f"heads learn first, then the backbone warms up; {NOT_MEASURED}"
    return [*choices, Choice("freeze_epochs", HEADS_FIRST, heads), Choice("warmup_epochs", THAW, "at each thaw")]
