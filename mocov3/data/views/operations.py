"""Draw → pixels of one view, in three ways that give the same image.

``pillow`` applies the reference's own operations and is the baseline. ``native`` is the compiled kernel, ``library``
the same draws by Pillow's resize, OpenCV and look-up tables, where the kernel was not built; the tests compare both
with the baseline. ``fast`` is the better of the two here.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mocov3.data.views import native
from mocov3.data.views.draws import Draw

Pixels = np.ndarray
"""uint8, (height, width, 3), RGB."""

_FARTHEST = 40
"""Crops this many times larger than the view are resized by Pillow: the kernel's 16-bit sums are for fewer terms."""


def apply_draws(
    pixels: Pixels | Image.Image,
    choices: Sequence[Draw],
    sizes: Sequence[int],
    backend: str = "pillow",
    shrink: float | tuple[float, float] = 1,
    out: Sequence[Pixels | None] = (),
) -> tuple[Pixels, ...]:
    """Views of a (padded) image, as (size, size, channels) each, written to ``out`` where that has a place.

    Images of other than three channels know no saturation, hue or grey; their contrast is about the mean of all
    channels.

    Args:
        pixels: of the image, ``shrink`` times smaller than what the draws were made for.
        choices: what happens, for each view.
        sizes: sides of the views in pixels.
        backend: ``fast``, ``native``, ``library`` or ``pillow``.
        shrink: 1, or by how much the image was decoded smaller, one number or one down and one across.
        out: for each view ``None``, or where it goes: contiguous, (size, size, channels).
    """
    if isinstance(pixels, Image.Image):
        pixels = np.asarray(pixels)
    places = out or [None] * len(choices)
    if backend in ("fast", "native") and pixels.shape[2] == 3 and native.available():
        boxes = [_box(choice, shrink, pixels) for choice in choices]
        near = all(max(box[2], box[3]) <= _FARTHEST * size for box, size in zip(boxes, sizes, strict=True))
        if near and all(map(_kernel_takes, choices)):
            return _by_kernel(pixels, choices, boxes, sizes, places)
    given = zip(choices, sizes, places, strict=True)
    return tuple(_applied(pixels, choice, size, backend, shrink, place) for choice, size, place in given)


def apply_draw(
    pixels: Pixels | Image.Image,
    choice: Draw,
    size: int,
    backend: str = "pillow",
    shrink: float | tuple[float, float] = 1,
    out: Pixels | None = None,
) -> Pixels:
    """One view of an image; see ``apply_draws``."""
    return apply_draws(pixels, [choice], [size], backend, shrink, [out])[0]


def _by_kernel(
    pixels: Pixels,
    choices: Sequence[Draw],
    boxes: Sequence[tuple[float, float, float, float]],
    sizes: Sequence[int],
    places: Sequence[Pixels | None],
) -> tuple[Pixels, ...]:
    wanted, views = [], []
    for choice, box, size, place in zip(choices, boxes, sizes, places, strict=True):
        in_place = place is not None and place.flags.c_contiguous and not (choice.flip_vertical or choice.turns)
        views.append(place if place is not None and in_place else np.empty((size, size, 3), np.uint8))
        blur = choice.blur_sigma or 0.0
        wanted.append(native.View(box, choice.flip, choice.jitter, choice.gray, blur, choice.solarize))
    native.views(pixels, wanted, views)
    return tuple(
        view if view is place else _put(turned(view, choice), place)
        for view, choice, place in zip(views, choices, places, strict=True)
    )


def _applied(
    pixels: Pixels, choice: Draw, size: int, backend: str, shrink: float | tuple[float, float], out: Pixels | None
) -> Pixels:
    """One view, not by the kernel unless its crop is first made smaller."""
    if pixels.shape[2] != 3:
        return _put(_without_colours(pixels, choice, size, backend, shrink), out)
    box = _box(choice, shrink, pixels)
    if backend in ("fast", "native") and native.available() and _kernel_takes(choice):
        if max(box[2], box[3]) > _FARTHEST * size:
            pixels, box = np.asarray(_resized(pixels, box, size)), (0, 0, size, size)
        return _by_kernel(pixels, [choice], [box], [size], [out])[0]
    if backend == "pillow":
        view = _by_pillow(_resized(pixels, box, size), choice)
    else:
        view = _by_library(np.asarray(_resized(pixels, box, size)), choice)
    return _put(turned(view, choice), out)


def _put(view: Pixels, out: Pixels | None) -> Pixels:
    if out is None or view is out:
        return view
    out[...] = view
    return out


def _box(choice: Draw, shrink: float | tuple[float, float], pixels: Pixels) -> tuple[float, float, float, float]:
    """Top, left, height and width of a crop in pixels of a smaller image."""
    if isinstance(shrink, tuple):  # by fractions: rounding must not lead out of the image
        top, left = choice.top / shrink[0], choice.left / shrink[1]
        rows, columns = pixels.shape[:2]
        return top, left, min(choice.height / shrink[0], rows - top), min(choice.width / shrink[1], columns - left)
    return choice.top / shrink, choice.left / shrink, choice.height / shrink, choice.width / shrink


def _without_colours(
    pixels: Pixels, choice: Draw, size: int, backend: str, shrink: float | tuple[float, float]
) -> Pixels:
    """A view of an image of one channel, or of many."""
    if choice.jitter:
        order, brightness, contrast, *_ = choice.jitter
        choice = choice._replace(jitter=(order, brightness, contrast, 1.0, 0.0))
    if pixels.shape[2] == 1:  # as the grey image that it is, in colour
        rgb = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        return apply_draw(rgb, choice._replace(gray=False), size, backend, shrink)[..., :1]
    box = _box(choice, shrink, pixels)
    planes = [np.asarray(_resized(pixels[..., c], box, size)) for c in range(pixels.shape[2])]
    return turned(_by_library(np.stack(planes, 2), choice._replace(gray=False)), choice)


def turned(pixels: Pixels, choice: Draw) -> Pixels:
    """The last part of a draw, the same for every backend: upside down, then quarter turns of the square view."""
    if choice.flip_vertical:
        pixels = pixels[::-1]
    return np.rot90(pixels, choice.turns) if choice.turns else pixels


def _kernel_takes(choice: Draw) -> bool:
    return native.takes(choice.jitter[1:4] if choice.jitter else (1.0, 1.0, 1.0), choice.blur_sigma or 0.0)


def _resized(pixels: Pixels, box: tuple[float, float, float, float], size: int) -> Image.Image:
    top, left, height, width = box
    first, begin = int(top), int(left)
    last, end = -int(-(top + height) // 1), -int(-(left + width) // 1)
    crop = Image.fromarray(pixels[first:last, begin:end])  # no pixel outside is looked at, as when a crop is resized
    inner = (left - begin, top - first, left - begin + width, top - first + height)
    return crop.resize((size, size), Image.Resampling.BILINEAR, box=inner)


# --- the standard: Pillow ---------------------------------------------------------------------------------


def _by_pillow(image: Image.Image, choice: Draw) -> Pixels:
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


# --- the same draws by OpenCV and look-up tables ----------------------------------------------------------

_LEVELS = np.arange(256, dtype=np.float64)
_SOLARIZED = np.where(_LEVELS < 128, _LEVELS, 255 - _LEVELS).astype(np.uint8)


def _by_library(pixels: Pixels, choice: Draw) -> Pixels:
    if choice.jitter:
        order, brightness, contrast, saturation, hue = choice.jitter
        for operation in order:
            if operation == 0 and brightness != 1:
                pixels = cv2.LUT(pixels, _table(_LEVELS * brightness))
            elif operation == 1 and contrast != 1:
                gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2] == 3 else pixels
                mean = int(float(gray.mean()) + 0.5)
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
    table: np.ndarray = np.clip(levels, 0, 255).astype(np.uint8)  # Pillow cuts fractions off too
    return table


def _gray(pixels: Pixels) -> Pixels:
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
