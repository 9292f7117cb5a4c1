"""Small image files of the kinds that preprocessings differ on; an export is compared on them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mocov3.export.formats.base import Exported

_ORIENTATION = 0x0112


def write(folder: Path, model: Exported) -> dict[str, Path]:
    """Files by what is odd about them, as the model reads them."""
    random = np.random.default_rng(0)

    def pixels(width: int, height: int, channels: int = 3) -> np.ndarray:
        coarse = random.integers(0, 256, (-(-height // 3), -(-width // 3), channels), dtype=np.uint8)
        return coarse.repeat(3, 0).repeat(3, 1)[:height, :width]

    side, size = model.resized, model.image_size
    odd = size + 3 + -(-side // 4) * 4  # left of the centre lie 1.5 pixels more than an even number
    if model.in_chans not in (1, 3):
        import tifffile

        shapes = {"odd border": (odd, side), "portrait": (61, 2 * side + 5), "tiny": (3, 5), "line": (1, 9)}
        for name, (width, height) in shapes.items():
            values = pixels(width, height, model.in_chans)
            tifffile.imwrite(folder / f"{name}.tif", values, photometric="minisblack", planarconfig="contig")
        low, high = model.window or (0, 65535)
        shapes["16 bits"] = (side + 9, side + 2)
        levels = low + pixels(*shapes["16 bits"], model.in_chans) / 200 * (high - low)  # some lie above the window
        values = levels.clip(0, 65535).astype(np.uint16)
        tifffile.imwrite(folder / "16 bits.tif", values, photometric="minisblack", planarconfig="contig")
        return {name: folder / f"{name}.tif" for name in shapes}
    turned, clear = Image.Exif(), bytes([0, 128] + [255] * 14)
    turned[_ORIENTATION] = 6
    deep = pixels(side + 9, side + 2, 1)[..., 0].astype(np.uint16) * 257
    images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "odd border": (Image.fromarray(pixels(odd, side)), "png", {}),
        "portrait": (Image.fromarray(pixels(61, 2 * side + 5)), "jpg", {"quality": 95}),
        "EXIF orientation": (Image.fromarray(pixels(91, 67)), "jpg", {"exif": turned}),
        "palette, transparent": (Image.fromarray(pixels(47, 83)).quantize(16), "png", {"transparency": clear}),
        "grey": (Image.fromarray(pixels(58, 40, 1)[..., 0]), "png", {}),
        "CMYK": (Image.fromarray(pixels(90, 71, 4), "CMYK"), "jpg", {}),
        "tiny": (Image.fromarray(pixels(3, 5, 4), "RGBA"), "png", {}),
        "line": (Image.fromarray(pixels(1, 9)), "png", {}),
        "16 bits": (Image.fromarray(deep), "png", {}),
    }
    for name, (image, suffix, options) in images.items():
        image.save(folder / f"{name}.{suffix}", **options)
    return {name: folder / f"{name}.{suffix}" for name, (_, suffix, _) in images.items()}
