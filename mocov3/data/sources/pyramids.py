"""Regions of TIFFs of any size, by tifffile: the segments (tiles or strips) that a region touches are read, no others.

Pyramids (levels as pages or as SubIFDs), GeoTIFF, BigTIFF; grey, RGB, YCbCr and bands, in pixels or in planes. What
tifffile cannot decompress by itself (JPEG, LZW) Pillow's libtiff does: a segment is given to it as a TIFF of its own.
"""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from mocov3.config.presets import Reading
from mocov3.config.views import MOST_CHANNELS
from mocov3.data.views import remarks
from mocov3.data.views.bands import TIFFS, Unfit, to_bytes

_MOST_SEGMENT = 1 << 26
"""Samples of a segment: of a larger one, in a file of one strip for instance, a region cannot be read alone."""
_MOST_FOR_A_BYTE, _FEW = 1 << 12, 1 << 22
"""Pixels that a file may claim for each of its bytes, and in any case."""
_MICROMETRES = {2: 25_400.0, 3: 10_000.0}
"""In a unit of resolution: inch, centimetre."""
_METRE = 9001
_PROJECTED = 1
_PALETTE, _YCBCR, _RGB, _WHITE, _BLACK = 3, 6, 2, 0, 1
_DEFLATE_LIKE = (1, 8, 32946)
_ALPHA = (1, 2)
_SHORT, _LONG, _BYTE = 3, 4, 7


def is_tiff(head: bytes) -> bool:
    """Whether a file is a TIFF or BigTIFF, by its first four bytes."""
    return head[:4] in TIFFS


class Pyramid:
    """An open TIFF.

    Args:
        path: the file.
        window: of samples of more than 8 bits: these values become 0 and 255; without it their upper 8 bits are taken.

    Raises:
        Unfit: if it is damaged, or of a kind that is not read.
    """

    def __init__(self, path: str, window: tuple[float, float] | None = None) -> None:
        import tifffile

        self._reading = Reading(window=window)
        try:
            with remarks.kept():
                self._file = tifffile.TiffFile(path)
                try:
                    series: list[Any] = self._file.series[0].levels
                    levels = [level.pages[0].aspage() for level in series if len(level.pages) == 1]
                    self._pages = [page for page in levels if page.axes in ("YX", "YXS", "SYX")]
                    self._check()
                    self.mpp, self.is_map = _resolution(self._file, self._pages[0])
                except BaseException:
                    self._file.close()
                    raise
        except (Unfit, OSError):
            raise
        except Exception as error:  # of a damaged file
            raise Unfit(f"cannot be read as TIFF ({type(error).__name__})") from None

    def _check(self) -> None:
        if not self._pages:
            raise Unfit(f"has axes {self._file.series[0].axes}, not height, width and channels")
        first = self._pages[0]
        if first.dtype is None or first.dtype.kind not in "uifb" or int(first.photometric) == _PALETTE:
            raise Unfit("is a TIFF of a palette or of a kind of numbers that is not read")
        if not 1 <= first.samplesperpixel <= MOST_CHANNELS:
            raise Unfit(f"holds {first.samplesperpixel} channels, more than {MOST_CHANNELS}")
        self._pages = [page for page in self._pages if page.samplesperpixel == first.samplesperpixel]
        for page in self._pages:
            width, height = page.imagewidth, page.imagelength
            if min(width, height) < 1 or width * height > _MOST_FOR_A_BYTE * self._file.filehandle.size + _FEW:
                raise Unfit(f"claims {width}×{height} pixels, which its bytes cannot hold")
            rows, columns = _segment_shape(page)
            planes = page.samplesperpixel if page.axes == "SYX" else 1
            if page.is_memmappable:
                continue
            if rows * columns * (page.samplesperpixel // planes) > _MOST_SEGMENT:
                raise Unfit(f"is compressed in one piece of {columns}×{rows} pixels: write it in tiles")
            if planes * -(-height // rows) * -(-width // columns) != len(page.dataoffsets):
                raise Unfit(f"has {len(page.dataoffsets)} segments, which are not those of its size")

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every level, in pixels; the largest first."""
        return [(page.imagewidth, page.imagelength) for page in self._pages]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, channels) of a region, in pixels of its level.

        What is outside the image, or left out of a sparse file, is the file's value for no data.

        Raises:
            Unfit: if a segment is damaged.
        """
        page = self._pages[level]
        try:
            with remarks.kept():
                samples = self._region(page, x, y, width, height)
        except (Unfit, OSError):
            raise
        except Exception as error:  # as in __init__
            raise Unfit(f"has damaged pixels ({type(error).__name__})") from None
        return self._shown(page, samples)

    def _region(self, page: Any, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Samples (height, width, samples), as stored."""
        planes = page.samplesperpixel if page.axes == "SYX" else 1
        out = np.full((height, width, page.samplesperpixel), page.nodata, page.dtype)
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, page.imagewidth), min(y + height, page.imagelength)
        if left >= right or top >= bottom:
            return out
        if page.is_memmappable:
            mapped = _mapped(page)[..., top:bottom, left:right] if planes > 1 else _mapped(page)[top:bottom, left:right]
            out[top - y : bottom - y, left - x : right - x] = np.moveaxis(mapped, 0, 2) if planes > 1 else mapped
            return out
        rows, columns = _segment_shape(page)
        across, down = -(-page.imagewidth // columns), -(-page.imagelength // rows)
        for plane in range(planes):
            for row in range(top // rows, -(-bottom // rows)):
                for column in range(left // columns, -(-right // columns)):
                    part = self._segment(page, (plane * down + row) * across + column)
                    if part is None:
                        continue
                    y0, x0 = row * rows, column * columns
                    a, b = max(top, y0), min(bottom, y0 + part.shape[0])
                    c, d = max(left, x0), min(right, x0 + part.shape[1])
                    where = out[a - y : b - y, c - x : d - x]
                    channel = slice(plane, plane + 1) if planes > 1 else slice(None)
                    where[..., channel] = part[a - y0 : b - y0, c - x0 : d - x0]
        return out

    def _segment(self, page: Any, index: int) -> np.ndarray | None:
        """Samples (rows, columns, samples) of a segment; ``None`` for one that a sparse file leaves out."""
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if not count:
            return None
        self._file.filehandle.seek(offset)
        data = self._file.filehandle.read(count)
        if len(data) < count:
            raise Unfit("is cut off")
        try:
            part = page.decode(data, index, jpegtables=page.jpegtables)[0]
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _by_libtiff(page, data, index)
        return None if part is None else part[0]

    def _shown(self, page: Any, samples: np.ndarray) -> np.ndarray:
        """uint8, RGB where there are colours; inverted and without transparency where need be."""
        pixels = to_bytes(samples, self._reading)
        if int(page.photometric) == _WHITE:
            pixels = 255 - pixels
        alpha = page.extrasamples[:1] and page.extrasamples[0] in _ALPHA
        if pixels.shape[2] == 4 and int(page.photometric) == _RGB and alpha:
            image = Image.fromarray(pixels)
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image.getchannel("A"))
            pixels = np.asarray(white)
        return pixels


def _mapped(page: Any) -> np.ndarray:
    """Samples of a page that lie in the file as they are, mapped into memory: (height, width, samples) or planes."""
    order = page.parent.byteorder
    shape = page.shape if len(page.shape) == 3 else (*page.shape, 1)
    file = page.parent.filehandle.path
    return np.memmap(file, page.dtype.newbyteorder(order), "r", page.dataoffsets[0], shape)


def _segment_shape(page: Any) -> tuple[int, int]:
    """Rows and columns of a segment."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip or page.imagelength, page.imagelength), page.imagewidth


def _by_libtiff(page: Any, data: bytes, index: int) -> np.ndarray:
    """Samples of a compressed segment, by Pillow."""
    rows, columns = _segment_shape(page)
    if not page.is_tiled:
        down = -(-page.imagelength // rows)
        rows = min(rows, page.imagelength - (index % down) * rows)
    samples = 1 if page.axes == "SYX" else page.samplesperpixel
    if page.dtype.itemsize > 1 and samples > 1:
        raise Unfit(f"is compressed as {page.compression.name} with {page.bitspersample} bits: pip install imagecodecs")
    try:
        with Image.open(io.BytesIO(_as_tiff(page, data, rows, columns, samples))) as image:
            image.load()
            part = np.asarray(image)
    except OSError:
        raise Unfit("has damaged pixels") from None
    part = part if part.ndim == 3 else part[..., None]
    if part.shape != (rows, columns, samples):
        raise Unfit(f"is compressed as {page.compression.name}, which is not read: pip install imagecodecs")
    return part


def _as_tiff(page: Any, data: bytes, rows: int, columns: int, samples: int) -> bytes:
    """A TIFF of one strip: the segment."""
    order = page.parent.byteorder
    photometric = int(page.photometric) if samples > 1 else _BLACK
    entries: list[tuple[int, int, tuple[int, ...] | bytes]] = [
        (256, _LONG, (columns,)),
        (257, _LONG, (rows,)),
        (258, _SHORT, (page.bitspersample,) * samples),
        (259, _SHORT, (int(page.compression),)),
        (262, _SHORT, (photometric,)),
        (273, _LONG, (8,)),
        (277, _SHORT, (samples,)),
        (278, _LONG, (rows,)),
        (279, _LONG, (len(data),)),
        (284, _SHORT, (1,)),
        (317, _SHORT, (int(page.predictor),)),
    ]
    if samples > 3:
        entries.append((338, _SHORT, (0,) * (samples - 3)))
    if page.jpegtables is not None:
        entries.append((347, _BYTE, page.jpegtables))
    if photometric == _YCBCR:
        entries.append((530, _SHORT, tuple(page.subsampling or (2, 2))))
    body = data + bytes(len(data) % 2)
    directory, more, place = [], b"", 8 + len(body)
    begin = place + 2 + 12 * len(entries) + 4
    for tag, kind, values in entries:
        code = "H" if kind == _SHORT else "I"
        packed = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{code}", *values)
        count = len(values)
        field = packed.ljust(4, b"\0")
        if len(packed) > 4:
            field = struct.pack(f"{order}I", begin + len(more))
            more += packed + bytes(len(packed) % 2)
        directory.append(struct.pack(f"{order}HHI", tag, kind, count) + field)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", place)
    return b"".join([head, body, struct.pack(f"{order}H", len(entries)), *directory, bytes(4), more])


def _resolution(file: Any, page: Any) -> tuple[float, bool]:
    """Micrometres a pixel (0 where the file does not say), and whether it is a map."""
    if page.is_geotiff:
        return _map_resolution(page), True
    for key, _, value in (part.partition("=") for part in (page.description or "").split("|")):
        if key.strip() == "MPP":  # Aperio
            return float(value), False
    if file.is_ome and (said := _ome_size(file.ome_metadata or "")):
        return said, False
    unit = _MICROMETRES.get(int(page.tags.valueof("ResolutionUnit") or 2))
    number, denominator = page.tags.valueof("XResolution") or (0, 1)
    return (unit * denominator / number if unit and number > 1 else 0.0), False


def _map_resolution(page: Any) -> float:
    """Micrometres a pixel of a map in metres; 0 of one in degrees, feet, or what it does not say."""
    try:
        tags = page.geotiff_tags or {}
        metres = (
            int(tags["GTModelTypeGeoKey"]) == _PROJECTED and int(tags.get("ProjLinearUnitsGeoKey", _METRE)) == _METRE
        )
        return float(tags["ModelPixelScale"][0]) * 1e6 if metres else 0.0
    except Exception:  # keys of other programs' making, or damaged ones: the pixels can be read
        return 0.0


def _ome_size(xml: str) -> float:
    """Micrometres a pixel, by OME's attribute of the first image, where its unit is the usual one."""
    from xml.etree import ElementTree

    pixels = next((e for e in ElementTree.fromstring(xml).iter() if e.tag.endswith("Pixels")), None)
    if pixels is None or pixels.get("PhysicalSizeXUnit", "µm") != "µm":
        return 0.0
    return float(pixels.get("PhysicalSizeX") or 0)
