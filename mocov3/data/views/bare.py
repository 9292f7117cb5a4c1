"""A file's bytes without what programs write beside the pixels, so that no damage there costs the image.

Text, colour profiles, resolutions and previews change no pixel here; libraries refuse whole images over them, or print
a line for each. What is left is what says how to decode, and EXIF, for its orientation.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

JPEG, PNG, TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
EXIF = b"Exif\0\0"
DICOM_HEAD = 132
"""Bytes by which a file is told to be DICOM."""
APP0, APP1, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
_SCANS = (0xC0, 0xC1, 0xC2, 0xDA)  # the frame or the scan begins: nothing beside the pixels from here on
_CHUNK = struct.Struct(">I4s")
_TRANSPARENCY = {0: 2, 2: 6}
"""Colour type of a PNG → least bytes that say which colour is transparent."""
_TIFF_TAGS = frozenset(
    (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 336)
) | {338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532, 50674}
"""Tags that decoding needs, and the orientation."""


def is_dicom(data: bytes) -> bool:
    """Whether the first bytes of a file are those of DICOM."""
    return data[128:DICOM_HEAD] == b"DICM"


def bare(data: bytes) -> bytes:
    """The bytes of an image file without what lies beside its pixels; as they are, of a kind not known here."""
    if data[:8] == PNG:
        return png(data).data
    if data[:3] == JPEG:
        return _jpeg(data)
    if data[:4] in TIFF:
        return _tiff(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[4:8] == b"ftyp":  # HEIF and AVIF: EXIF says nothing of their orientation, and libavif refuses odd ones
        end = data.find(b"mdat")
        return data[:end].replace(b"Exif", b"skip") + data[end:] if end > 0 else data
    return data


class Png(NamedTuple):
    """What ``png`` leaves of a file."""

    data: bytes
    sound: bool
    """Whether it is whole and its checksums are right."""
    plain: bool
    """Whether nothing is left but pixels: no EXIF, no transparency."""


def png(data: bytes, beside: tuple[bytes, ...] = (b"tRNS", b"eXIf")) -> Png:
    """The critical chunks of a PNG and those ``beside``, transparency and EXIF; nothing after its end."""
    view, parts = memoryview(data), []
    place, first, sound, plain = 8, 0, data[12:16] == b"IHDR", True
    kind = b""
    while kind != b"IEND":
        length, kind = _CHUNK.unpack_from(data, place) if place + 12 <= len(data) else (0, b"")
        end = place + 12 + length
        if end > len(data) or not kind.isalpha():  # cut off or overwritten: a decoder decides
            sound, place = False, len(data)
            break
        critical = not kind[0] & 0x20
        good = (critical or kind in beside) and zlib.crc32(view[place + 4 : end - 4]) == int.from_bytes(
            view[end - 4 : end]
        )
        if kind == b"tRNS" and length < _TRANSPARENCY.get(data[25], 1):
            good = False
        sound = sound and (good or not critical)
        plain = plain and not (good and not critical)
        if not (critical or good):
            parts.append(view[first:place])
            first = end
        place = end
    return Png(b"".join([*parts, view[first:place]]) if parts or place < len(data) else data, sound, plain)


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, place and end of every segment of a JPEG before its first frame."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] not in _SCANS:
        if data[place + 1] == 0xFF:  # a marker may be filled up
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])  # the length is itself counted
        yield data[place + 1], place, end
        place = end


def _jpeg(data: bytes) -> bytes:
    parts, first = [], 0
    for marker, place, end in segments(data):
        contents = data[place + 4 : end]
        if (
            (marker == APP0 and len(contents) < 14)  # shorter ones are no JFIF and no Adobe, by libjpeg's rules
            or (marker == APP1 and not contents.startswith(EXIF))
            or (marker == APP14 and len(contents) < 12)
            or APP1 < marker < APP14
            or marker in (APP15, COMMENT)
        ):
            parts.append(data[first:place])
            first = end
    return b"".join([*parts, data[first:]]) if parts else data


def _tiff(data: bytes) -> bytes:
    """With a directory of the first image's pixels alone, at the end."""
    order = "<" if data[:1] == b"I" else ">"
    try:
        (place,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, place)
        entries = [data[place + 2 + 12 * i : place + 14 + 12 * i] for i in range(count)]
        kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_TAGS]
    except struct.error:
        return data
    even = data + b"\0" * (len(data) % 2)
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return b"".join([even[:4], struct.pack(order + "I", len(even)), even[8:], directory])


def _webp(data: bytes) -> bytes:
    """Without profile, XMP, unknown chunks and cut-off EXIF."""
    parts, place = [], 12
    while place + 8 <= len(data):
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        if kind == b"VP8X":  # its flags of a profile, EXIF and XMP
            parts.append(data[place : place + 8] + bytes([data[place + 8] & 0b11010011]) + data[place + 9 : end])
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            parts.append(data[place:end])
        elif kind == b"EXIF" and end <= len(data) and parts and parts[0][:4] == b"VP8X":
            parts.append(data[place:end])
            parts[0] = parts[0][:8] + bytes([parts[0][8] | 8]) + parts[0][9:]
        place = end
    body = b"".join(parts)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
