"""File bytes → RGB pixels, by Pillow, with a limit on the size checked before anything is decoded."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused, as by Pillow: a small file may claim any size."""


class DecodeError(Exception):
    """A picture that cannot be read; the message is the reason."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """An RGB picture from the bytes of a file, or from uint8 pixels (H, W) or (H, W, 3).

    Raises:
        DecodeError: if the bytes are no picture, a truncated one, or one of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    if not data:
        raise DecodeError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DecodeError(f"{width}×{height} pixels are more than {MAX_PIXELS}")
            return image.convert("RGB")
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("is not a picture") from None
    except Exception as error:  # Pillow's plugins raise whatever a malformed file makes them stumble over
        raise DecodeError(f"{type(error).__name__}: {error}") from None
