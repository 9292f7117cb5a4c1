"""File bytes → pixels, RGB unless another reading is asked for. The rules for every kind of image are here.

| what | becomes |
|---|---|
| EXIF orientation | applied |
| transparent pixels | composited on white |
| palette, grey, CMYK, Lab … | RGB, by Pillow's conversion |
| 16 bits a channel | the upper 8 bits (so 65535 is white), or what ``Reading.window`` says: 0,4095 for 12 bits |
| 32-bit integers | taken as 16-bit, clipped; floats: 0–255, clipped |
| several frames or pages | the first |
| HEIC, AVIF, JPEG XL | where the extra ``formats`` is installed, turned as the format itself says |
| DICOM | where the extra ``dicom`` is installed: windowed as the file says (``dicom``) |
| text, profiles, damaged EXIF | ignored (``bare``); what libraries say is counted (``remarks``), not printed |
| one channel wanted | grey, by Pillow's weights of red, green and blue |
| four or more wanted | the file's samples as stored (``bands``); as many as wanted, or it is refused |

JPEGs are decoded by libjpeg-turbo directly (simplejpeg; the same pixels as Pillow's), on demand at 1/2, 1/4 or 1/8 of
their size; plain PNGs by OpenCV; all else, and whatever these refuse, by Pillow. Sizes are checked before anything is
decoded.
"""

from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from mocov3.config.presets import RGB, Reading
from mocov3.data.views import bands, dicom, jxl, remarks
from mocov3.data.views.bare import APP1, EXIF, JPEG, PNG, is_dicom, png, segments
from mocov3.data.views.formats import missing, opened
from mocov3.errors import nature, one_line

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print a line for each damaged PNG

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused, as by Pillow: a small file may claim any size."""

SHRINKS = (8, 4, 2)
"""Parts of its size at which a JPEG is decoded faster; others (5/8 …) are slower than the whole."""

_ORIENTATION = 0x0112


class DecodeError(Exception):
    """An image that cannot be read; the message is the reason, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


class ImageBytes:
    """An image whose size is known and whose pixels are decoded on demand.

    Args:
        data: the bytes of a file, or uint8 pixels (H, W) or (H, W, channels).
        reading: how many channels are wanted, and the window of deep samples.

    Raises:
        DecodeError: if the bytes are no image, or one of more than ``MAX_PIXELS`` pixels.
    """

    width: int
    height: int
    """Size as the image is meant to be seen, in pixels."""

    def __init__(self, data: bytes | np.ndarray, reading: Reading = RGB) -> None:
        self._data: Any = data
        self._pixels: np.ndarray | None = None
        self._turn = 1
        if isinstance(data, np.ndarray):
            self._pixels = _with_channels(data, reading.channels)
        elif is_dicom(data):
            self._pixels = _of_dicom(data, reading)
        elif reading != RGB:
            self._pixels = _by_reading(data, reading)
        elif not self._is_plain_jpeg(data):
            plain = _plain_png(data)
            self._pixels = _by_pillow(data) if plain is None else plain
        if self._pixels is not None:
            self.height, self.width = self._pixels.shape[:2]

    def _is_plain_jpeg(self, data: bytes) -> bool:
        if data[:3] != JPEG:
            return False
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        except Exception:  # damaged, or of a kind libjpeg-turbo's plain interface does not know: Pillow decides
            return False
        if space not in ("YCbCr", "Gray", "RGB"):
            return False
        _check_size(width, height)
        self._turn = _orientation(data)
        self._stored = width, height
        self.width, self.height = (width, height) if self._turn < 5 else (height, width)
        return True

    def pixels(self, shrink: int = 1) -> tuple[np.ndarray, int]:
        """uint8 pixels (height, width, channels), and by which of 1 and ``shrink`` they are smaller.

        Raises:
            DecodeError: if the bytes are damaged.
        """
        if self._pixels is not None:
            return self._pixels, 1
        width, height = self._stored
        if self._turn > 1 and (width % shrink or height % shrink):
            shrink = 1  # the part pixel at the far edge would come to lie at the near one
        least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
        try:
            pixels = simplejpeg.decode_jpeg(self._data, "RGB", **least)
        except ValueError:  # Pillow tolerates more than libjpeg-turbo's strict mode, and has its own limits
            return _by_pillow(self._data), 1
        if shrink > 1 and pixels.shape[:2] != (least["min_height"], least["min_width"]):
            pixels, shrink = simplejpeg.decode_jpeg(self._data, "RGB"), 1
        return _turned(pixels, self._turn), shrink


def decode(data: bytes | np.ndarray) -> Image.Image:
    """An RGB image from the bytes of a file, or from uint8 pixels (H, W) or (H, W, 3), whole.

    Raises:
        DecodeError: if the bytes are no image, a truncated one, or one of more than ``MAX_PIXELS`` pixels.
    """
    return Image.fromarray(ImageBytes(data).pixels()[0])


def _of_dicom(data: bytes, reading: Reading) -> np.ndarray:
    if name := missing(data):
        raise DecodeError(f"is {name}")
    try:
        return _with_channels(dicom.read(data, reading, MAX_PIXELS), reading.channels)
    except bands.Unfit as error:
        raise DecodeError(str(error)) from None


def _by_reading(data: bytes, reading: Reading) -> np.ndarray:
    channels = reading.channels
    try:
        if channels not in (1, 3):
            return bands.to_bytes(bands.samples(data, channels, MAX_PIXELS), reading)
        deep = bands.deep_samples(data, MAX_PIXELS) if reading.window else None
        if deep is not None:
            if deep.shape[2] == 4:  # deep images are not laid over white: their alpha is left out
                deep = deep[..., :3]
            if deep.shape[2] not in (1, 3):
                raise bands.Unfit(f"holds {deep.shape[2]} channels, not {channels} (--channels)")
            return _with_channels(bands.to_bytes(deep, reading), channels)
    except bands.Unfit as error:
        raise DecodeError(str(error)) from None
    except UnidentifiedImageError:
        raise DecodeError(_unknown(data)) from None
    except Exception as error:  # as in _by_pillow
        raise DecodeError(f"{type(error).__name__}: {error}") from None
    if reading.window and data[:3] != JPEG:
        return _with_channels(_by_pillow(data, reading), channels)
    return _with_channels(ImageBytes(data).pixels()[0], channels)


def _by_pillow(data: bytes, reading: Reading = RGB) -> np.ndarray:
    if not data:
        raise DecodeError("the file is empty")
    try:
        if data.startswith(jxl.SIGNATURES):
            _check_size(*jxl.size(data))
        with opened(data) as image:
            _check_size(*image.size)
            image.load()
            _turn(image)
            return _rgb_of(image, reading)
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError(_unknown(data)) from None
    except Exception as error:  # Pillow's plugins raise whatever a malformed file makes them stumble over
        raise DecodeError(f"{type(error).__name__}: {error}") from None


def _unknown(data: bytes) -> str:
    """What a file is that Pillow cannot open."""
    if name := missing(data):
        return f"is {name}"
    if data[:4] in bands.TIFFS:  # Pillow knows no TIFF of 64-bit floats, for instance
        channels = (bands.stored(data) or (3, False))[0]
        if channels not in (1, 3):
            return f"holds {channels} channels, not 3 (pretrain and finetune: --channels {channels})"
        return "is a TIFF of a kind that is not read: save it as 8 or 16 bits"
    return nature(data) or "is not an image"


def _turn(image: Image.Image) -> None:
    if image.format == "JXL" and not getattr(image, "jpeg", False):  # turned by its own header, whatever EXIF says
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # as in _by_pillow
        _note_exif(error)


def _note_exif(error: Exception) -> None:
    remarks.note(f"its EXIF is damaged and ignored ({error or type(error).__name__})")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}×{height} pixels are more than {MAX_PIXELS}")


def _rgb_of(image: Image.Image, reading: Reading) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # I;16 in either byte order, 32 bits, or floats
        return _with_channels(bands.to_bytes(np.asarray(image), reading), 3)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    elif image.mode == "L":
        return _with_channels(np.asarray(image), 3)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W) or (H, W, found) → (H, W, channels): grey to RGB, RGB to grey."""
    channels_now = pixels.shape[2] if pixels.ndim == 3 else 1
    fits = channels_now == channels or (channels in (1, 3) and channels_now in (1, 3))
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not fits:
        raise DecodeError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (H, W) or (H, W, {channels})")
    if channels_now == channels:
        return pixels if pixels.ndim == 3 else pixels[..., None]
    if channels_now == 1:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def _plain_png(data: bytes) -> np.ndarray | None:
    """Pixels of a whole 8-bit grey or RGB PNG without transparency or EXIF, by OpenCV; ``None`` for any other."""
    if data[:8] != PNG or data[24:25] != b"\x08" or data[25:26] not in (b"\0", b"\2"):
        return None
    file = png(data)
    if not (file.sound and file.plain):  # libpng, as OpenCV uses it, would print what is wrong
        return None
    _check_size(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))
    try:
        return cv2.imdecode(np.frombuffer(file.data, np.uint8), cv2.IMREAD_COLOR_RGB)  # None where it is damaged
    except cv2.error:
        return None


def _orientation(data: bytes) -> int:
    """EXIF orientation 1–8 of a JPEG's bytes; 1 where there is none."""
    for marker, place, end in segments(data):
        if marker == APP1 and data.startswith(EXIF, place + 4):
            exif = Image.Exif()
            try:
                with remarks.kept():
                    exif.load(data[place + 4 : end])
                    value = exif.get(_ORIENTATION, 1)
            except Exception as error:  # as in _by_pillow
                _note_exif(error)
                return 1
            return value if value in range(1, 9) else 1
    return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # after turning over the diagonal where need be, what is left are mirrors
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
