"""Small images for a page: encoded, laid out in one, coloured. Pillow and OpenCV; no network."""

import base64
import io
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageOps

from mocov3.output.sheet import contained

THUMB = 44
"""Side of a thumbnail, in pixels."""


def encoded(image: Image.Image, quality: int = 82) -> str:
    """A JPEG as a data address."""
    out = io.BytesIO()
    image.convert("RGB").save(out, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def thumbnail(image: Image.Image, side: int = THUMB) -> Image.Image:
    """The image's centre square, ``side`` pixels wide."""
    return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)


def sprite(thumbs: Sequence[Image.Image], columns: int, side: int = THUMB) -> Image.Image:
    """Thumbnails in rows of ``columns``."""
    rows = -(-max(len(thumbs), 1) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, thumb in enumerate(thumbs):
        sheet.paste(thumb, (i % columns * side, i // columns * side))
    return sheet


def boxed(
    image: Image.Image, boxes: Sequence[tuple[float, float, float, float]], colours: Sequence[str], side: int
) -> Image.Image:
    """The image at most ``side`` wide and high, with boxes (left, top, right, bottom in its pixels) drawn on it."""
    shown = contained(image.convert("RGB"), side)
    scale = shown.width / image.width
    pen = ImageDraw.Draw(shown)
    for box, colour in zip(boxes, colours, strict=True):
        left, top, right, bottom = (v * scale for v in box)
        right, bottom = max(right - 1, left), max(bottom - 1, top)
        pen.rectangle((left, top, right, bottom), outline=colour, width=2)
    return shown


def heated(
    image: UInt8[np.ndarray, "height width 3"], heat: Float[np.ndarray, "rows columns"], side: int
) -> Image.Image:
    """An image under a map of ``heat``, from its lowest (dark) to its highest (yellow) value, ``side`` pixels wide."""
    low, high = float(heat.min()), float(heat.max())
    grey = np.uint8(np.rint(255 * (heat - low) / max(high - low, 1e-12)))
    colour = cv2.applyColorMap(
        cv2.resize(np.asarray(grey), (side, side), interpolation=cv2.INTER_CUBIC), cv2.COLORMAP_INFERNO
    )
    base = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    mixed = cv2.addWeighted(base, 0.4, np.ascontiguousarray(colour[:, :, ::-1]), 0.6, 0)
    return Image.fromarray(mixed)
