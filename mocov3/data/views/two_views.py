"""Bytes → views: the two augmented views of an image (BYOL's augmentations, as MoCo v3 uses them), and the centre.

An image is decoded once for both views, smaller where no crop needs the whole size; ``operations`` applies the draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image

from mocov3.config.local_views import LocalViews
from mocov3.config.presets import PRESETS, RGB, Reading, ViewPreset
from mocov3.data.views import native
from mocov3.data.views.copies import Copies, factor_of
from mocov3.data.views.decode import SHRINKS, ImageBytes
from mocov3.data.views.draws import COLOUR_DRAWS, Draw, colour_draw, draw_all, pad_pixels, without_colour
from mocov3.data.views.operations import Pixels, apply_draws

_COMPILED = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_TALL = 2
"""Images more times as high as wide are left to Pillow, which from 13 on begins with their columns, not their rows."""
_LONGEST = 4
"""Images this many times as long as wide are not resized whole before their centre is cut out."""
_SHARPNESS = 1.5
"""A JPEG is decoded smaller only where every crop still has this many times the pixels of the view, a side."""


@dataclass(frozen=True)
class TwoViews:
    """Two augmented views of an image.

    Args:
        image_size: side of the views in pixels.
        crop_min: smallest crop as a share of the image's area.
        preset: strengths and probabilities; a name of ``mocov3.config.PRESETS`` or a ``ViewPreset``.
        backend: ``fast``, or ``pillow`` for the reference's operations (``native`` and ``library``: see
            ``mocov3.data.views.operations``).
        crop_only: stop after crop, resize and flip; what is left is written to ``colour_draws``, for
            ``mocov3.data.device.colours`` to do on a device.
        local: small crops beside the two views, of another size.
        copies: smaller copies of large images, which views are cut from; not by ``pillow``.
    """

    image_size: int = 224
    crop_min: float = 0.08
    preset: str | ViewPreset = "photos"
    backend: str = "fast"
    crop_only: bool = False
    local: LocalViews | None = None
    copies: Copies | None = None
    count: int = field(default=2, init=False)

    @property
    def colour_draws(self) -> int:
        """Numbers that go with a view."""
        return COLOUR_DRAWS if self.crop_only else 0

    @property
    def reading(self) -> Reading:
        """How images are read, by the preset."""
        return self._preset.reading

    @property
    def _preset(self) -> ViewPreset:
        return PRESETS[self.preset] if isinstance(self.preset, str) else self.preset

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int,
        epoch: int,
        index: int,
        out: Sequence[Pixels] | np.ndarray | None = None,
        colour_draws: np.ndarray | None = None,
        local_out: Sequence[Pixels] | np.ndarray | None = None,
    ) -> tuple[Pixels, ...]:
        """The views of the image in ``data`` (file bytes or uint8 pixels), written to ``out`` if given.

        Local views follow the two, and are written to ``local_out``. With ``crop_only``, what is left to do is written
        to ``colour_draws``, float32 (views, ``COLOUR_DRAWS``).

        Raises:
            DecodeError: if the image cannot be read.
        """
        shrink: float | tuple[float, float]
        factor = self.copy_factor(data)
        image = None if factor > 1 else ImageBytes(data, self.reading)
        if image is not None:
            width, height = image.width, image.height
        else:
            assert self.copies is not None
            assert isinstance(data, bytes)
            pixels, (width, height), shrink = self.copies.pixels(data, self.reading, factor)
        choices = self._choices(width, height, seed=seed, epoch=epoch, index=index)
        if self.crop_only:
            if colour_draws is not None:
                colour_draws[:] = [colour_draw(choice) for choice in choices]
            choices = [without_colour(choice) for choice in choices]
        sides = [self.image_size] * 2 + [self.local.pixels if self.local else 0] * (len(choices) - 2)
        if image is not None:
            pixels, shrink = self._pixels(image, choices, sides)
        places: list[Pixels | None] = [None] * len(choices)
        if out is not None:
            places = [*out, *(local_out if local_out is not None else places[2:])]
        return apply_draws(pixels, choices, sides, self.backend, shrink, places)

    def _pixels(self, image: ImageBytes, choices: Sequence[Draw], sides: Sequence[int]) -> tuple[Pixels, float]:
        """Pixels for the draws, with the preset's border, and by how much they are smaller."""
        pad = pad_pixels(self._preset, image.width, image.height)
        whole = pad or self.backend == "pillow"
        pixels, shrink = image.pixels(1 if whole else _shrink(choices, sides))
        return _padded(pixels, pad) if pad else pixels, shrink

    def copy_factor(self, data: bytes | np.ndarray) -> int:
        """How many times smaller a copy serves all views of an image; 1: the image itself is taken."""
        if self.copies is None or self.backend == "pillow" or not isinstance(data, bytes):
            return 1
        views = [(self.crop_min, self.image_size)]
        if self.local is not None:
            views.append((self.local.smallest, self.local.pixels))
        return factor_of(data, self._preset, views)

    def _choices(self, width: int, height: int, *, seed: int, epoch: int, index: int) -> list[Draw]:
        """The draws of all views, local ones last."""
        crops = [(self.crop_min, 1.0)] * 2
        if self.local is not None:
            crops += [(self.local.smallest, self.local.largest)] * self.local.count
        return draw_all(self._preset, crops, width, height, seed=seed, epoch=epoch, index=index)


def written(views: Sequence[Pixels], out: Sequence[Pixels] | np.ndarray | None) -> None:
    """Write views to ``out``, if there is one."""
    if out is not None:
        for place, view in zip(out, views, strict=True):
            place[...] = view


def _padded(pixels: Pixels, pad: int) -> Pixels:
    if pixels.shape[2] == 3:  # ten times as fast on small images
        return cv2.copyMakeBorder(pixels, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    return np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))


def _shrink(choices: Sequence[Draw], sides: Sequence[int]) -> int:
    room = min(min(c.height, c.width) / (side * _SHARPNESS) for c, side in zip(choices, sides, strict=True))
    return next((shrink for shrink in SHRINKS if room >= shrink), 1)


@dataclass(frozen=True)
class CentreView:
    """The evaluation view: shorter side resized to ``round(image_size · zoom)``, then the centre cut out."""

    image_size: int = 224
    zoom: float = 256 / 224
    resample: Image.Resampling = Image.Resampling.BILINEAR
    reading: Reading = RGB
    count: int = field(default=1, init=False)

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int = 0,
        epoch: int = 0,
        index: int = 0,
        out: Sequence[Pixels] | np.ndarray | None = None,
    ) -> tuple[Pixels]:
        """The view of the image in ``data``; seed, epoch and index are accepted and change nothing."""
        pixels = ImageBytes(data, self.reading).pixels()[0]
        if self.reading.channels == 3:
            pixels = self._of(pixels)
        else:
            pixels = np.stack([self._of(pixels[..., c]) for c in range(self.reading.channels)], 2)
        written([pixels], out)
        return (pixels,)

    def _of(self, pixels: Pixels) -> Pixels:
        side, size = round(self.image_size * self.zoom), self.image_size
        lengths = pixels.shape[:2]
        short = min(lengths)
        height, width = resized = [max(side * n // short, side) for n in lengths]
        top, left = corner = [round((n - size) / 2) for n in resized]
        compiled = self.resample in _COMPILED and pixels.ndim == 3 and lengths[0] <= _TALL * lengths[1]
        if compiled and min(corner) >= 0 and native.available():
            cubic = self.resample == Image.Resampling.BICUBIC
            return native.centre(np.ascontiguousarray(pixels), (height, width), (top, left), size, cubic=cubic)
        if max(resized) > _LONGEST * side:
            return _part(pixels, [n / r for n, r in zip(lengths, resized, strict=True)], corner, size, self.resample)
        image = _image(pixels)
        if short != side:
            image = image.resize((width, height), self.resample)
        return np.asarray(image.crop((left, top, left + size, top + size)))


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _part(
    pixels: Pixels, scales: Sequence[float], corner: Sequence[int], size: int, resample: Image.Resampling
) -> Pixels:
    """The square at ``corner`` (row, column) of ``pixels`` made 1/``scales`` as large, without making the rest.

    Equals the cut but for rounding: Pillow takes the bounds of a part in 32 bits, and may begin with the other axis.
    """
    cut, bounds = [], []
    for length, scale, begin in zip(pixels.shape, scales, corner, strict=False):
        first, last = begin * scale, min((begin + size) * scale, length)
        reach = 3 * max(scale, 1.0) + 1  # in pixels of Lanczos, the widest filter
        cut.append(slice(max(int(first - reach), 0), int(last + reach) + 1))
        bounds.append((first - cut[-1].start, last - cut[-1].start))
    (top, bottom), (left, right) = bounds
    return np.asarray(_image(pixels[tuple(cut)]).resize((size, size), resample, box=(left, top, right, bottom)))
