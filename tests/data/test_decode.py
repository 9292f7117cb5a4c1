"""Bytes to pixels: a rule for every kind of image, and the fast ways against Pillow's."""

import contextlib
import io

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image, ImageOps

from mocov3.data.views.decode import DecodeError, ImageBytes, _by_pillow, decode

RNG = np.random.Generator(np.random.PCG64(0))
COLOURS = np.asarray(Image.open(GOLDEN / "images" / "china.jpg").convert("RGB"))[100:161, 200:283]
ORIENTATION = 0x0112


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    """By the fastest way and by Pillow, which must agree."""
    fast, shrink = ImageBytes(data).pixels()
    assert shrink == 1
    assert np.array_equal(fast, _by_pillow(data))
    assert np.array_equal(fast, np.asarray(decode(data)))
    image = ImageBytes(data)
    assert fast.shape == (image.height, image.width, 3)
    assert fast.dtype == np.uint8
    return fast


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"restart": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_pillows(mode, options):
    options = {"restart_marker_rows": 1} if options == {"restart": 1} else options
    data = saved(Image.fromarray(COLOURS).convert(mode), "JPEG", **options)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_meant(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(COLOURS), kind, exif=exif, **options)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(pixels(data), np.asarray(want))
    assert pixels(data).shape[:2] == (COLOURS.shape[:2] if orientation < 5 else COLOURS.shape[1::-1])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_jpegs_shrink(shrink, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if orientation > 1:
        assert ImageBytes(saved(Image.fromarray(COLOURS), "JPEG", exif=exif)).pixels(shrink)[1] == 1
    part = COLOURS if orientation == 1 else COLOURS[:56, :80]
    data = saved(Image.fromarray(part), "JPEG", exif=exif, quality=95)
    small, by = ImageBytes(data).pixels(shrink)
    whole = pixels(data)
    assert by == shrink
    assert small.shape[:2] == (-(-whole.shape[0] // shrink), -(-whole.shape[1] // shrink))
    h, w = whole.shape[0] // shrink, whole.shape[1] // shrink
    blocks = whole[: h * shrink, : w * shrink].reshape(h, shrink, w, shrink, 3).mean((1, 3))
    assert np.abs(blocks - small[:h, :w]).mean() <= 6  # colour is stored at half resolution


def test_transparency_lies_over_white():
    alpha = np.zeros(COLOURS.shape[:2], np.uint8)
    alpha[20:] = 255
    alpha[:10] = 128
    image = Image.fromarray(np.dstack([COLOURS, alpha]))
    out = pixels(saved(image, "PNG"))
    assert (out[10:20] == 255).all()
    assert np.array_equal(out[20:], COLOURS[20:])
    half = np.rint((COLOURS[:10] * 128.0 + 255 * 127) / 255)
    assert np.abs(out[:10] - half).max() <= 1
    gray = pixels(saved(image.convert("LA"), "PNG"))
    assert (gray[10:20] == 255).all()


def test_palettes():
    image = Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(saved(image, "PNG")), np.asarray(image.convert("RGB")))
    index = int(np.asarray(image)[0, 0])
    out = pixels(saved(image, "GIF", transparency=index))
    assert (out[np.asarray(image) == index] == 255).all()
    gray = pixels(saved(Image.fromarray(COLOURS).convert("L"), "PNG", transparency=90))
    assert (gray[np.asarray(Image.fromarray(COLOURS).convert("L")) == 90] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_become_their_upper_eight(kind):
    values = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
    out = pixels(saved(Image.fromarray(values), kind))
    assert np.array_equal(out, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_other_depths():
    whole = RNG.integers(0, 70000, (20, 30)).astype(np.int32)
    expected = (whole.clip(0, 65535) >> 8).astype(np.uint8)
    assert np.array_equal(pixels(saved(Image.fromarray(whole), "TIFF"))[..., 0], expected)
    broken = np.array([[-5.0, 0.4, 254.6, 300.0, np.nan]], np.float32)
    assert pixels(saved(Image.fromarray(broken), "TIFF"))[0, :, 1].tolist() == [0, 0, 254, 255, 0]
    assert set(np.unique(pixels(saved(Image.fromarray(COLOURS).convert("1"), "PNG")))) == {0, 255}


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_counts(kind):
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (40, 90, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    out = pixels(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert (out == 40).all()


def test_plain_pngs_are_pillows():
    for image in (Image.fromarray(COLOURS), Image.fromarray(COLOURS).convert("L")):
        data = saved(image, "PNG")
        assert np.array_equal(pixels(data), np.asarray(image.convert("RGB")))
        for cut in (40, len(data) // 2):
            with pytest.raises(DecodeError):
                ImageBytes(data[:cut])
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 0xFF
        with pytest.raises(DecodeError):
            ImageBytes(bytes(damaged))


def test_damaged_jpegs():
    data = saved(Image.fromarray(COLOURS), "JPEG")
    for cut in (2, 3, 4, 10, 30, 200, len(data) // 2):
        with pytest.raises(DecodeError):
            ImageBytes(data[:cut]).pixels()
    bomb = bytearray(data)
    place = data.index(b"\xff\xc0") + 5
    bomb[place : place + 4] = b"\xff\xff\xff\xff"  # claims 65,535 × 65,535 pixels
    with pytest.raises(DecodeError, match="pixels"):
        ImageBytes(bytes(bomb))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = saved(Image.fromarray(COLOURS), "JPEG", exif=exif)
    for place in range(2, 60):  # whatever the EXIF says, nothing but an image or a reason
        broken = bytearray(turned)
        broken[place] ^= 0xFF
        with contextlib.suppress(DecodeError):
            ImageBytes(bytes(broken)).pixels()


def test_pixels_must_be_bytes():
    assert ImageBytes(np.zeros((4, 5), np.uint8)).pixels()[0].shape == (4, 5, 3)
    for wrong in (np.zeros((4, 5), np.uint16), np.zeros((4, 5, 4), np.uint8), np.zeros(5, np.uint8)):
        with pytest.raises(DecodeError):
            ImageBytes(wrong)
