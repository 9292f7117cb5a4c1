"""``--recipe adapt``: how existing weights are trained on, by kind of network and number of images. A table, pure.

A row names what was measured (``benchmarks/adapt.py``); the plan marks everything else as not measured.
"""

import math
from dataclasses import dataclass

from mocov3.config.archs import SMALL_RESNETS, SMALL_VITS, is_vit, takes_pairs
from mocov3.planning.choices import Choice

NOT_MEASURED = "not measured"
THAW = 1
"""Epochs of warm-up: of the heads at the start, of the backbone when it thaws."""


@dataclass(frozen=True)
class Row:
    """How one kind of network is adapted to at most so many images."""

    kind: str
    most: float
    """Images up to which it holds; the first row that fits counts."""
    lr: float
    """Highest rate, for 256 images a step."""
    epochs: int
    optimizer: str = "adamw"
    lora: int = 0
    """Rank of pairs; 0: all weights are trained."""
    layer_decay: float = 1.0
    preserve: float = 0.0
    heads_first: int = 1
    """Epochs of the heads alone."""
    measured: tuple[str, ...] = ()
    """Names of the fields above that were measured."""
    where: str = ""
    """On what."""


VIT, SMALL_VIT, TINY, OTHER = "ViT", "small ViT of CPUs", "small ResNet of CPUs", "other network"
_ON_A_SMALL_VIT = "measured on a small ViT (docs/own-images.md)"
_PAIRS = ("optimizer", "lora", "layer_decay", "preserve", "freeze_epochs")


def _small_vit(most: float, epochs: int, *, length_measured: bool = True) -> Row:
    measured = ("lr", "epochs", *_PAIRS) if length_measured else ("lr", *_PAIRS)
    where = "measured on 200, 1,000 and 5,000 images (docs/own-images.md)"
    return Row(SMALL_VIT, most, 4e-3, epochs, lora=8, preserve=4.0, heads_first=0, measured=measured, where=where)


TABLE = (
    _small_vit(500, 30),
    _small_vit(2_000, 20),
    _small_vit(10_000, 10),
    _small_vit(math.inf, 10, length_measured=False),
    Row(VIT, math.inf, 3e-4, 10, lora=8, preserve=4.0, heads_first=0, measured=_PAIRS, where=_ON_A_SMALL_VIT),
    Row(SMALL_VIT, math.inf, lr=1e-3, epochs=20, layer_decay=0.75),
    Row(VIT, math.inf, lr=1.5e-4, epochs=20, layer_decay=0.75),
    Row(
        TINY,
        10_000,
        lr=8e-3,
        epochs=20,
        layer_decay=0.75,
        measured=("optimizer", "lr", "layer_decay", "preserve"),
        where="measured on 4,000 images (docs/own-images.md)",
    ),
    Row(TINY, math.inf, lr=8e-3, epochs=20, layer_decay=0.75),
    Row(OTHER, math.inf, lr=0.3, epochs=20, optimizer="lars", layer_decay=0.75),
)


def row_of(arch: str, images: int, *, pairs: bool = True) -> Row:
    """The row of a network and a number of images; without ``pairs`` one that trains all weights.

    Args:
        arch: as ``--arch``.
        images: how many are trained on.
        pairs: whether the flags leave room for ``--lora``.
    """
    pairs = pairs and takes_pairs(arch)
    if arch in SMALL_RESNETS:
        kind = TINY
    elif arch in SMALL_VITS:
        kind = SMALL_VIT
    else:
        kind = VIT if is_vit(arch) or arch.startswith("timm/") else OTHER
    return next(row for row in TABLE if row.kind == kind and images <= row.most and (pairs or not row.lora))


def choices_of(row: Row) -> list[Choice]:
    """What a row says, each with whether that was measured."""
    what = {
        "optimizer": "for training from existing weights",
        "lr": "higher than pre-training's, of few weights" if row.lora else "the rate this kind is pre-trained with",
        "lora": "pairs beside the matrices, which stay" if row.lora else "all weights are trained, no pairs",
        "layer_decay": "slower from block to block towards the input" if row.layer_decay < 1 else "all blocks alike",
        "preserve": "held near the start" if row.preserve else "not held near the start (--preserve)",
        "epochs": "passes over the images",
    }
    choices = [
        Choice(name, getattr(row, name), f"{text}; {row.where if name in row.measured else NOT_MEASURED}")
        for name, text in what.items()
    ]
    heads = "heads learn first, then the backbone warms up" if row.heads_first else "pairs begin as nothing, so at once"
    heads += f"; {row.where if 'freeze_epochs' in row.measured else NOT_MEASURED}"
    return [*choices, Choice("freeze_epochs", row.heads_first, heads), Choice("warmup_epochs", THAW, "at each thaw")]
