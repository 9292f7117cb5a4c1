"""Images of one channel, of many, and of more than 8 bits: from the file to a trained, judged network."""

import io

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import GOLDEN, TINY
from PIL import Image

from mocov3.cli import parse_script
from mocov3.config.presets import PRESETS, Reading
from mocov3.data import CentreView, TwoViews
from mocov3.data.views import bands, remarks
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.data.views.draws import draw
from mocov3.errors import UserError
from mocov3.models import build_backbone
from mocov3.weights.start import load_start

RNG = np.random.Generator(np.random.PCG64(5))
DEEP = RNG.integers(0, 4096, (40, 52), dtype=np.uint16)
MANY = RNG.integers(0, 256, (44, 36, 5), dtype=np.uint8)
TWELVE = Reading(1, (0, 4095))
CHINA = (GOLDEN / "images" / "china.jpg").read_bytes()


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def png(values):
    return cv2.imencode(".png", values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def windowed(values, low, high):
    return np.clip(np.rint((values.astype(float) - low) * 255 / (high - low)), 0, 255)


def read(data, reading):
    return ImageBytes(data, reading).pixels()[0]


@pytest.mark.parametrize("make", [tiff, png, lambda v: tiff(v, byteorder=">")], ids=["tiff", "png", "big-endian"])
def test_a_window_maps_deep_samples_linearly(make):
    got = read(make(DEEP), TWELVE)
    assert (got.dtype, got.shape) == (np.uint8, (40, 52, 1))
    assert np.array_equal(got[..., 0], windowed(DEEP, 0, 4095))
    assert np.array_equal(
        read(make(DEEP), Reading(3, (1000, 3000))), windowed(DEEP, 1000, 3000)[..., None].repeat(3, 2)
    )
    assert np.array_equal(read(make(DEEP), Reading(1)), (DEEP >> 8)[..., None])  # without one: the upper 8 bits


def test_deep_colour_keeps_its_depth():
    colours = RNG.integers(0, 4096, (20, 30, 3), dtype=np.uint16)
    for data in (png(colours), tiff(colours, photometric="rgb")):
        assert np.array_equal(read(data, Reading(3, (0, 4095))), windowed(colours, 0, 4095))


def test_floats_and_old_greys_are_windowed():
    heights = RNG.normal(0, 3, (30, 20)).astype(np.float32)
    assert np.array_equal(read(tiff(heights), Reading(1, (-5, 5)))[..., 0], windowed(heights, -5, 5))
    buffer = io.BytesIO()
    Image.fromarray(DEEP).save(buffer, "PPM")  # 16 bits, which Pillow alone reads
    assert np.array_equal(read(buffer.getvalue(), TWELVE)[..., 0], windowed(DEEP, 0, 4095))


def test_a_window_leaves_8_bits_alone():
    assert np.array_equal(read(CHINA, Reading(3, (0, 4095))), read(CHINA, Reading(3)))


def test_one_channel_is_pillows_grey():
    want = np.asarray(Image.open(io.BytesIO(CHINA)).convert("L"))
    assert np.array_equal(read(CHINA, Reading(1))[..., 0], want)


@pytest.mark.parametrize(
    "options", [{}, {"planarconfig": "separate"}, {"imagej": True}], ids=["pixel", "plane", "page"]
)
def test_many_channels_are_as_stored(options):
    values = np.moveaxis(MANY, 2, 0) if options else MANY
    more = {"photometric": "minisblack", "planarconfig": "contig"} if not options else {}
    more |= {"photometric": "minisblack"} if "planarconfig" in options else {}
    more |= {"metadata": {"axes": "CYX"}} if "imagej" in options else {}
    assert np.array_equal(read(tiff(values, **options, **more), Reading(5)), MANY)


def test_four_channels_are_not_laid_over_white():
    rgba = RNG.integers(0, 256, (9, 11, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    assert np.array_equal(read(buffer.getvalue(), Reading(4)), rgba)


@pytest.mark.parametrize(
    ("data", "reading", "said"),
    [
        (tiff(MANY, photometric="minisblack", planarconfig="contig"), Reading(4), "holds 5 channels, not 4"),
        (b"", Reading(5), "is not an image"),
        (b"II*\0garbage", Reading(5), "cannot be read"),
        (tiff(DEEP)[:200], TWELVE, "cannot be read"),
        (png(DEEP)[:100], TWELVE, "damaged PNG"),
        (tiff(np.zeros((2, 3, 4, 5), np.uint8), photometric="minisblack"), Reading(7), "channels"),
    ],
    ids=["count", "empty", "garbage", "cut tiff", "cut png", "four axes"],
)
def test_what_does_not_fit_is_refused(data, reading, said):
    with pytest.raises(DecodeError, match=said):
        read(data, reading)


@pytest.mark.parametrize("channels", [2, 5])
def test_what_is_stored(channels):
    """Read of a header alone: many channels are named where RGB is wanted, and values that come out black."""
    values = RNG.integers(0, 4096, (8, 9, channels), dtype=np.uint16)
    data = tiff(values, photometric="minisblack", planarconfig="contig")
    assert bands.stored(data) == (channels, True)
    assert bands.stored(tiff(np.moveaxis(MANY, 2, 0), photometric="minisblack", planarconfig="separate")) == (5, False)
    assert bands.stored(png(DEEP)) == (3, True)
    assert bands.stored(CHINA) is bands.stored(data[:40]) is None
    for reading in (Reading(), Reading(1), Reading(3, (0, 4095))):
        with pytest.raises(DecodeError, match=f"holds {channels} channels, not"):
            read(data, reading)


def test_dark_values_are_remarked():
    remarks.taken()
    for data, reading, said in (
        (tiff(DEEP), Reading(), "values end at 4095 of 65535"),
        (png(DEEP), Reading(1), "values end at 4095 of 65535"),
        (png(DEEP), TWELVE, ""),
        (tiff(DEEP * 16), Reading(), ""),
        (CHINA, Reading(), ""),
    ):
        read(data, reading)
        assert said in (remark := remarks.taken())
        assert bool(said) == bool(remark)


def test_a_huge_claim_is_refused_before_decoding():
    data = bytearray(png(np.zeros((8, 8), np.uint16)))
    data[16:24] = (60000).to_bytes(4) * 2
    with pytest.raises(DecodeError, match="more than"):
        read(bytes(data), TWELVE)


def test_a_grey_view_is_the_channel_of_the_coloured_one():
    """No saturation, hue or grey is left: the same draws of a grey image in colour have equal channels."""
    grey = Image.open(io.BytesIO(CHINA)).convert("L")
    colour = np.asarray(grey.convert("RGB"))
    still = PRESETS["photos"].__class__(saturation=0.0, hue=0.0, gray_probability=0.0)
    one = still.__class__(**{**vars(still), "reading": Reading(1), "mean": (0.5,), "std": (0.2,)})
    for index in range(8):
        want = TwoViews(32, 0.2, still)(colour, seed=1, epoch=0, index=index)
        got = TwoViews(32, 0.2, one)(np.asarray(grey), seed=1, epoch=0, index=index)
        for a, b in zip(got, want, strict=True):
            assert a.shape == (32, 32, 1)
            assert np.abs(a.astype(int) - b[..., :1]).max() <= 1  # hue by 0 rounds
    centre = CentreView(32, reading=Reading(1))(np.asarray(grey))[0]
    assert np.array_equal(centre[..., 0], CentreView(32)(colour)[0][..., 0])


def test_views_of_many_channels_treat_all_alike():
    """Five equal channels stay equal, and are the one-channel view but for the resize's rounding."""
    plane = RNG.integers(0, 256, (50, 60), dtype=np.uint8)
    five = np.repeat(plane[..., None], 5, 2)
    base = vars(PRESETS["aerial"])

    def preset(channels):
        return type(PRESETS["aerial"])(**{**base, "reading": Reading(channels), "pad": 0.1})

    for index in range(12):
        many = TwoViews(24, 0.2, preset(5), "pillow")(five, seed=3, epoch=0, index=index)
        single = TwoViews(24, 0.2, preset(1), "pillow")(plane, seed=3, epoch=0, index=index)
        for a, b in zip(many, single, strict=True):
            assert a.shape == (24, 24, 5)
            assert (a == a[..., :1]).all()
            # OpenCV's blur against Pillow's three boxes, and rounding
            assert np.abs(a[..., :1].astype(int) - b).mean() < 3
    d = draw(preset(5), 0.2, 60, 50, seed=3, epoch=0, index=0, view=0)
    assert d == draw(preset(1), 0.2, 60, 50, seed=3, epoch=0, index=0, view=0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bit-window", "5"], "takes two values"),
        (["--bit-window", "9,3"], "lower one first"),
        (["--bit-window", "a,b"], "not numbers"),
        (["--channels", "0"], "--channels must be 1 to 64"),
        (["--channels", "5", "--mean-std", "0.1,0.2,0.3"], "5 means and 5 deviations"),
    ],
)
def test_refusals(flags, said):
    with pytest.raises(UserError, match=said):
        parse_script("main_moco.py", ["DIR", *TINY, *flags]).check()


def test_starting_weights_of_colour_for_grey(tmp_path):
    torch.manual_seed(0)
    colour = build_backbone("resnet18")
    torch.save(colour.state_dict(), tmp_path / "rgb.pth")
    grey = build_backbone("resnet18", in_chans=1)
    load_start(str(tmp_path / "rgb.pth"), [grey], "resnet18")
    x = torch.rand(2, 1, 64, 64)
    colour.eval(), grey.eval()
    torch.testing.assert_close(grey.features(x), colour.features(x.expand(2, 3, 64, 64)), rtol=1e-4, atol=1e-5)
