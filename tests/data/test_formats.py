"""HEIC, AVIF and JPEG XL: found and decoded with the extra ``formats``, named with the cure without it."""

import importlib.util
import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from mocov3.data.sources.opening import open_source
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.data.views import formats, jxl
from mocov3.data.views.decode import DecodeError, ImageBytes

MODULES = {"HEIF": "pillow_heif", "AVIF": "PIL._avif", "JXL": "pillow_jxl"}
ENDINGS = {"HEIF": ".heic", "AVIF": ".avif", "JXL": ".jxl"}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(importlib.util.find_spec(module) is None, reason="the extra formats"))
    for kind, module in MODULES.items()
]
SMOOTH = np.asarray(Image.fromarray(np.mgrid[0:9, 0:7].sum(0).astype(np.uint8) * 15).convert("RGB").resize((56, 40)))


def saved(kind, pixels=SMOOTH, **options):
    formats._register()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_pixels(kind):
    pixels = ImageBytes(saved(kind)).pixels()[0]
    assert pixels.shape == SMOOTH.shape
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 3
    clear = np.dstack([SMOOTH, np.full(SMOOTH.shape[:2], 255, np.uint8)])
    clear[:20, :, 3] = 0
    over_white = ImageBytes(saved(kind, clear)).pixels()[0]
    assert over_white[:18].min() > 245
    assert np.abs(over_white[22:].astype(int) - SMOOTH[22:]).mean() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind, capfd):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    data = saved(kind, exif=exif.tobytes())
    want = ImageBytes(data).pixels()[0]
    broken = data.replace(b"MM\0*\0\0\0\x08", b"no TIFF.").replace(b"II*\0\x08\0\0\0", b"no TIFF.")
    assert kind == "JXL" or broken != data  # which may be compressed
    assert np.array_equal(ImageBytes(broken).pixels()[0], want)
    assert np.array_equal(ImageBytes(data + (b"" if kind == "JXL" else b"junk")).pixels()[0], want)
    assert want.shape == (SMOOTH.shape if kind == "JXL" else (56, 40, 3))  # JPEG XL's own header says how it lies
    for cut in (3, 12, 20, 40, len(data) // 2):
        with pytest.raises(DecodeError):
            ImageBytes(data[:cut])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_found_in_folders_and_archives(kind, tmp_path):
    ending = ENDINGS[kind]
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    data = saved(kind)
    for name in ("b" + ending, "a" + ending.upper()):
        (folder / name).write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, "class")
    for place in (tmp_path / "images", tmp_path / "a.tar"):
        source = open_source(str(place))
        assert len(source) == 2
        assert np.array_equal(ImageBytes(source.read(1)).pixels()[0], ImageBytes(data).pixels()[0])


HEADERS = {
    ".heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    ".avif": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
    ".jxl": b"\xff\x0a\x41\x06\x00\x13\x88\x02",
}


@pytest.mark.parametrize("ending", HEADERS)
def test_what_is_missing_is_named_with_its_cure(ending, monkeypatch):
    known = formats.endings()
    assert (ending in known) == (ending in EXTENSIONS) == (not formats.cure(ending))
    monkeypatch.setattr(formats, "_there", lambda module: False)
    assert formats.endings() == ()
    assert formats.cure(ending.upper()) == "pip install 'mocov3[formats]'"
    assert formats.cure(".txt") == formats.cure(".jpg") == ""
    assert formats.missing(HEADERS[ending]).endswith("pip install 'mocov3[formats]'")
    assert not formats.missing(b"\xff\xd8\xff")


def test_the_cure_is_the_reason_of_an_unreadable_image(monkeypatch):
    monkeypatch.setattr(formats, "_there", lambda module: False)
    with pytest.raises(DecodeError, match=r"is HEIF: pip install 'mocov3\[formats\]'"):
        ImageBytes(HEADERS[".heic"])  # as phones write them, whatever the file is called


SIZES = [(8, 8), (40, 48), (300, 200), (1000, 1), (1, 1), (123, 77), (1600, 900), (256, 128), (70_000, 3), (1 << 20, 5)]


def header(width, height):
    """ISO/IEC 18181-1, SizeHeader, without its shorter forms: bits from the lowest on."""
    bits, place = 0, 1
    for n, (after, count) in ((height, (0, 0)), (width, (3, 0))):
        place += after  # the ratio, 0: a width follows
        kind = next(i for i, count in enumerate((9, 13, 18, 30)) if n <= 1 << count)
        count = (9, 13, 18, 30)[kind]
        bits |= (kind | (n - 1) << 2) << place
        place += 2 + count
    return b"\xff\x0a" + bits.to_bytes(12, "little")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_jpeg_xl(size):
    stream = header(*size)
    assert jxl.size(stream) == size
    signature, brand = b"\0\0\0\x0cJXL \r\n\x87\n", b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
    box = struct.pack(">I", 8 + len(stream)) + b"jxlc" + stream
    parts = b"".join(
        struct.pack(">I4sI", 12 + len(part), b"jxlp", i) + part for i, part in enumerate((stream[:5], stream[5:]))
    )
    long = struct.pack(">I4sQ", 1, b"jxlc", 16 + len(stream)) + stream
    for boxes in (box, parts, long, b"\0\0\0\0jxlc" + stream):
        assert jxl.size(signature + brand + boxes) == size
    with pytest.raises(ValueError, match="damaged"):
        jxl.size(signature + brand)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.values[0] == "JXL"])
@pytest.mark.parametrize("size", [size for size in SIZES if size[0] < 1001])
def test_sizes_of_jpeg_xl_as_its_library_writes_them(kind, size):
    data = saved(kind, np.zeros((*size[::-1], 3), np.uint8))
    assert jxl.size(data) == size


def test_the_size_is_checked_before_anything_is_decoded():
    for claimed in ((1 << 29, 1 << 29), (20_000, 20_000)):
        with pytest.raises(DecodeError, match="pixels are more than"):
            ImageBytes(header(*claimed))
