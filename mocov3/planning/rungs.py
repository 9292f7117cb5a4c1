"""What ``--recipe auto`` takes on a CPU: the first rung of which the time allows enough epochs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """Views and network of a CPU, taken if the time allows enough epochs of them; else the next."""

    side: int
    arch: str
    enough: int
    """Epochs."""
    side_reason: str
    arch_reason: str


_SHORT = "at 64 px the time allows fewer than 40 epochs on this CPU"
RUNGS = (
    Rung(64, "resnet10_w48", 40, "on a CPU 224 px would take twelve times as long", "a CPU trains it in an hour"),
    Rung(32, "resnet10_w32", 30, _SHORT, "the time allows 30 epochs of it or more"),
    Rung(32, "resnet10_w16", 0, _SHORT, "twice the width would see the images fewer than 30 times (docs/budget.md)"),
)
SMALL_VIEWS = 40
"""Pixels of views up to which the widest of these networks gains nothing, and blur of up to 2 px leaves little."""
