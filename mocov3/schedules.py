"""Schedules as pure functions of the (fractional) epoch.

MoCo v3 changes learning rate and momentum every iteration (arXiv 2104.02057, §4 and appendix; recorded from the
reference in ``tests/golden/f_sched.json``). ``epoch`` is ``epoch + iteration / iterations``, from 0 to ``epochs``.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


def learning_rate(epoch: float, *, peak: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0 (the first step has learning rate 0), then a half cosine down to 0."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * _half_cosine((epoch - warmup_epochs) / (epochs - warmup_epochs))


def momentum(epoch: float, *, start: float, epochs: float, cosine: bool) -> float:
    """Momentum of the momentum encoder: constant, or raised from ``start`` to 1 by a half cosine."""
    return 1.0 - (1.0 - start) * _half_cosine(epoch / epochs) if cosine else start


class Decay(NamedTuple):
    """A decision of ``--schedule wsd``: from a step on, what is left of the decay takes so many steps."""

    step: int
    """The first decayed step; of a later decision the first at another pace."""
    steps: int

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.step + self.steps


def decay_progress(step: int, decays: Sequence[Decay]) -> float:
    """How much of the decay is done before ``step``: 0 in the stable part, 1 at the end; linear between decisions."""
    progress = 0.0
    for decay, following in itertools.zip_longest(decays, decays[1:]):
        until = step if following is None else min(step, following.step)
        if until <= decay.step:
            break
        progress += (1.0 - progress) * min((until - decay.step) / decay.steps, 1.0)
    return progress


def stable_rate(epoch: float, progress: float, *, peak: float, warmup_epochs: float) -> float:
    """Warm-up, stable, decay: linear from 0, constant, then 1 − √progress of it (Hägele et al. 2024, §3.2)."""
    warm = min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0
    return peak * warm * (1.0 - math.sqrt(progress))


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
