"""From an image file to what an exported network takes.

The card shows the source of ``read_image``, ``prepare`` and ``prepare_samples``, so these stand alone.
"""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, functional

from mocov3.config.presets import RGB, Reading
from mocov3.data import CentreView
from mocov3.export.formats.base import Exported


def read_image(path: str) -> Image.Image:
    """RGB: turned as EXIF says, transparent pixels laid on white, of 16 bits the upper 8."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def prepare(
    path: str,
    resize: int,
    crop: int,
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mode: str = "RGB",
) -> torch.Tensor:
    """Shorter side resized, by Pillow; centre cut out; normalised: float32 (channels, crop, crop)."""
    image = functional.resize(read_image(path).convert(mode), resize, InterpolationMode(interpolation))
    return functional.normalize(functional.to_tensor(functional.center_crop(image, crop)), mean, std)


def prepare_samples(
    path: str,
    crop: int,
    zoom: float,
    interpolation: str,
    reading: Reading,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> torch.Tensor:
    """As above, by mocov3's reader of other channels and windows: float32 (channels, crop, crop)."""
    (pixels,) = CentreView(crop, zoom, Image.Resampling[interpolation.upper()], reading)(Path(path).read_bytes())
    return functional.normalize(functional.to_tensor(pixels.copy()), mean, std)


def prepared(model: Exported, path: str) -> torch.Tensor:
    """What the model takes for a file, by the code of the card: float32 (channels, side, side)."""
    return (prepare if _is_plain(model) else prepare_samples)(path, **_settings(model))


def code(model: Exported) -> str:
    """Python for the card: from ``image.jpg`` to ``images``, a batch of one."""
    imports, functions = (_PLAIN, (read_image, prepare)) if _is_plain(model) else (_SAMPLES, (prepare_samples,))
    settings = "".join(f"    {name}={value!r},\n" for name, value in _settings(model).items())
    shape = (1, model.in_chans, model.image_size, model.image_size)
    call = f'images = {functions[-1].__name__}(\n    "image.jpg",\n{settings})[None]  # float32, {shape}'
    return "\n\n".join([imports, *[inspect.getsource(function) for function in functions], call])


def _is_plain(model: Exported) -> bool:
    return model.window is None and model.in_chans in (1, 3)


def _settings(model: Exported) -> dict[str, Any]:
    common = {"crop": model.image_size, "mean": model.mean, "std": model.std}
    if _is_plain(model):
        mode = {} if model.reading == RGB else {"mode": "L"}
        return {"resize": model.resized, "interpolation": model.interpolation, **common, **mode}
    return {"zoom": model.zoom, "interpolation": model.interpolation, "reading": model.reading, **common}


_PLAIN = """import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, functional
"""
_SAMPLES = """from pathlib import Path

import mocov3
import torch
from mocov3.config.presets import Reading
from mocov3.data import CentreView
from PIL import Image
from torchvision.transforms import functional
"""
