"""Views on the device against views on the CPU, and what loader processes hand over for them."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TINY
from PIL import Image, ImageFilter

from mocov3.cli import main
from mocov3.config import PRESETS
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.device import colours
from mocov3.data.device.pixels import PixelViewBatch
from mocov3.data.loading.loader import batches
from mocov3.data.views.draws import COLOUR_DRAWS, Draw, colour_draw, draw
from mocov3.data.views.operations import apply_draw

CHINA = np.asarray(Image.open(GOLDEN / "images" / "china.jpg").convert("RGB"))


def on_device(pixels, choices):
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    parameters = np.array([colour_draw(c) for c in choices], np.float32)
    return colours.apply(x, parameters).permute(0, 2, 3, 1).numpy()


def differences(pixels, choices, size):
    whole = [c._replace(top=0, left=0, height=size, width=size, flip=False) for c in choices]
    there = on_device(pixels, whole)
    assert there.min() >= 0
    assert there.max() <= 255
    assert np.array_equal(there, np.rint(there))
    return [np.abs(a - apply_draw(p, c, size, "pillow")).mean() for a, p, c in zip(there, pixels, whole, strict=True)]


def test_every_draw_is_pillows():
    """A batch in which each image has a draw of its own, order of jitter included."""
    choices = [draw(PRESETS["photos"], 0.08, 640, 427, seed=5, epoch=0, index=i, view=i % 2) for i in range(96)]
    pixels = [CHINA[3 * i : 3 * i + 96, 5 * i : 5 * i + 96] for i in range(96)]
    assert len({c.jitter[0] for c in choices if c.jitter}) > 15
    found = differences(pixels, choices, 96)
    assert max(found) <= 2
    assert np.mean(found) <= 0.5


@pytest.mark.parametrize(("channels", "most", "mean"), [(1, 2, 0.3), (5, 3, 1)])
def test_other_numbers_of_channels(channels, most, mean):
    """Blur of many channels is OpenCV's on the CPU, within 3 of Pillow's (test_views); one channel's is Pillow's."""
    choices = [draw(PRESETS["photos"], 0.08, 640, 427, seed=6, epoch=0, index=i, view=i % 2) for i in range(64)]
    assert any(c.gray for c in choices)
    wide = np.concatenate([CHINA, CHINA[::-1, ::-1]], 2)[..., :channels]
    found = differences([wide[3 * i : 3 * i + 64, 5 * i : 5 * i + 64] for i in range(64)], choices, 64)
    assert max(found) <= most
    assert np.mean(found) <= mean
    sharp = [c._replace(blur_sigma=None) for c in choices]
    assert max(differences([wide[100:164, 200:264]] * 64, sharp, 64)) <= 0.1


@pytest.mark.parametrize("operation", range(4))
def test_jitter_over_its_range(operation):
    factors = [-0.5, -0.1, 0.0, 0.07, 0.5] if operation == 3 else [0.0, 0.6, 1.0, 1.4, 2.0]
    choices = []
    for factor in factors:
        values = [1.0, 1.0, 1.0, 0.0]
        values[operation] = factor
        order = (operation, *(i for i in range(4) if i != operation))
        choices.append(Draw(0, 0, 96, 96, (order, *values), False, None, False, False))
    assert max(differences([CHINA[100:196, 200:296]] * len(choices), choices, 96)) <= 0.1


def test_nothing_to_do_changes_nothing():
    pixels = CHINA[:64, :64]
    plain = Draw(0, 0, 64, 64, None, False, None, False, False)
    assert np.array_equal(on_device([pixels], [plain])[0], pixels)


@pytest.mark.parametrize("sigma", [0.1, 0.9, 1.5, 2.0, 6.0])
def test_blur_kernel(sigma):
    kernel = colours.box_blur_kernel(sigma)
    places = np.arange(len(kernel)) - len(kernel) // 2
    assert abs(kernel.sum() - 1) < 1e-12
    assert abs((kernel * places**2).sum() - sigma**2) < 1e-9  # box blurs of exactly this variance together
    point = np.zeros((101, 101), np.uint8)
    point[:, 50] = 255
    theirs = np.asarray(Image.fromarray(point).filter(ImageFilter.GaussianBlur(sigma)))[50]
    ours = np.convolve(point[50], kernel, mode="same")
    assert np.abs(ours - theirs).max() <= 3  # theirs is rounded six times


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_are_made_outside_autocast(dtype):
    """A network's 16 bits do not reach its views, which are whole numbers up to 255 on the way."""
    choices = [draw(PRESETS["photos"], 0.08, 640, 427, seed=3, epoch=0, index=i, view=i % 2) for i in range(8)]
    pixels = np.stack([CHINA[7 * i : 7 * i + 40, 9 * i : 9 * i + 40] for i in range(8)])
    parameters = np.array([colour_draw(c) for c in choices], np.float32)
    view = PixelViewBatch(pixels, torch.device("cpu"), (0.5,) * 3, (0.25,) * 3, parameters)
    want = view[2:]
    with torch.autocast("cpu", dtype):
        got = view[2:]
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("more", [(), ("--micro-batch", "6"), ("-a", "vit_tiny", "--optimizer", "adamw")])
def test_sixteen_bits_with_views_on_the_device(images, tmp_path, more):
    flags = [str(images), *TINY, "--views-on", "device", "--precision", "bf16", "--max-steps", "2", *more]
    assert main(["pretrain", *flags, "--output-dir", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["skipped"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_hands_over_what_is_left(images, workers):
    source = open_source(str(images))
    works = list(batches(len(source), seed=9, batch_size=17, rank=0, ranks=1, start=(0, 0), epochs=1))
    made = {}
    for crop_only in (False, True):
        views = TwoViews(32, 0.2, crop_only=crop_only)
        with Loader(source, views, batch_size=17, seed=9, workers=workers if crop_only else 0) as loader:
            made[crop_only] = [
                (b.pixels.copy(), None if b.colour_draws is None else b.colour_draws.copy()) for b in loader.run(works)
            ]
    for (want, nothing), (crops, parameters) in zip(made[False], made[True], strict=True):
        assert nothing is None
        assert parameters.shape == (2, 17, COLOUR_DRAWS)
        for view in range(2):
            x = torch.from_numpy(crops[view]).permute(0, 3, 1, 2)
            got = colours.apply(x, parameters[view]).permute(0, 2, 3, 1).numpy()
            assert np.abs(got - want[view]).mean((1, 2, 3)).max() <= 2
        assert not np.array_equal(crops, want)


def test_a_run_with_views_on_the_device(run_program, images, tmp_path):
    flags = [images, *TINY, "--views-on", "device", "--quiet"]
    run_program("pretrain", *flags, "--output-dir", "whole", cwd=tmp_path)
    run_program("pretrain", *flags, "--output-dir", "part", "--max-steps", "5", cwd=tmp_path)
    run_program("pretrain", *flags, "--output-dir", "part", "--resume", "auto", "-j", "1", cwd=tmp_path)
    states = [
        torch.load(tmp_path / name / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
        for name in ("whole", "part")
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    refused = run_program("pretrain", *flags, "--views", "pillow", "--output-dir", "x", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "--views-on" in refused.stderr
