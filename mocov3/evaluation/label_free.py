"""Quality of a network, judged without labels: held-out images, views of kinds never trained on, seven measures.

Sources of the measures: ``mocov3.evaluation.quality``. How each correlates with k-NN accuracy:
``docs/own-images.md``.
"""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.data import Loader, Source, Work
from mocov3.data.device.pixels import normalise
from mocov3.data.sources.survey import scattered
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.distributed.sharding import gathered
from mocov3.evaluation import quality
from mocov3.evaluation.features import Extractor
from mocov3.models.precision import frozen_precision
from mocov3.output.log import warn, warn_once

IMAGES = 2000
"""More images are not used: a draw of this many tells networks apart."""
_PIXELS = 16
_SEED = 0
_SMALL = 500 * 64 * 64
"""Pixels that one process reads before others have started."""
_KEPT = 256 << 20
"""Bytes of views that are kept."""

_Pixels = tuple[np.ndarray, np.ndarray]
"""Pixels of some images, and the images' indices."""


@dataclass(frozen=True)
class LabelFreeQuality:
    """One network's measures."""

    images: int
    retrieval: float
    """Share in % of images retrieved among all by another view."""
    rankme: float
    alpha: float
    lidar: float
    alignment: float
    uniformity: float
    dimension: float = float("nan")
    """Intrinsic, by trees."""

    def as_dict(self) -> dict[str, float]:
        """Name → value, for JSON; there ``images`` has been called ``pictures`` from the first version."""
        values = asdict(self)
        return {"pictures": values.pop("images"), **values}


def judge(views: Float[Tensor, "images views dim"], groups: np.ndarray | None = None) -> LabelFreeQuality:
    """Measures of features: view 0 is the evaluation view, the others its changed versions (three or more in all).

    An image is not sought among others of its own of the ``groups``, as near-copies can't be told from it.

    Where features are not finite, nothing counts as retrieved, and the other measures are NaN; a line says so.
    """
    if bad := int((~torch.isfinite(views).flatten(1).all(1)).sum()):
        warn(f"features of {bad} of {len(views)} images are not finite: quality without labels is not measured")
        nothing = float("nan")
        return LabelFreeQuality(len(views), 0.0, nothing, nothing, nothing, nothing, nothing)
    return LabelFreeQuality(
        images=len(views),
        retrieval=quality.retrieval(views[:, 1], views[:, 2], groups),
        rankme=quality.rankme(views[:, 0]),
        alpha=quality.alpha_req(views[:, 0]),
        lidar=quality.lidar(views[:, 1:]),
        alignment=quality.alignment(views[:, 1], views[:, 2]),
        uniformity=quality.uniformity(views[:, 0]),
        dimension=quality.tree_dimension(views[:, 0]),
    )


class ViewsToJudge:
    """All views of at most ``IMAGES`` images of a source, for one network after the other: read once where they take
    256 MB or less, else for every network again.

    Args:
        source: images.
        view: how they are seen.
        world: this rank; the images are divided among the ranks.
        workers: loading processes; none start for a few small views.
        batch_size: images at a time.
    """

    def __init__(
        self, source: Source, view: ProbeViews, *, world: World, workers: int = 0, batch_size: int = 64
    ) -> None:
        self.source, self.view, self.world = source, view, world
        drawn = scattered(len(source), IMAGES)
        self.workers = workers if len(drawn) * view.image_size**2 > _SMALL else 0
        self.batch_size = batch_size
        self._mine = np.array_split(drawn, world.size)[world.rank]
        size = len(self._mine) * view.count * view.image_size**2 * view.reading.channels
        self._kept: list[_Pixels] | None = None
        self.seconds_kept = 0.0
        """How long reading took what is kept."""
        self._keeps = size <= _KEPT

    def batches(self) -> Generator[_Pixels, None, None]:
        """uint8 pixels (views, images, height, width, channels), valid until the next are asked for, and the images'
        indices; unreadable images are left out.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[_Pixels] = []
        seconds, began = 0.0, time.monotonic()
        for pixels, indices in self._read():
            if self._keeps:
                kept.append((pixels.copy(), indices))
            seconds += time.monotonic() - began
            yield pixels, indices
            began = time.monotonic()
        if self._keeps:
            self._kept, self.seconds_kept = kept, seconds + time.monotonic() - began

    def _read(self) -> Generator[_Pixels, None, None]:
        size = self.batch_size
        works = [Work(0, i, self._mine[i : i + size]) for i in range(0, len(self._mine), size)]
        loader = Loader(
            self.source, self.view, batch_size=size, seed=_SEED, workers=self.workers, replace=False, say=warn_once
        )
        with loader:
            for batch in loader.run(works):
                bad = [corrupt.index for corrupt in batch.corrupt]
                keep = ~np.isin(batch.work.indices, bad)
                if keep.any():
                    yield batch.pixels[:, keep] if bad else batch.pixels, batch.work.indices[keep]


def features_of_views(
    extractor: Extractor, images: ViewsToJudge
) -> tuple[Float[Tensor, "images views dim"], np.ndarray]:
    """Features of all views, on every rank's CPU as float32, and the images' indices, on every rank those of all.

    The network is temporarily in evaluation mode. Images are seen as ``images`` says, and normalised as ``extractor``.
    """
    network, features, _, mean, std = extractor
    world = images.world
    arithmetic = frozen_precision("auto", world.device)
    training = network.training
    network.eval()
    parts, read = [torch.empty(0)], [np.empty(0, dtype=np.int64)]
    try:
        with torch.no_grad(), gathered(network), closing(images.batches()) as batches:
            for pixels, indices in batches:
                with arithmetic.autocast():
                    rows = [features(normalise(p, world.device, mean, std)).float() for p in pixels]
                parts.append(torch.stack(rows, 1).cpu())
                read.append(indices)
    finally:
        network.train(training)
    everyone = world.gather((_joined(parts), np.concatenate(read)))
    return _joined([features for features, _ in everyone]), np.concatenate([indices for _, indices in everyone])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part for part in parts if part.numel()] or parts[:1])


def pixel_features(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
    """The images themselves, at 16×16: the baseline for a network."""
    return nn.functional.adaptive_avg_pool2d(x, _PIXELS).flatten(1)
