"""Files that are not 8-bit RGB: samples of more than 8 bits, and other numbers of channels.

Pillow keeps 8 bits of 16-bit colour and knows at most four channels, so TIFF is read by tifffile here, and PNG by
OpenCV.
"""

import io
import math
from typing import Any

import cv2
import numpy as np

from mocov3.config.presets import Reading
from mocov3.data.views import jxl, remarks
from mocov3.data.views.bare import PNG, TIFF, png
from mocov3.data.views.formats import opened

TIFFS = (*TIFF, b"II+\0", b"MM\0+")
_DEEP = b"\x10"
_DARK = 1 << 14
"""Images of more than 8 bits whose values stay below are probably of 10, 12 or 14 bits, and not that dark."""
_BYTES = 25
"""Of samples, for every pixel that an image may have: a small file may claim any number of channels."""


class Unfit(ValueError):
    """A file whose samples are not what is wanted; the message says what they are."""


def deep_samples(data: bytes, most: int) -> np.ndarray | None:
    """Samples of more than 8 bits, (height, width, channels), of a PNG or TIFF; ``None`` for any other file.

    Args:
        data: bytes of a file.
        most: pixels that an image may have.

    Raises:
        Unfit: for a damaged file, or one of more pixels.
    """
    values: np.ndarray | None = None
    if data[:4] in TIFFS:
        values = _tiff(data, most, deep=True)
    elif data[:8] == PNG and data[24:25] == _DEEP:
        _check((int.from_bytes(data[20:24]), int.from_bytes(data[16:20])), most)
        file = png(data, (b"tRNS",))  # of one that is not sound libpng, as OpenCV uses it, would print what is wrong
        values = cv2.imdecode(np.frombuffer(file.data, np.uint8), cv2.IMREAD_UNCHANGED) if file.sound else None
        if values is None:
            raise Unfit("is a damaged PNG")
        if values.ndim == 3:  # OpenCV's order is blue, green, red
            values = values[..., [2, 1, 0, *range(3, values.shape[2])]]
    if values is None or values.dtype in (np.uint8, np.bool_):
        return None
    return values[..., None] if values.ndim == 2 else values


def samples(data: bytes, channels: int, most: int) -> np.ndarray:
    """All samples of a file as they are stored, (height, width, channels). EXIF orientation is ignored.

    Raises:
        Unfit: for a file of another number of channels, or a damaged one.
    """
    values = _tiff(data, most) if data[:4] in TIFFS else deep_samples(data, most)
    if values is None:
        if data.startswith(jxl.SIGNATURES):
            _check(jxl.size(data)[::-1], most)
        with opened(data) as image:
            _check((image.height, image.width), most)
            image.load()
            values = np.asarray(image)
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[2] != channels:
        raise Unfit(f"holds {values.shape[2]} channels, not {channels} (--channels)")
    return values


def stored(data: bytes) -> tuple[int, bool] | None:
    """Channels of a TIFF or PNG, and whether they have more than 8 bits; ``None`` of any other file, or a damaged one.

    A PNG counts as three: all kinds are read as RGB or grey.
    """
    if data[:8] == PNG:
        return 3, data[24:25] == _DEEP
    if data[:4] not in TIFFS:
        return None
    import tifffile

    try:
        with remarks.kept(), tifffile.TiffFile(io.BytesIO(data)) as file:
            source = _first(file)
            channels = [n for n, axis in zip(source.shape, source.axes, strict=True) if axis in "SC"]
            return (channels or [1])[0], source.dtype not in (np.uint8, np.bool_)
    except Exception:  # as in _tiff
        return None


def to_bytes(values: np.ndarray, reading: Reading) -> np.ndarray:
    """Samples → uint8: by the window where there is one and they have more than 8 bits, else the upper 8 bits.

    Without a window, floats are taken as 0–255 and 32-bit integers as 16-bit; both are cut.
    """
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if reading.window is not None:
        low, high = reading.window
        scaled = (np.nan_to_num(values.astype(np.float64)) - low) * (255 / (high - low))
        return np.ascontiguousarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    if values.dtype.kind == "f":
        return np.ascontiguousarray(np.nan_to_num(values).clip(0, 255).astype(np.uint8))
    if 1 < (largest := int(values.max(initial=0))) < _DARK:
        remarks.note(f"its values end at {largest} of 65535, so it comes out dark (mocov3 check names a --bit-window)")
    return np.ascontiguousarray((values.clip(0, 65535) >> 8).astype(np.uint8))


def _check(shape: tuple[int, ...], most: int) -> None:
    pixels = math.prod(shape) // (min(shape) if len(shape) > 2 else 1)
    if pixels > most:
        raise Unfit(f"{pixels} pixels are more than {most}")


def _tiff(data: bytes, most: int, *, deep: bool = False) -> np.ndarray | None:
    """The first image of a TIFF, (height, width) or (height, width, channels); with ``deep`` nothing of 8 bits."""
    import tifffile

    try:
        with remarks.kept(), tifffile.TiffFile(io.BytesIO(data)) as file:
            first, source = file.pages.first, _first(file)
            _check(tuple(source.shape), most)
            if source.nbytes > _BYTES * most:
                raise Unfit(f"{source.nbytes} bytes of samples are more than {_BYTES * most}")
            if deep and source.dtype in (np.uint8, np.bool_):
                return None
            values: np.ndarray = source.asarray()
            if first.photometric == tifffile.PHOTOMETRIC.MINISWHITE and values.dtype.kind == "u":
                values = np.iinfo(values.dtype).max - values
            return values.transpose(1, 2, 0) if source.axes in ("SYX", "CYX") else values
    except Unfit:
        raise
    except Exception as error:  # of a damaged file, or of a compression that needs imagecodecs
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise Unfit(f"cannot be read ({reason})") from None


def _first(file: Any) -> Any:
    """The first image of an open TIFF; ImageJ and OME write every channel as a page of its own."""
    source = file.series[0] if file.series and file.series[0].axes == "CYX" else file.pages.first
    if source.axes not in ("YX", "YXS", "SYX", "CYX"):
        raise Unfit(f"has axes {source.axes}, not height, width and channels")
    return source
