"""What ``--recipe auto`` takes on a CPU: the first rung of which the time allows enough passes and images."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """Views and network of a CPU, taken if the time allows enough of them; else the next."""

    side: int
    arch: str
    epochs: int
    """Fewest."""
    seen: int
    """Fewest images seen, passes over all of them counted."""
    side_reason: str
    arch_reason: str
    detail: float = math.inf
    """Taken only where views of ``SMALL_VIEWS`` keep less than this share of the edges' energy."""

    def suits(self, side: int, detail: float) -> bool:
        """Whether it is for images of this detail, in views of ``side`` pixels."""
        return math.isinf(self.detail) or (detail < self.detail and side > SMALL_VIEWS)

    def allowed(self, epochs: int, images: int, wanted: int) -> bool:
        """Whether ``epochs`` of ``images``, which the time allows, are enough; no more than ``wanted`` epochs are."""
        return epochs >= min(max(self.epochs, self.seen / max(images, 1)), wanted)


_SHORT = "at 64 px the time allows fewer than 40 epochs on this CPU"
RUNGS = (
    Rung(64, "resnet10_w48", 40, 0, "on a CPU 224 px would take twelve times as long", "a CPU trains it in an hour"),
    Rung(
        64,
        "resnet10_w16",
        1,
        30_000,
        "32 px keep less than a fifth of the edges (mocov3 check): 42.7 % against 35.2 of textures (docs/budget.md)",
        "three times the width would see few images in the time",
        detail=0.2,
    ),
    Rung(
        32,
        "resnet10_w32",
        1,
        250_000,
        _SHORT,
        "the time allows 250,000 images, from where on a linear probe gains 2 points by width (docs/budget.md)",
    ),
    Rung(32, "resnet10_w16", 0, 0, _SHORT, "twice the width would see fewer than 250,000 images (docs/budget.md)"),
)
SMALL_VIEWS = 40
"""Pixels of views up to which the widest of these networks gains nothing, and blur of up to 2 px leaves little."""
