"""Draws → pixels: the two augmented views of a picture (BYOL's augmentations, as MoCo v3 uses them).

``pillow`` applies the reference's own operations and is the standard; ``fast`` applies the same draws by OpenCV
and look-up tables, compared with the standard in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mocov3.config.presets import PRESETS, ViewPreset
from mocov3.data.decode import decode
from mocov3.data.draws import Draw, draw, pad_pixels

Pixels = np.ndarray
"""uint8, (height, width, 3), RGB."""


@dataclass(frozen=True)
class TwoViews:
    """Two augmented views of a picture.

    Args:
        image_size: side of the views in pixels.
        crop_min: smallest crop as a share of the picture's area.
        preset: strengths and probabilities; a name of ``mocov3.config.PRESETS`` or a ``ViewPreset``.
        backend: ``fast`` or ``pillow``.
    """

    image_size: int = 224
    crop_min: float = 0.08
    preset: str | ViewPreset = "photos"
    backend: str = "fast"
    count: int = field(default=2, init=False)

    def __call__(
        self,
        data: bytes | np.ndarray,
        *,
        seed: int,
        epoch: int,
        index: int,
        out: Sequence[Pixels] | np.ndarray | None = None,
    ) -> tuple[Pixels, Pixels]:
        """The views of the picture in ``data`` (file bytes or uint8 pixels), written to ``out`` if given.

        Raises:
            DecodeError: if the picture cannot be read.
        """
        image = decode(data)
        preset = PRESETS[self.preset] if isinstance(self.preset, str) else self.preset
        apply = _apply_fast if self.backend == "fast" else _apply_pillow
        width, height = image.size
        if pad := pad_pixels(preset, width, height):
            image = ImageOps.expand(image, pad)
        views = []
        for view in range(2):
            choice = draw(preset, self.crop_min, width, height, seed=seed, epoch=epoch, index=index, view=view)
            pixels = apply(image, choice, self.image_size)
            if out is not None:
                out[view][...] = pixels
                pixels = out[view]
            views.append(pixels)
        return views[0], views[1]


@dataclass(frozen=True)
class CentreView:
    """The evaluation view: shorter side resized to ``round(image_size · zoom)``, then the centre cut out."""

    image_size: int = 224
    zoom: float = 256 / 224
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
        """The view of the picture in ``data``; seed, epoch and index are accepted and change nothing."""
        image = decode(data)
        side = round(self.image_size * self.zoom)
        width, height = image.size
        short = min(width, height)
        if short != side:
            image = image.resize(
                (max(side * width // short, side), max(side * height // short, side)),
                Image.Resampling.BILINEAR,
            )
        width, height = image.size
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        box = (left, top, left + self.image_size, top + self.image_size)
        pixels = np.asarray(image.crop(box))
        if out is not None:
            out[0][...] = pixels
            pixels = out[0]
        return (pixels,)


def apply_draw(image: Image.Image, choice: Draw, size: int, backend: str = "pillow") -> Pixels:
    """One view of the (padded) picture, as (size, size, 3)."""
    return (_apply_fast if backend == "fast" else _apply_pillow)(image, choice, size)


def _resized(image: Image.Image, choice: Draw, size: int) -> Image.Image:
    box = (choice.left, choice.top, choice.left + choice.width, choice.top + choice.height)
    return image.crop(box).resize((size, size), Image.Resampling.BILINEAR)


# --- the standard: Pillow ---------------------------------------------------------------------------------


def _apply_pillow(image: Image.Image, choice: Draw, size: int) -> Pixels:
    image = _resized(image, choice, size)
    if choice.jitter:
        order, brightness, contrast, saturation, hue = choice.jitter
        for operation in order:
            if operation == 0:
                image = ImageEnhance.Brightness(image).enhance(brightness)
            elif operation == 1:
                image = ImageEnhance.Contrast(image).enhance(contrast)
            elif operation == 2:
                image = ImageEnhance.Color(image).enhance(saturation)
            else:
                image = _turn_hue(image, hue)
    if choice.gray:
        image = Image.merge("RGB", [image.convert("L")] * 3)
    if choice.blur_sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(choice.blur_sigma))
    if choice.solarize:
        image = ImageOps.solarize(image, 128)
    if choice.flip:
        image = ImageOps.mirror(image)
    return np.asarray(image)


def _turn_hue(image: Image.Image, factor: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = np.asarray(h) + np.uint8(int(factor * 255) % 256)  # wraps around, as hues do
    return Image.merge("HSV", (Image.fromarray(turned), s, v)).convert("RGB")


# --- fast: the same draws by OpenCV and look-up tables ----------------------------------------------------

_LEVELS = np.arange(256, dtype=np.float64)
_SOLARIZED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)


def _apply_fast(image: Image.Image, choice: Draw, size: int) -> Pixels:
    pixels = np.asarray(_resized(image, choice, size))
    if choice.jitter:
        order, brightness, contrast, saturation, hue = choice.jitter
        for operation in order:
            if operation == 0 and brightness != 1:
                pixels = cv2.LUT(pixels, _table(_LEVELS * brightness))
            elif operation == 1 and contrast != 1:
                mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
                pixels = cv2.LUT(pixels, _table(mean + contrast * (_LEVELS - mean)))
            elif operation == 2 and saturation != 1:
                # Pillow cuts fractions off where OpenCV rounds
                pixels = cv2.addWeighted(pixels, saturation, _gray(pixels), 1 - saturation, -0.5)
            elif operation == 3 and (shift := int(hue * 255) % 256):
                hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
                hsv[..., 0] += np.uint8(shift)
                pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    if choice.gray:
        pixels = _gray(pixels)
    if choice.blur_sigma is not None:
        pixels = cv2.GaussianBlur(pixels, (0, 0), choice.blur_sigma, borderType=cv2.BORDER_REPLICATE)
    if choice.solarize:
        pixels = cv2.LUT(pixels, _SOLARIZED)
    if choice.flip:
        pixels = cv2.flip(pixels, 1)
    return pixels


def _table(levels: np.ndarray) -> np.ndarray:
    return np.clip(levels, 0, 255).astype(np.uint8)  # Pillow cuts fractions off too


def _gray(pixels: Pixels) -> Pixels:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
