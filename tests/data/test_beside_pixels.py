"""What lies beside the pixels: no damage there costs an image, and nothing is printed; it is counted and said once."""

import io
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mocov3.config.presets import Reading
from mocov3.data import CentreView, Loader, Work
from mocov3.data.sources.opening import open_source
from mocov3.data.sources.survey import survey
from mocov3.data.views import remarks
from mocov3.data.views.decode import DecodeError, ImageBytes

RNG = np.random.Generator(np.random.PCG64(7))
IMAGE = Image.fromarray(RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((39, 31))
BAD_EXIF = b"Exif\0\0MM is no TIFF"


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation=6, maker=b"maker"):
    """EXIF by hand: a maker's name whose place can be wrong, then the orientation."""
    entries = struct.pack(">HHIIHHIHH", 0x010F, 2, 6, 38, 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4) + maker + b"\0"


def chunk(kind, data, wrong=0):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ wrong)


def with_chunk(image, extra, before=b"IDAT"):
    data = saved(image, "PNG")
    place = data.index(before) - 4
    return data[:place] + extra + data[place:]


CHUNKS = {
    "EXIF": chunk(b"eXIf", b"MM is no TIFF"),
    "EXIF, checksum": chunk(b"eXIf", exif()[6:], wrong=1),
    "text": b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_500_000))) for _ in range(50)),
    "text, no zlib": chunk(b"iTXt", b"k\0\1\0\0\0junk"),
    "text, checksum": chunk(b"tEXt", b"k\0v", wrong=1),
    "profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(struct.pack(">I", 132) + bytes(128))),
    "profile, method": chunk(b"iCCP", b"p\0\7junk"),
    "resolution": chunk(b"pHYs", bytes(3)),
    "XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="z'),
    "animation": chunk(b"acTL", bytes(3)),
    "unknown": chunk(b"xyZt", bytes(9_000_000), wrong=1),
}


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_damage_beside_the_pixels_of_a_png(mode, capfd):
    image = IMAGE.convert(mode) if mode != "I;16" else Image.fromarray(np.asarray(IMAGE.convert("L"), np.uint16) * 257)
    want = ImageBytes(saved(image, "PNG")).pixels()[0]
    deep = Reading(3, window=(0, 65535))
    for name, extra in CHUNKS.items():
        for before in (b"IDAT", b"IEND"):
            data = with_chunk(image, extra, before) + b"trailing junk"
            assert np.array_equal(ImageBytes(data).pixels()[0], want), (name, before)
            assert np.array_equal(ImageBytes(data, deep).pixels()[0], want), (name, before)
    assert capfd.readouterr() == ("", "")


def test_damage_of_the_pixels_of_a_png_is_still_found(capfd):
    data = saved(IMAGE, "PNG")
    place = data.index(b"IDAT")
    for broken in (
        data[: place + 60],
        data[: place + 40] + bytes([data[place + 40] ^ 255]) + data[place + 41 :],
        with_chunk(IMAGE, CHUNKS["text"])[: -len(data) // 2],
    ):
        with pytest.raises(DecodeError):
            ImageBytes(broken)
    assert capfd.readouterr() == ("", "")


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_beside_the_pixels_of_a_jpeg(mode, capfd):
    data = saved(IMAGE.convert(mode), "JPEG")
    want = ImageBytes(data).pixels()[0]
    turned = np.rot90(want, -1)
    for extra, expected in (
        (segment(0xE1, BAD_EXIF), want),
        (segment(0xE1, exif(6)), turned),
        (segment(0xE1, exif(6).replace(struct.pack(">I", 38), struct.pack(">I", 999))), None),  # either is fair
        (segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="z'), want),
        (segment(0xE2, b"ICC_PROFILE\0"), want),
        (segment(0xE2, b"MPF\0junk"), want),
        (segment(0xED, b"Photoshop 3.0\08BIM\4"), want),
        (segment(0xE0, b"JFIF\0"), want),
        (segment(0xFE, b"\xff" * 60_000), want),
    ):
        pixels = ImageBytes(data[:2] + extra + data[2:] + b"trailing junk").pixels()[0]
        assert any(np.array_equal(pixels, e) for e in ([expected] if expected is not None else [want, turned])), extra
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"big_tiff": True}])
def test_damage_beside_the_pixels_of_a_tiff(options, capfd):
    fields = Image.Exif()
    fields[0x010F], fields[0x0131] = "a maker's name", "a program's name"
    fields.get_ifd(0x8769)[0x9003] = "2001:02:03"
    data = saved(IMAGE, "TIFF", exif=fields, dpi=(300, 300), icc_profile=bytes(200), **options)
    want = ImageBytes(data).pixels()[0]
    assert np.array_equal(want, IMAGE) == (options.get("compression") != "jpeg")
    if options.get("big_tiff"):
        assert np.array_equal(ImageBytes(data + b"junk").pixels()[0], want)
        return
    (place,) = struct.unpack("<I", data[4:8])
    for i in range(*struct.unpack("<H", data[place : place + 2])):
        entry = place + 2 + 12 * i
        tag = struct.unpack("<H", data[entry : entry + 2])[0]
        if tag in (0x010F, 0x0131, 0x011A, 0x8769, 0x8773):  # maker, program, resolution, EXIF, profile
            for value in (2**31 - 1, 0):
                broken = data[: entry + 8] + struct.pack("<I", value) + data[entry + 12 :]
                assert np.array_equal(ImageBytes(broken).pixels()[0], want), (tag, value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lossless", [True, False])
def test_damage_beside_the_pixels_of_a_webp(lossless, capfd):
    want = ImageBytes(saved(IMAGE, "WEBP", lossless=lossless)).pixels()[0]
    profile = {"icc_profile": b"junk"}
    for options in ({"exif": BAD_EXIF}, {"xmp": b'<x tiff:Orientation="z', **profile}, profile):
        data = saved(IMAGE, "WEBP", lossless=lossless, **options)
        for cut in (data, data + b"junk", *([] if options is profile else [data[:-2]])):
            assert np.array_equal(ImageBytes(cut).pixels()[0], want), options
    turned = saved(IMAGE, "WEBP", lossless=lossless, exif=exif(3), xmp=b"junk", icc_profile=b"junk")
    assert np.array_equal(ImageBytes(turned).pixels()[0], np.rot90(want, 2))
    with pytest.raises(DecodeError):
        ImageBytes(saved(IMAGE, "WEBP", lossless=lossless)[:-40])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_large_images_are_read_in_silence(kind, capfd, monkeypatch):
    data = saved(IMAGE, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # from there on Pillow warns
    remarks.taken()
    for _ in range(2):
        ImageBytes(data)
        assert "exceeds limit of 1000 pixels" in remarks.taken()
    assert capfd.readouterr() == ("", "")


def test_other_warnings_are_not_swallowed():
    ImageBytes(saved(IMAGE, "GIF"))
    with pytest.warns(UserWarning, match="of the user"):
        warnings.warn("of the user", stacklevel=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_libraries_say_is_counted_and_said_once(tmp_path, workers, capfd):
    for i in range(12):
        damaged = {"exif": BAD_EXIF} if i % 3 == 1 else {}
        IMAGE.save(tmp_path / f"{i:02}.webp", **damaged)
    (tmp_path / "03.webp").write_bytes(b"RIFF")
    said = []
    source = open_source(str(tmp_path))
    with Loader(source, CentreView(16), batch_size=6, seed=0, workers=workers, say=said.append) as loader:
        for epoch in range(3):
            for batch in loader.run([Work(epoch, 0, np.arange(6)), Work(epoch, 1, np.arange(6, 12))]):
                assert {bad.index for bad in batch.corrupt} <= {3}
    assert len(said) == 1
    assert said[0].startswith("data: 4 images were read with remarks, first: 01.webp: its EXIF is damaged")
    assert capfd.readouterr() == ("", "")
    found = survey(source, np.arange(12), workers=0)
    assert [index for index, _ in found.remarked] == [1, 4, 7, 10]
    assert [index for index, _ in found.unreadable] == [3]


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000), (2, 60_000), (30_000, 3)])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_centre_of_a_thin_image(size, resample):
    width, height = size
    row = RNG.integers(0, 256, 8, dtype=np.uint8).repeat(-(-max(size) // 8))[: max(size)]
    pixels = np.broadcast_to(row, (min(size), max(size)))
    pixels = np.repeat((pixels if width > height else pixels.T)[..., None], 3, axis=2)
    (view,) = CentreView(64, resample=resample)(np.ascontiguousarray(pixels))
    # what is kept of the middle lies between its neighbours on either side of it
    near = row[max(size) // 2 - 40 : max(size) // 2 + 40]
    assert view.shape == (64, 64, 3)
    assert near.min() <= view.min() <= view.max() <= near.max() or resample == Image.Resampling.BICUBIC
    along = view[0, :, 0] if width > height else view[:, 0, 0]
    assert np.array_equal(view[..., 0], np.broadcast_to(along if width > height else along[:, None], (64, 64)))


@pytest.mark.parametrize("size", [(64, 300), (300, 64), (90, 20), (20, 90), (500, 70)])
@pytest.mark.parametrize("zoom", [1.0, 1.3])
def test_a_long_image_is_cut_as_if_resized_whole(size, zoom):
    smooth = Image.fromarray(RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    (view,) = CentreView(48, zoom)(np.asarray(smooth))
    side, short = round(48 * zoom), min(size)
    whole = smooth.resize([side * n // short for n in size], Image.Resampling.BILINEAR)
    left, top = (round((n - 48) / 2) for n in whole.size)
    want = np.asarray(whole.crop((left, top, left + 48, top + 48)))
    assert np.abs(view.astype(int) - want).max() <= 2  # the two directions are rounded in another order


def test_memory_is_that_of_what_is_made():
    """In a process of its own, as a peak is that of a process; docs/security.md states the bound."""
    pytest.importorskip("resource")
    code = """
        import resource
        import numpy as np
        from mocov3.data import CentreView, TwoViews
        from mocov3.data.loading.labelled import CropView
        from mocov3.data.views.probes import ProbeViews

        def peak(*sizes):
            for size in sizes:
                pixels = np.full((*size, 3), 7, np.uint8)
                for view in (TwoViews(), TwoViews(backend="library"), CropView(), CentreView(), ProbeViews()):
                    view(pixels, seed=1, epoch=0, index=0)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        print(-peak((60, 80)) + peak((1, 20_000), (8000, 1), (2, 2_000_000)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(run.stdout) * unit < 100e6
