"""A set of images at a glance: facts added up, copies and near-copies, and the view preset that they suggest."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from mocov3.config.presets import RGB, Reading
from mocov3.data.sources.detail import SIDES
from mocov3.data.sources.facts import THUMB, Fact, examine
from mocov3.data.sources.opening import Source
from mocov3.data.views.copies import is_giant
from mocov3.data.views.decode import DecodeError
from mocov3.data.views.draws import permutation

NEAR = 0.985
"""Correlation of 16×16 grey thumbnails from which two images count as nearly the same."""
_RUN = 50  # images that follow each other by name are looked at together: copies mostly do
_FLAT = 4.0  # standard deviation of grey levels under which a thumbnail says nothing
_UPRIGHT = 2.0
"""Times chance; of randomly turned images 5 % or less reach it."""
_ENOUGH = 200
"""Images from which on a side that is up would show."""
_ALIKE = 0.5
_SEED = 5


@dataclass(frozen=True)
class Survey:
    """What was measured."""

    images: int
    """Of the whole source."""
    examined: int
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    """(index, reason)."""
    remarked: list[tuple[int, str]] = field(default_factory=list)
    """(index, remark) of those that were read although something beside their pixels is damaged or odd."""
    formats: dict[str, int] = field(default_factory=dict)
    """'JPEG RGB' → how many."""
    short_side: tuple[int, int, int] = (0, 0, 0)
    """5 %, 50 % and 95 % of the images have a shorter side up to this, in pixels."""
    long_side: tuple[int, int, int] = (0, 0, 0)
    mean_bytes: float = 0.0
    gray_share: float = 0.0
    turned_share: float = 0.0
    """Share that EXIF turns."""
    copies: int = 0
    """Images of the same bytes as an earlier one."""
    near_copies: int = 0
    """Images nearly the same as an earlier one, equal ones left out."""
    near_examples: list[tuple[int, int]] = field(default_factory=list)
    partners: float = 0.0
    """Mean number of examined images that are the same as, or nearly as, an image."""
    upright: float = 0.0
    """How far the mean image differs from itself turned, in units of chance (about 1 when nothing is up)."""
    alike: float = 0.0
    """Mean correlation of two images' thumbnails: 0 unrelated scenes, 1 all the same."""
    deep: tuple[int, float, float] = (0, 0.0, 0.0)
    """Images of more than 8 bits, and from where to where their values reach."""
    detail: dict[int, float] = field(default_factory=dict)
    """Shorter side in pixels → mean share of the edges' energy that it keeps."""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    """Of the pixels in 0–1, by channel."""

    @property
    def readable(self) -> int:
        """Examined images that can be read."""
        return self.examined - len(self.unreadable)

    @property
    def mean_std(self) -> str:
        """Normalisation as ``--mean-std`` takes it."""
        if self.gray_share > 0.95 and len(self.mean) == 3:
            return f"{np.mean(self.mean):.4f},{max(float(np.mean(self.std)), 0.01):.4f}"
        return ",".join(f"{v:.4f}" for v in (*self.mean, *(max(s, 0.01) for s in self.std)))


def sample(n: int, limit: int) -> np.ndarray:
    """At most ``limit`` indices below ``n``, increasing: runs of images that follow each other, spread evenly."""
    if n <= limit:
        return np.arange(n)
    run = min(_RUN, limit)
    blocks = n // run
    chosen = np.sort(permutation(_SEED, 0, blocks)[: max(limit // run, 1)])
    return (chosen[:, None] * run + np.arange(run)).ravel()


def scattered(n: int, limit: int) -> np.ndarray:
    """At most ``limit`` indices below ``n``, increasing, drawn singly."""
    return np.arange(n) if n <= limit else np.sort(permutation(_SEED, 1, n)[:limit])


def giants(source: Source, indices: np.ndarray) -> np.ndarray:
    """Which of the images take seconds to decode, by their headers; none that cannot be read."""

    def one(index: int) -> bool:
        try:
            return is_giant(source.read(index))
        except (DecodeError, OSError):
            return False

    return np.array([one(index) for index in indices.tolist()], dtype=bool)


def survey(
    source: Source, indices: np.ndarray, *, workers: int, reading: Reading = RGB, detail: bool = False
) -> Survey:
    """Examine the images ``indices``, read by ``reading``; ``detail`` too, if asked for."""
    return add_up(len(source), examine(source, indices.tolist(), workers=workers, reading=reading, detail=detail))


def add_up(images: int, facts: Iterable[Fact]) -> Survey:
    """Facts → survey."""
    unreadable: list[tuple[int, str]] = []
    good: list[Fact] = []
    for fact in facts:
        if fact.error:
            unreadable.append((fact.index, fact.error))
        else:
            good.append(fact)
    if not good:
        return Survey(images, len(unreadable), unreadable)
    short = np.array([min(f.width, f.height) for f in good])
    long = np.array([max(f.width, f.height) for f in good])
    sums = np.array([f.sums for f in good]).mean(0)
    channels = len(sums) // 2
    deep = [f.deep for f in good if f.deep]
    thumbs = np.stack([f.thumb for f in good if f.thumb is not None]).astype(np.float32)
    gray = thumbs.mean(3)
    repeated = _repeated([f.digest for f in good])
    pairs, total = _near(gray, NEAR)
    near = [(good[i].index, good[j].index) for i, j in pairs if not repeated[j]]
    return Survey(
        images=images,
        examined=len(good) + len(unreadable),
        unreadable=unreadable,
        remarked=[(f.index, f.remark) for f in good if f.remark],
        formats=dict(Counter(f"{f.format} {f.mode}" for f in good).most_common()),
        short_side=_quantiles(short),
        long_side=_quantiles(long),
        mean_bytes=float(np.mean([f.file_bytes for f in good])),
        gray_share=sum(f.gray for f in good) / len(good),
        turned_share=sum(f.turned for f in good) / len(good),
        copies=int(repeated.sum()),
        near_copies=len({j for _, j in near}),
        near_examples=near[:20],
        partners=2 * total / len(good),
        upright=uprightness(gray),
        alike=alikeness(gray),
        deep=(len(deep), min((d[0] for d in deep), default=0.0), max((d[1] for d in deep), default=0.0)),
        detail=dict(zip(SIDES, np.mean([f.detail for f in good], 0).tolist(), strict=True)) if good[0].detail else {},
        mean=tuple(sums[:channels].tolist()),
        std=tuple(np.sqrt(np.maximum(sums[channels:] - sums[:channels] ** 2, 0)).tolist()),
    )


def _quantiles(sides: np.ndarray) -> tuple[int, int, int]:
    low, middle, high = np.percentile(sides, [5, 50, 95]).round().astype(int).tolist()
    return low, middle, high


def _repeated(digests: list[bytes]) -> np.ndarray:
    seen: set[bytes] = set()
    is_repeated = np.zeros(len(digests), bool)
    for i, digest in enumerate(digests):
        is_repeated[i] = digest in seen
        seen.add(digest)
    return is_repeated


def _standardised(gray: np.ndarray) -> np.ndarray:
    flat = gray.reshape(len(gray), -1) - gray.reshape(len(gray), -1).mean(1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    told = norm > _FLAT * THUMB
    return np.where(told, flat / np.maximum(norm, 1e-9), 0).astype(np.float32)


def near_pairs(gray: np.ndarray, threshold: float = NEAR) -> list[tuple[int, int]]:
    """(i, j), i < j: the first earlier image i that image j is nearly the same as. (images, 16, 16) levels."""
    return _near(gray, threshold)[0]


def _near(gray: np.ndarray, threshold: float) -> tuple[list[tuple[int, int]], int]:
    """``near_pairs``, and how many pairs there are in all."""
    z = _standardised(gray)
    level = gray.mean((1, 2))
    pairs: list[tuple[int, int]] = []
    total = 0
    for start in range(0, len(z), 1024):
        scores = z[start : start + 1024] @ z[: start + 1024].T
        for row, column in zip(*np.nonzero(scores >= threshold), strict=True):
            j = start + int(row)
            if column < j and abs(level[column] - level[j]) < 16:
                total += 1
                if not pairs or pairs[-1][1] != j:
                    pairs.append((int(column), j))
    return pairs, total


def uprightness(gray: np.ndarray) -> float:
    """Squared distance between the mean image and its quarter turns over what chance gives; about 1 if none is up."""
    z = _standardised(gray).reshape(gray.shape)
    if len(z) < 2:
        return 0.0
    turned = [np.rot90(z, k, axes=(1, 2)) for k in (1, 2, 3)]
    values = []
    for other in turned:
        difference = z - other
        chance = difference.var(0, ddof=1).sum() / len(z)
        values.append(float((difference.mean(0) ** 2).sum() / max(chance, 1e-12)))
    return float(np.mean(values))


def alikeness(gray: np.ndarray) -> float:
    """Mean correlation between the thumbnails of two different images."""
    z = _standardised(gray)
    n = len(z)
    if n < 2:
        return 0.0
    return float(((z.sum(0) ** 2).sum() - (z**2).sum()) / (n * (n - 1)))


def propose(survey: Survey) -> tuple[str, str]:
    """A view preset and the measured reason for it. Thresholds are ours, stated in ``docs/own-images.md``."""
    if survey.readable < 2:
        return "photos", "too few images to tell"
    radiographs = sum(count for kind, count in survey.formats.items() if kind.startswith("DICOM MONOCHROME"))
    if 2 * radiographs > survey.readable:
        return "xray", f"{radiographs} of {survey.readable} images are grey DICOM"
    if survey.alike > _ALIKE:
        reason = f"the images resemble each other (mean correlation {survey.alike:.2f}, above {_ALIKE})"
        return "inspection", f"{reason}: small differences count"
    if survey.readable >= _ENOUGH and survey.upright < _UPRIGHT:
        reason = f"no side is up (the mean image and its rotations differ by {survey.upright:.1f} × chance"
        return "aerial", f"{reason}, below {_UPRIGHT:.0f})"
    gray = f"{100 * survey.gray_share:.0f} % of the images are grey"
    return (
        ("gray", gray) if survey.gray_share > 0.95 else ("photos", f"different scenes with a side that is up; {gray}")
    )
