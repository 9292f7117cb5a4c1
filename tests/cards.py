"""Unusual image files, our evaluation view of them, and the code of a model card run on them as a reader would."""

import functools
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mocov3.config.presets import RGB
from mocov3.data import CentreView

IMAGE = "image.jpg"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(width, height, channels=3):
    coarse = np.random.default_rng(width * height).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height))) for c in range(channels)]
    return np.stack(planes, 2)


def saved(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@functools.cache
def files():
    """Bytes by what is unusual; other than those an export compares itself on."""
    rgb = lambda *size: Image.fromarray(pixels(*size))
    grey = pixels(85, 97)[..., 0]
    return {
        "odd borders": saved(rgb(333, 180)),
        "wide": saved(rgb(301, 83), "JPEG", quality=90),
        "tall": saved(rgb(77, 211), "WEBP"),
        **{f"EXIF {i}": saved(rgb(93, 61), "JPEG", exif=turned(i)) for i in (2, 3, 5, 8)},
        "EXIF of PNG": saved(rgb(93, 61), exif=turned(7)),
        "palette": saved(rgb(70, 99).quantize(9), transparency=bytes([90, 0] + [255] * 7)),
        "colour key": saved(Image.fromarray(grey), transparency=int(grey[3, 3])),
        "GIF": saved(rgb(64, 90), "GIF"),
        "grey and alpha": saved(Image.fromarray(pixels(87, 66, 2), "LA")),
        "RGBA": saved(Image.fromarray(pixels(64, 73, 4), "RGBA"), "WEBP", lossless=True),
        "grey": saved(Image.fromarray(grey), "JPEG"),
        "bits": saved(Image.fromarray(grey > 99)),
        "CMYK": saved(Image.fromarray(pixels(98, 71, 4), "CMYK"), "JPEG"),
        "Lab": saved(rgb(88, 70).convert("LAB"), "TIFF"),
        "16 bits": saved(Image.fromarray(grey.astype(np.uint16) * 251)),
        "32 bits": saved(Image.fromarray(grey.astype(np.int32) * 300 - 500), "TIFF"),
        "floats": saved(Image.fromarray(grey.astype(np.float32) * 1.3 - 20), "TIFF"),
        "pixel": saved(rgb(1, 1)),
        "column": saved(rgb(1, 31)),
        "row": saved(rgb(45, 1)),
    }


def by_view(data, size, zoom, mean=MEAN, std=STD, reading=RGB, kind=Image.Resampling.BILINEAR):
    (made,) = CentreView(size, zoom, kind, reading)(data)
    x = torch.from_numpy(made.copy()).permute(2, 0, 1) / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def run(output: Path, images: dict[str, bytes]) -> dict:
    """The names that a card's code leaves, for the export at ``output`` used on a batch of image files."""
    card = (output / "README.md" if output.is_dir() else output.with_name(output.name + ".md")).read_text()
    preprocessing, use = (part.split("```")[0] for part in card.split("```python\n")[1:])
    before, scope, batch = Path.cwd(), {}, []
    os.chdir(output.parent)
    try:
        for data in images.values():
            Path(IMAGE).write_bytes(data)
            exec(preprocessing, scope)
            batch.append(scope["images"])
        scope["images"] = torch.cat(batch)
        with torch.no_grad():
            exec(use, scope)
    finally:
        os.chdir(before)
    return scope
