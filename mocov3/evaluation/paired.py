"""Two networks' answers on the same images: is one worse, is one better, or can these images not tell?

Images that both get right, or both wrong, say nothing of a difference (McNemar 1947). What is lost and what is gained
gives the drop, and Tango's score (1998, Statistics in Medicine 17, 891–908) its one-sided 95 % bounds, which hold for
few images too, and where no image has changed. Answers of neighbours depend on each other a little; that is left out.
Images in groups (slices of a patient) depend on each other much: there the bounds come from resampling whole groups.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from mocov3.evaluation.intervals import mean_by_groups
from mocov3.metrics import JsonLine

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # torch takes seconds to import

_Z = 1.6448536
"""One-sided 95 % of the normal distribution."""
_CHANGED = 0.1
"""Share of answers that change where nothing is lost: what the smallest set is planned for."""


@dataclass(frozen=True)
class Paired:
    """How many images a network gets right that another got wrong, and the other way round."""

    images: int
    right: int
    """Answers of the first network that were right."""
    lost: int
    """Right by the first, wrong by the second."""
    gained: int
    """Wrong by the first, right by the second."""
    bounds: tuple[float, float] | None = None
    """Least and largest drop, in points with 95 % each, of images in groups: by resampling whole groups."""

    @classmethod
    def of(
        cls, before: Bool[Tensor, "images"], after: Bool[Tensor, "images"], groups: np.ndarray | None = None
    ) -> "Paired":
        """From which answers of the two networks were right; ``groups`` are those of the images."""
        lost, gained = before & ~after, after & ~before
        bounds = None if groups is None else _by_groups((lost.int() - gained.int()).cpu().numpy(), groups)
        return cls(len(before), int(before.sum()), int(lost.sum()), int(gained.sum()), bounds)

    @classmethod
    def from_dict(cls, values: JsonLine) -> "Paired":
        """From what ``as_dict`` made."""
        bounds = (values["least"], values["most"]) if values.get("grouped") else None
        images, right, lost, gained = (int(values[name]) for name in ("images", "right", "lost", "gained"))
        return cls(images, right, lost, gained, bounds)

    @property
    def before(self) -> float:
        """Accuracy of the first in %."""
        return 100 * self.right / self.images

    @property
    def after(self) -> float:
        """Accuracy of the second in %."""
        return self.before - self.drop

    @property
    def drop(self) -> float:
        """How many points the second is below the first; negative where it is above."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def most(self) -> float:
        """The drop is no larger than this, in points, with 95 %."""
        return self.bounds[1] if self.bounds else 100 * _bound(self.lost, self.gained, self.images)

    @property
    def least(self) -> float:
        """The drop is no smaller than this, in points, with 95 %."""
        return self.bounds[0] if self.bounds else -100 * _bound(self.gained, self.lost, self.images)

    def as_dict(self) -> JsonLine:
        """Counts, drop and bounds, for JSON."""
        counts = {"images": self.images, "right": self.right, "lost": self.lost, "gained": self.gained}
        grouped = {"grouped": True} if self.bounds else {}
        return {**counts, "drop": self.drop, "least": self.least, "most": self.most, **grouped}


def smallest_set(limit: float, changed: float = _CHANGED) -> int:
    """Images from which a drop of ``limit`` points can be ruled out where there is none (95 %, one-sided).

    Args:
        limit: in points.
        changed: share of answers that change although nothing is lost.
    """
    return math.ceil(changed * (100 * _Z / limit) ** 2)


def kept(old: Paired, limit: float) -> bool:
    """Whether training may go on: a drop of ``limit`` points is ruled out, or, by too few images, is not shown."""
    return (old.most if old.images >= smallest_set(limit) else old.least) <= limit


def old_verdict(old: Paired, limit: float) -> str:
    """``not damaged``, ``damaged`` or ``cannot tell``: whether the second network lost ``limit`` points or more.

    By fewer images than ``smallest_set`` it is ``cannot tell``, unless a larger drop is shown even by them.
    """
    enough = old.images >= smallest_set(limit)
    if enough and old.most < limit:
        return "not damaged"
    return "damaged" if old.least > (0 if enough else limit) else "cannot tell"


@dataclass(frozen=True)
class Conclusion:
    """What to say at the end, and whether it is to keep the weights one has."""

    sentences: list[str]
    keep_yours: bool


def conclude(network: str, old: Paired | None, new: Paired | None, limit: float) -> Conclusion:
    """Whether to use an adapted network in place of the one it started from.

    Args:
        network: its file.
        old: start against adapted on labelled images of the old kind, if there are any.
        new: the same on images of the new kind.
        limit: points that may be lost on the old kind.
    """
    sentences = []
    damage = old_verdict(old, limit) if old else ""
    if old:
        sentences.append(f"Old kind: {damage}. {_shown(old)}.{_wanting(old, limit) if damage == 'cannot tell' else ''}")
    better = new is not None and new.most < 0
    if new:
        sentences.append(f"New kind: {'better' if better else 'not shown to be better'}. {_shown(new)}.")
    keep = damage == "damaged" or (new is not None and not better)
    if keep:
        sentences.append(f"Keep your weights: {network} has not earned their place.")
    elif new is None:
        sentences.append(
            f"Whether {network} is better on the new kind, only labels can tell: what finds more images again has "
            "been trained to."
        )
    elif damage == "not damaged":
        sentences.append(f"Use {network}.")
    else:
        reason = "cannot be told" if old else "was not asked (--guard)"
        sentences.append(f"Use {network} for the new kind only: whether it still serves the old {reason}.")
    return Conclusion(sentences, keep)


def against_start(network: str, pair: Paired) -> str:
    """What labelled images of one kind say of a network and of the one it started from, in a line."""
    if pair.most < 0:
        verdict, advice = "better", "on images like these, use it"
    elif pair.least > 0:
        verdict, advice = "worse", "keep your weights"
    else:
        verdict, advice = "not told apart", "keep your weights, or label more images"
    return f"{network} against its start: {verdict}: {_shown(pair)}; {advice}."


def findings_against_start(network: str, change: JsonLine) -> str:
    """As ``against_start``, by the mean AUROC of findings: ``auroc_before``, ``auroc``, and bounds of the drop."""
    if change["most"] < 0:
        verdict = "better: on images like these, use it"
    elif change["least"] > 0:
        verdict = "worse: keep your weights"
    else:
        verdict = "not told apart: keep your weights, or label more images"
    return (
        f"{network} against its start: AUROC {change['auroc_before']:.1f} → {change['auroc']:.1f} %: "
        f"{_between(change['least'], change['most'])}; {verdict}."
    )


def _shown(pair: Paired) -> str:
    return (
        f"k-NN {pair.before:.1f} → {pair.after:.1f} % of {pair.images} images, {pair.lost} lost and {pair.gained} "
        f"gained: {_between(pair.least, pair.most)}"
    )


def _between(least: float, most: float) -> str:
    """Two bounds of a drop in words, in which a drop below 0 is a gain."""
    if least < 0 <= most:
        bounds = f"between {-least:.1f} points gained and {most:.1f} lost"
    else:
        low, high = sorted((abs(least), abs(most)))
        bounds = f"between {low:.1f} and {high:.1f} points {'gained' if most < 0 else 'lost'}"
    return f"{bounds} (each bound: 95 %)"


def _wanting(old: Paired, limit: float) -> str:
    changed = max((old.lost + old.gained) / old.images, _CHANGED)
    return f" {smallest_set(limit, changed):,} images would do to rule out {limit:g} points."


def _by_groups(change: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Least and largest drop; where no answer changed, which no resampling does either, those of an image a group."""
    if not change.any():
        most = 100 * _bound(0, 0, len(np.unique(groups)))
        return -most, most
    least, most = np.percentile(100 * mean_by_groups(change.astype(float), groups), [5, 95]).tolist()
    return least, most


def _bound(lost: int, gained: int, images: int) -> float:
    """The largest drop, as a fraction, that the score test at one-sided 5 % does not reject."""
    low, high = (lost - gained) / images, 1.0
    for _ in range(60):
        drop = (low + high) / 2
        low, high = (drop, high) if _score(lost, gained, images, drop) > -_Z else (low, drop)
    return high


def _score(lost: int, gained: int, images: int, drop: float) -> float:
    """Tango's statistic for a true ``drop``: standard normal if that is true."""
    # the likeliest share of gains under this drop, from a quadratic equation
    b = (2 * images - lost + gained) * drop - lost - gained
    share = (math.sqrt(b * b + 8 * images * gained * drop * (1 - drop)) - b) / (4 * images)
    variance = images * (2 * share + drop * (1 - drop))
    return (lost - gained - images * drop) / math.sqrt(variance) if variance > 0 else 0.0
