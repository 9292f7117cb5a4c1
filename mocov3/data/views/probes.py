"""Views to judge features by, of kinds that no preset trains on: rotated, zoomed, shifted, noisy.

Like all draws they are a function of (seed, image, view) alone. ``mocov3.evaluation.label_free`` compares their
features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from mocov3.config.presets import RGB, Reading
from mocov3.data.views.copies import GIANT, is_giant
from mocov3.data.views.decode import DecodeError
from mocov3.data.views.two_views import CentreView, written

_STREAM = 2104  # apart from every stream of ``mocov3.data.views.draws``
_ANGLE = 15.0
"""Degrees, either way."""
_ZOOM = (0.8, 1.25)
_SHIFT = 0.1
"""Share of the side, either way."""
_GAMMA = (0.7, 1.4)
_NOISE = 8.0
"""Largest standard deviation of the noise, in levels of 255."""


@dataclass(frozen=True)
class ProbeViews:
    """The evaluation view, then ``probes`` changed versions of it.

    Args:
        image_size: side of the views in pixels.
        zoom: of the evaluation view, as in ``CentreView``.
        probes: changed versions.
    """

    image_size: int = 224
    zoom: float = 256 / 224
    probes: int = 4
    reading: Reading = RGB
    giants: bool = True
    """Whether images that take seconds to decode are seen; else they count as unreadable."""
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", 1 + self.probes)

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int = 0,
        epoch: int = 0,
        index: int = 0,
        out: Sequence[np.ndarray] | np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """uint8 (side, side, channels) each, written to ``out`` if given; ``epoch`` changes nothing.

        Raises:
            DecodeError: if the image cannot be read, or is a giant and these are not seen.
        """
        if not self.giants and is_giant(data):
            raise DecodeError(f"more than {GIANT / 1e6:.0f} million pixels")
        (centre,) = CentreView(self.image_size, self.zoom, reading=self.reading)(data)
        views = [centre, *(_changed(centre, seed, index, probe) for probe in range(self.probes))]
        written(views, out)
        return tuple(views)


def _changed(pixels: np.ndarray, seed: int, index: int, probe: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=[seed, _STREAM + probe], counter=[0, 0, index, 0]))
    angle, zoom, across, down, gamma, noise = rng.random(6)
    side = pixels.shape[0]
    centre = (side - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), _ANGLE * (2 * angle - 1), _between(zoom, *_ZOOM))
    matrix[:, 2] += _SHIFT * side * (2 * np.array([across, down]) - 1)
    moved = cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = moved.reshape(pixels.shape)  # OpenCV leaves out a single channel
    levels = 255 * (moved / 255) ** _between(gamma, *_GAMMA) + rng.normal(0, _NOISE * noise, (side, side, 1))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _between(u: float, low: float, high: float) -> float:
    return float(low * (high / low) ** u)
