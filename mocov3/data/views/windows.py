"""Samples of DICOM as they are to be shown: by the file's slope, window or tables, as far as these make sense.

Attributes are those of PS3.3, C.7.6.3 (pixels), C.11.1 (modality LUT) and C.11.2 (VOI LUT).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mocov3.config.presets import Reading
from mocov3.data.views.bands import Unfit, to_bytes

if TYPE_CHECKING:
    import pydicom

_NONSENSE = "that makes no sense: the upper 8 of its bits are taken"


def shown(samples: np.ndarray, ds: "pydicom.Dataset", reading: Reading) -> tuple[np.ndarray, str]:
    """uint8 (height, width) or (height, width, 3), and what is remarkable of how it was made, or nothing.

    Raises:
        Unfit: of samples that cannot be shown.
    """
    from pydicom import pixels

    kind = str(ds.get("PhotometricInterpretation", ""))
    bits = int(ds.get("BitsStored") or 0)
    if kind == "PALETTE COLOR":
        samples = pixels.apply_color_lut(samples, ds)
        return _upper(samples, 8 * samples.dtype.itemsize, 0), ""
    if samples.ndim == 3:
        deep = reading.window and bits > 8
        return to_bytes(samples, reading) if deep or samples.dtype.kind == "f" else _upper(samples, bits, 0), ""
    if not kind.startswith("MONOCHROME"):
        raise Unfit("is DICOM of one sample a pixel that is neither grey nor of a palette")
    gray, remark = _gray(samples, ds, reading, bits)
    return (255 - gray if kind == "MONOCHROME1" else gray), remark


def _gray(samples: np.ndarray, ds: "pydicom.Dataset", reading: Reading, bits: int) -> tuple[np.ndarray, str]:
    """uint8 before any inversion, and a remark."""
    from pydicom import pixels

    table = ds.get("ModalityLUTSequence")
    line = (1.0, 0.0) if table else _line(ds)
    if samples.dtype.kind == "f" or (reading.window and bits > 8):
        if line is None:
            raise Unfit("is damaged DICOM: its rescale slope or intercept makes no sense")
        cut = "" if reading.window else "has no window: its values are cut at 0 and 255 (give --bit-window LOW,HIGH)"
        return to_bytes(pixels.apply_modality_lut(samples, ds), reading), cut
    least = -(1 << (bits - 1)) if ds.get("PixelRepresentation") and bits else 0
    if line is None:
        return _upper(samples, bits, least), f"has a rescale slope or intercept {_NONSENSE}"
    values = pixels.apply_modality_lut(samples, ds)
    ends = (0, (1 << _depth(table[0])) - 1) if table else (least, least + (1 << bits) - 1)
    scaled = _windowed(values, ds, sorted(end * line[0] + line[1] for end in ends))
    if scaled is not None:
        rounded: np.ndarray = np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8)
        return rounded, ""
    remark = f"has a window {_NONSENSE}" if "WindowCenter" in ds or "WindowWidth" in ds else ""
    if table:
        return _upper(values, _depth(table[0]), 0), remark
    if not remark and bits > 8:
        remark = "has no window: the upper 8 of its bits are taken (give --bit-window LOW,HIGH)"
    upper = _upper(samples, bits, least)
    return 255 - upper if line[0] < 0 else upper, remark


def _line(ds: "pydicom.Dataset") -> tuple[float, float] | None:
    """Rescale slope and intercept, 1 and 0 where the file has none; ``None`` where they make no sense."""
    try:
        slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
    except (ValueError, TypeError):  # empty, or several
        return None
    return (slope, intercept) if slope and math.isfinite(slope) and math.isfinite(intercept) else None


def _windowed(values: np.ndarray, ds: "pydicom.Dataset", ends: list[float]) -> np.ndarray | None:
    """Values, which may lie between ``ends``, in 0–1 by the file's VOI LUT or window; ``None`` where it has none that
    makes sense."""
    from pydicom import pixels

    if ds.get("VOILUTSequence"):
        table = ds.VOILUTSequence[0]
        whole = values if values.dtype.kind in "iu" else np.rint(values).astype(np.int32)
        looked_up: np.ndarray = pixels.apply_voi(whole, ds)
        return looked_up / ((1 << _depth(table)) - 1)
    if "WindowCenter" not in ds or "WindowWidth" not in ds:
        return None
    try:
        if not _shows(_first(ds.WindowCenter), _first(ds.WindowWidth), ends):
            return None
        # the library's output has the range of the samples stored: what lies far outside shows its ends
        low, high = pixels.apply_windowing(np.array([-1e30, 1e30]), ds)
        if low == high:
            return None
        windowed: np.ndarray = pixels.apply_windowing(values, ds)
    except (ValueError, TypeError, IndexError, NotImplementedError):
        return None
    share: np.ndarray = (windowed - low) / (high - low)
    return share


def _first(value: Any) -> float:
    """Of a window's number, or the first of several."""
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _shows(centre: float, width: float, ends: list[float]) -> bool:
    """Whether a window tells any of the values that may lie between ``ends`` apart, in more than a step of 255."""
    low, high = ends
    reaches = low - width / 2 <= centre <= high + width / 2
    return math.isfinite(centre) and math.isfinite(width) and reaches and 0 < width <= 255 * max(high - low, 1)


def _depth(table: "pydicom.Dataset") -> int:
    """Bits of what a look-up table gives."""
    bits = int(table.LUTDescriptor[2])
    return bits if 8 <= bits <= 16 else 16


def _upper(samples: np.ndarray, bits: int, least: int) -> np.ndarray:
    """The upper 8 of ``bits`` bits of samples from ``least`` on; of fewer bits their whole range."""
    if not 1 <= bits <= 64:
        raise Unfit(f"is damaged DICOM: {bits} bits stored")
    if samples.dtype == np.uint8 and bits == 8 and not least:
        return samples
    over = (1 << bits) - 1
    raised = np.clip(samples.astype(np.int64) - least, 0, over)
    return ((raised * 255 // over) if bits < 8 else raised >> (bits - 8)).astype(np.uint8)
