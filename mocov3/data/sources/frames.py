"""One frame of a DICOM file, as a DICOM file of its own: nothing but what its pixels are made by goes on.

Of a film of many frames the one that is wanted is read, not the file.
"""

import io
from typing import TYPE_CHECKING, Any, Literal

from mocov3.data.views import dicom
from mocov3.data.views.bands import Unfit
from mocov3.data.views.decode import MAX_PIXELS

if TYPE_CHECKING:
    import pydicom

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_OF_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_OFFSETS = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
_TAGS = (*dicom.KEPT, *dicom.SEQUENCES, *_GROUPS, *_OFFSETS, "NumberOfFrames")
_VRS = (b"OB", b"OW", b"OF", b"OD", b"UN")
_ELEMENTS = {0x0010: "PixelData", 0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData"}


def frame_of(file: Any, frame: int) -> bytes:
    """DICOM of one frame of an open file.

    Raises:
        Unfit: if it is damaged, has no such frame, or one of more than ``MAX_PIXELS`` pixels.
    """
    with dicom.quiet("reading a frame"):
        whole = dicom.dataset(file, MAX_PIXELS, _TAGS, pixels=False)
        syntax = dicom.syntax_of(whole)
        kept = dicom.bare(_with_its_own(whole, frame))
        width, height = dicom.size_of(kept)
        if width * height > MAX_PIXELS:
            raise Unfit(f"{width}×{height} pixels are more than {MAX_PIXELS}")
        if syntax.is_deflated:
            file, syntax = _unfolded(file)
        _add_pixels(kept, file, syntax, whole, frame)
        return _written(kept, syntax)


def frame_bytes(ds: "pydicom.Dataset") -> int:
    """Bytes of a frame that is not compressed.

    Raises:
        Unfit: of one of single bits, which are masks.
    """
    from pydicom.pixels.utils import get_expected_length

    if int(ds.BitsAllocated) < 8:
        raise Unfit("is DICOM of single bits, which are masks")
    number = int(ds.get("NumberOfFrames") or 1)
    return max(get_expected_length(ds, "bytes") // max(number, 1), 1)


def _with_its_own(whole: "pydicom.Dataset", frame: int) -> "pydicom.Dataset":
    """The elements of a file, with what an enhanced one says of a frame in sequences."""
    shared, own = (whole.get(name) for name in _GROUPS)
    for groups in (shared[0] if shared else None, own[frame] if own and frame < len(own) else None):
        for name in _OF_GROUPS:
            if groups is not None and groups.get(name):
                for element in groups[name].value[0]:
                    whole[element.tag] = element
    return whole


def _unfolded(file: Any) -> tuple[io.BytesIO, Any]:
    """A deflated file as one that is not, before its pixels; and its transfer syntax."""
    from pydicom import dcmwrite, uid

    whole = dicom.dataset(file, MAX_PIXELS)
    whole.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    out = io.BytesIO()
    dcmwrite(out, whole, enforce_file_format=False, implicit_vr=False, little_endian=True)
    dicom.dataset(out, MAX_PIXELS, _TAGS, pixels=False)
    return out, uid.ExplicitVRLittleEndian


def _add_pixels(kept: "pydicom.Dataset", file: Any, syntax: Any, whole: "pydicom.Dataset", frame: int) -> None:
    """The pixels of a frame, from a file that is read up to them."""
    from pydicom import encaps

    order: Literal["little", "big"] = "little" if syntax.is_little_endian else "big"
    head = file.read(8)
    element, vr = int.from_bytes(head[2:4], order), "OW"
    if len(head) < 8 or element not in _ELEMENTS:
        raise Unfit("is DICOM that holds no image")
    if head[4:6] in _VRS:  # some files say that they are explicit, and are not
        vr = head[4:6].decode("ascii")
        file.read(4)
    if syntax.is_encapsulated:
        offsets = tuple(whole[name].value for name in _OFFSETS) if _OFFSETS[0] in whole else None
        number = int(whole.get("NumberOfFrames") or 1)
        data = encaps.get_frame(file, frame, extended_offsets=offsets, number_of_frames=number)
        kept.add_new(_ELEMENTS[element], "OB", encaps.encapsulate([data]))
        kept[_ELEMENTS[element]].is_undefined_length = True
        return
    length = frame_bytes(kept)
    file.seek(frame * length, io.SEEK_CUR)
    data = file.read(length + length % 2)  # words: of big-endian ones the last byte comes after the filling one
    if len(data) < length:
        raise Unfit(f"is cut off: it holds {len(data)} of {length} bytes of the frame")
    kept.add_new(_ELEMENTS[element], "OW" if vr == "UN" else vr, data + bytes(len(data) % 2))


def _written(kept: "pydicom.Dataset", syntax: Any) -> bytes:
    from pydicom import FileDataset, dcmwrite
    from pydicom.dataset import FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    out = io.BytesIO()
    dcmwrite(out, FileDataset(out, kept, preamble=bytes(128), file_meta=meta), enforce_file_format=False)
    return out.getvalue()
