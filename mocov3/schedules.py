"""Schedules as pure functions of the (fractional) epoch.

MoCo v3 changes learning rate and momentum every iteration (arXiv 2104.02057, §4 and appendix; recorded from the
reference in ``tests/golden/f_sched.json``). ``epoch`` is ``epoch + iteration / iterations``, from 0 to ``epochs``.
"""

import math


def learning_rate(epoch: float, *, peak: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0 (the first step has learning rate 0), then a half cosine down to 0."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * _half_cosine((epoch - warmup_epochs) / (epochs - warmup_epochs))


def momentum(epoch: float, *, start: float, epochs: float, cosine: bool) -> float:
    """Momentum of the momentum encoder: constant, or raised from ``start`` to 1 by a half cosine."""
    return 1.0 - (1.0 - start) * _half_cosine(epoch / epochs) if cosine else start


def thaw(epoch: float, *, freeze_epochs: float, warmup_epochs: float) -> float:
    """Factor of the backbone's learning rate where only the heads are trained at first: 0, then a warm-up of its own.

    The backbone meets heads that have learned, but its optimizer none of their gradients at full size.
    """
    if epoch < freeze_epochs:
        return 0.0
    return min((epoch - freeze_epochs) / warmup_epochs, 1.0) if warmup_epochs else 1.0


def epoch_cosine(epoch: int, *, initial: float, epochs: int) -> float:
    """Learning rate of linear evaluation: a half cosine that changes once per whole epoch, without warm-up."""
    return initial * _half_cosine(epoch / epochs)


def _half_cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))
