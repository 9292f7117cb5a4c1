"""DICOM → 8 bits: one frame, windowed as the file says. Needs pydicom and pylibjpeg (the extra ``dicom``).

| what | becomes |
|---|---|
| rescale slope and intercept, modality LUT | applied: CT is in Hounsfield units from here on |
| ``Reading.window``, of more than 8 bits | these values become black and white |
| else VOI LUT, or else window centre and width (the first of each) | applied, over its whole range of output |
| neither, or one that makes no sense, or such a slope | the upper 8 of the bits stored, with a remark |
| MONOCHROME1 | inverted |
| palette, YBR, RGB in any planar configuration | RGB |

Nothing that a file says of a patient is kept, printed or part of a reason: reasons are our own, and what pydicom says
is dropped.
"""

import contextlib
import importlib
import io
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mocov3.config.presets import Reading
from mocov3.data.views import remarks
from mocov3.data.views.bands import Unfit
from mocov3.data.views.windows import shown

if TYPE_CHECKING:
    import pydicom

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_AT = 144
_BYTES = 8
"""Of a deflated file, for every pixel that an image may have: a small file may claim any number."""
_LUT = ("LUTDescriptor", "LUTData")
_PALETTE = tuple(
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
SHAPE = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation"),
)
"""Elements that tell a frame's size in bytes."""
_VALUES = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction")
SEQUENCES = ("ModalityLUTSequence", "VOILUTSequence")
KEPT = (*SHAPE, *_VALUES, *_PALETTE)
"""Elements that pixels are made by: nothing else of a file goes on."""
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


@contextlib.contextmanager
def quiet(doing: str) -> Iterator[None]:
    """pydicom says nothing meanwhile, takes odd values as they are, and fails by ``Unfit`` alone.

    Raises:
        Unfit: without a word of the file's own.
    """
    from pydicom import config

    try:
        with remarks.kept(dropped=True), config.disable_value_validation():
            yield
    except Unfit:
        raise
    except MemoryError:
        raise
    except Exception as error:  # damage makes pydicom and its plug-ins raise errors of every kind
        raise Unfit(f"is damaged DICOM: {doing} failed ({type(error).__name__})") from None


def dataset(file: Any, most: int, tags: tuple[str, ...] | None = None, *, pixels: bool = True) -> "pydicom.Dataset":
    """The elements of an open DICOM file, those of ``tags`` alone if given; without ``pixels`` it is left before them.

    Raises:
        Unfit: if it would unfold to more than ``most`` pixels can have.
    """
    from pydicom import dcmread

    head = file.read(1024)
    if _DEFLATED in head:
        _check_deflated(head + file.read(), most)
    file.seek(0)
    wanted: Any = list(tags) if tags else None
    return dcmread(file, force=True, specific_tags=wanted, stop_before_pixels=not pixels)


def _check_deflated(data: bytes, most: int) -> None:
    begin = _META_AT + int.from_bytes(data[_META_AT - 4 : _META_AT], "little")
    unfolding = zlib.decompressobj(-zlib.MAX_WBITS)
    unfolding.decompress(data[begin:], _BYTES * most)
    if unfolding.unconsumed_tail:
        raise Unfit(f"unfolds to more than {_BYTES * most} bytes")


def bare(whole: "pydicom.Dataset") -> "pydicom.Dataset":
    """A data set of nothing but what pixels are made by."""
    from pydicom import Dataset, Sequence

    kept = Dataset()
    for name in KEPT:
        if name in whole:
            kept[name] = whole[name]
    for name in SEQUENCES:
        if whole.get(name):
            table = Dataset()
            for part in _LUT:
                table[part] = whole[name].value[0][part]
            kept.add_new(name, "SQ", Sequence([table]))
    return kept


def kind(data: bytes, most: int) -> str:
    """What the pixels of a file that was read are: ``MONOCHROME2 12 bits``.

    Raises:
        Unfit: of a damaged file.
    """
    with quiet("reading its header"):
        ds = dataset(io.BytesIO(data), most, SHAPE, pixels=False)
        return f"{ds.get('PhotometricInterpretation', '?')} {ds.get('BitsStored', '?')} bits"


def size_of(ds: "pydicom.Dataset") -> tuple[int, int]:
    """Width and height of a data set's images."""
    if not (ds.get("Rows") and ds.get("Columns")):
        raise Unfit("is DICOM that holds no image")
    return int(ds.Columns), int(ds.Rows)


def read(data: bytes, reading: Reading, most: int) -> np.ndarray:
    """uint8 (height, width) or (height, width, 3) of the first frame of a file's bytes.

    Raises:
        Unfit: of a damaged file, one of another kind of pixels, or one of more than ``most`` pixels.
    """
    if reading.channels not in (1, 3):
        raise Unfit(f"is DICOM, which is read as 1 or 3 channels, not {reading.channels} (--channels)")
    with quiet("reading it"):
        ds = dataset(io.BytesIO(data), most)
        width, height = size_of(ds)
        if width * height > most:
            raise Unfit(f"{width}×{height} pixels are more than {most}")
        if not any(name in ds for name in PIXELS):
            raise Unfit("is DICOM that holds no image")
        if ds.get("SamplesPerPixel", 1) not in (1, 3):
            raise Unfit(f"is DICOM of {ds.SamplesPerPixel} samples a pixel, not 1 or 3")
        ds.file_meta.TransferSyntaxUID = syntax_of(ds)
    samples = _decoded(ds)
    with quiet("windowing it"), np.errstate(all="ignore"):
        image, remark = shown(samples, ds, reading)
    if remark:
        remarks.note(remark)
    return np.ascontiguousarray(image)


def syntax_of(ds: "pydicom.Dataset") -> Any:
    """The transfer syntax of a data set that was read; by how it was read, where it is so old as not to say."""
    from pydicom import uid

    implicit, little = ds.original_encoding
    explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
    said = getattr(ds.file_meta, "TransferSyntaxUID", None)
    return said or (uid.ImplicitVRLittleEndian if implicit else explicit)


def _decoded(ds: "pydicom.Dataset") -> np.ndarray:
    from pydicom import encaps, pixels

    syntax = ds.file_meta.TransferSyntaxUID
    with quiet("reading how it is compressed"):
        try:
            decoder = pixels.get_decoder(syntax)
        except NotImplementedError:
            raise Unfit("is DICOM compressed in a way that is not read: save its frames as images") from None
        if not decoder.is_available:
            raise Unfit(f"is DICOM compressed as {decoder.UID.name}: pip install 'mocov3[dicom]'")
        if syntax.is_encapsulated:
            frame = encaps.get_frame(ds.PixelData, 0, number_of_frames=int(ds.get("NumberOfFrames") or 1))
            _check_stream(frame, (int(ds.Rows), int(ds.Columns)), str(syntax))
    with quiet("decoding its pixels"):
        samples: np.ndarray = pixels.pixel_array(ds, index=0)
    return samples


def _check_stream(frame: bytes, shape: tuple[int, int], syntax: str) -> None:
    """Compressed pixels say their size themselves, which a decoder goes by."""
    family = syntax.removeprefix("1.2.840.10008.1.2.4.")
    if family == syntax:  # RLE has no size
        return
    name = "openjpeg" if family.startswith(("9", "2")) else "libjpeg"
    try:
        library: Any = importlib.import_module(name)
    except ImportError:  # Pillow decodes it, which has a limit of its own
        return
    said = library.get_parameters(frame)
    if (said["rows"], said["columns"]) != shape:
        raise Unfit(f"is damaged DICOM: its pixels are {said['columns']}×{said['rows']}, not {shape[1]}×{shape[0]}")
