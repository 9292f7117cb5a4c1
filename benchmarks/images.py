"""Images to time with, cut from photographs that scikit-learn and scikit-image ship; the same for every run.

Nothing is enlarged: large images are mosaics of whole photographs, so that a pixel holds as much detail as in a
photograph of that size seen closely.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

MIX = [((500, 375), 9), ((500, 333), 4), ((375, 500), 4), ((333, 500), 1), ((640, 480), 1), ((250, 200), 1)]
"""ImageNet-like: sizes in pixels and how many of twenty images have them."""


def photographs() -> list[Image.Image]:
    """Six photographs, 300–640 pixels a side."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    arrays = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    arrays += [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    return [Image.fromarray(np.asarray(a)) for a in arrays]


def cut(photograph: Image.Image, width: int, height: int, place: float) -> Image.Image:
    """The largest part of the ratio width/height, at a place from 0 to 1, resized to that size."""
    w, h = photograph.size
    scale = min(w / width, h / height)
    cw, ch = width * scale, height * scale
    left, top = (w - cw) * place, (h - ch) * place
    return photograph.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + cw, top + ch))


def several(width: int, height: int, count: int) -> Iterator[Image.Image]:
    """``count`` different images of one size."""
    sources = photographs()
    for i in range(count):
        yield cut(sources[i % len(sources)], width, height, (i // len(sources)) / max(1, (count - 1) // len(sources)))


def mosaic(width: int, height: int, shift: int = 0) -> Image.Image:
    """A large image of photographs side by side."""
    sources = [cut(p, 500, 375, 0.5) for p in photographs()]
    image = Image.new("RGB", (width, height))
    for row, top in enumerate(range(0, height, 375)):
        for column, left in enumerate(range(0, width, 500)):
            image.paste(sources[(2 * row + column + shift) % len(sources)], (left, top))
    return image


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    """As a baseline JPEG, colour at half resolution."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """As PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tiff16(image: Image.Image) -> bytes:
    """Grey at 16 bits a pixel, deflated, as microscopes write."""
    values = np.asarray(image.convert("L")).astype(np.uint16) << 8
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 64, values.shape, dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values + noise).save(buffer, "TIFF", compression="tiff_deflate")
    return buffer.getvalue()


def folder(root: Path, count: int, quality: int = 85, distinct: int = 8192) -> Path:
    """A folder of ``count`` JPEGs of 500 × 375 pixels, from 24 images; those beyond ``distinct`` are links."""
    files = [jpeg(p, quality) for p in several(500, 375, 24)]
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        file = root / f"{i:06d}.jpg"
        if i < distinct:
            file.write_bytes(files[i % len(files)])
        else:
            file.hardlink_to(root / f"{i % distinct:06d}.jpg")
    return root
