"""Formats that are read by what an extra installs: ``formats`` (plug-ins of Pillow), ``dicom``."""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from mocov3.data.views import remarks
from mocov3.data.views.bare import bare, is_dicom
from mocov3.data.views.jxl import SIGNATURES

DICOM = (".dcm", ".dicom", ".dic", ".ima")
"""Endings of DICOM files, which may as well have none."""
_HEIF = "pillow_heif"
_MODULES = {".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".avif": "PIL._avif", ".jxl": "pillow_jxl"}
_MODULES |= dict.fromkeys(DICOM, "pydicom")
"""Ending → what reads such files."""
_CURE = "pip install 'mocov3[{}]'"


@functools.cache
def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def endings() -> tuple[str, ...]:
    """Of these formats' files, those that can be read here."""
    return tuple(ending for ending, module in _MODULES.items() if _there(module))


def cure(ending: str) -> str:
    """How files of an ending (as ``.heic``) become readable here; '' where they are, or where nothing is known."""
    module = _MODULES.get(ending.lower())
    extra = "dicom" if module == "pydicom" else "formats"
    return _CURE.format(extra) if module and not _there(module) else ""


def missing(data: bytes) -> str:
    """The name of the format of a file whose reader is missing here, or ''."""
    ending, name = "", ""
    if data[4:8] == b"ftyp":
        ending, name = (".avif", "AVIF") if data[8:11] == b"avi" else (".heic", "HEIF")
    elif data.startswith(SIGNATURES):
        ending, name = ".jxl", "JPEG XL"
    elif is_dicom(data):
        ending, name = DICOM[0], "DICOM"
    return f"{name}: {command}" if (command := cure(ending)) else ""


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image of a file's bytes without what lies beside the pixels, its header read; libraries print nothing.

    Raises:
        Exception: whatever Pillow's plug-ins raise of a malformed file.
    """
    with remarks.kept():
        data = bare(data)
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError:
            _register()
            image = Image.open(io.BytesIO(data))
        with image:
            if image.format == "EPS":  # Pillow has Ghostscript run it
                raise ValueError("is PostScript, a program, which is not run")
            yield image


@functools.cache
def _register() -> None:
    """Load what reads further formats: only where a file needs it."""
    if _there("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    if _there("pillow_jxl"):
        from pillow_jxl import JpegXLImagePlugin

        JpegXLImagePlugin.DECODE_THREADS = 0  # one process a core already
