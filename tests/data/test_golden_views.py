"""Golden H: the reference's augmentations, replayed draw by draw and compared in distribution.

The compiled kernel (what ``fast`` is where it was built, and what benchmarks/data.py times), the library path and
Pillow's operations are all held to the recorded numbers.
"""

import numpy as np
import pytest
from conftest import BACKENDS, GOLDEN, golden
from PIL import Image

from mocov3.config.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from mocov3.data import TwoViews
from mocov3.data.views.draws import Draw, draw
from mocov3.data.views.operations import apply_draw

TRACES = golden("h_traces.json")["traces"]
CELLS = golden("h_aug.json")["pipelines"]
FILES = {"smooth_320x240": "smooth_320x240.png", "china": "china.jpg", "flower": "flower.jpg"}
DRAWS = 2000


def recorded_draw(trace):
    jitter = trace["jitter_order_b_c_s_h"]
    return Draw(
        *trace["crop_top_left_h_w"],
        (tuple(jitter[0]), *jitter[1:]) if jitter else None,
        trace["gray"],
        trace["blur_sigma"],
        trace["solarize"],
        trace["flip"],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_traces(backend):
    largest_mean = 0.0 if backend == "pillow" else 1.5
    pixels = np.load(GOLDEN / "h_traces.npz")
    for trace in TRACES:
        image = np.asarray(Image.open(GOLDEN / "images" / trace["file"]).convert("RGB"))
        view = apply_draw(image, recorded_draw(trace), trace["size"], backend)
        difference = np.abs(view.astype(int) - pixels[trace["key"]].astype(int))
        assert difference.mean() <= largest_mean, trace["key"]


def near(got, se, recorded, name):
    """Within four standard errors of both."""
    want = recorded.get("mean", recorded.get("fraction"))
    other = recorded.get("stderr_of_mean", recorded.get("stderr"))
    assert abs(got - want) <= 4 * (se**2 + other**2) ** 0.5 + 1e-12, (name, got, want)


@pytest.mark.parametrize("cell", CELLS)
def test_draws_in_distribution(cell):
    image, crop, _, pipeline = cell.split("/")
    view = int(pipeline.removeprefix("aug")) - 1
    preset, recorded = PRESETS["photos"], CELLS[cell]
    width, height = Image.open(GOLDEN / "images" / FILES[image]).size
    crop_min = float(crop.removeprefix("crop"))
    drawn = [draw(preset, crop_min, width, height, seed=7, epoch=1, index=i, view=view) for i in range(DRAWS)]
    h, w = np.array([d.height for d in drawn]), np.array([d.width for d in drawn])
    top, left = np.array([d.top for d in drawn]), np.array([d.left for d in drawn])
    jitters = [d.jitter for d in drawn if d.jitter]
    values = {
        "crop_area": h * w / (height * width),
        "crop_aspect_w_over_h": w / h,
        "crop_log_aspect": np.log(w / h),
        "crop_center_x": (left + w / 2) / width,
        "crop_center_y": (top + h / 2) / height,
        "blur_sigma": np.array([d.blur_sigma for d in drawn if d.blur_sigma is not None]),
        "jitter_brightness": np.array([j[1] for j in jitters]),
        "jitter_contrast": np.array([j[2] for j in jitters]),
        "jitter_saturation": np.array([j[3] for j in jitters]),
        "jitter_hue": np.array([j[4] for j in jitters]),
    }
    for name, value in values.items():
        near(value.mean(), value.std() / len(value) ** 0.5, recorded[name], name)
        for level, quantile in recorded[name]["quantiles"].items():
            if level in ("0.25", "0.5", "0.75"):  # two samples of 2,000: a 5-sigma bound on the share below
                bound = 5 * (2 * 0.25 / min(len(value), recorded[name]["n"])) ** 0.5
                assert abs((value <= quantile).mean() - float(level)) <= bound, (name, level)
    fractions = {
        "gray_called": (np.array([d.gray for d in drawn]), preset.gray_probability),
        "solarize_called": (np.array([d.solarize for d in drawn]), preset.solarize_probability[view]),
        "blur": (np.array([d.blur_sigma is not None for d in drawn]), preset.blur_probability[view]),
        "jitter": (np.array([d.jitter is not None for d in drawn]), preset.jitter_probability),
    }
    for name, (hits, nominal) in fractions.items():
        se = (nominal * (1 - nominal) / DRAWS) ** 0.5
        assert abs(hits.mean() - nominal) <= 4 * se, name
        near(hits.mean(), se, recorded[name], name)
    flips = np.array([d.flip for d in drawn])
    assert abs(flips.mean() - 0.5) <= 4 * (0.25 / DRAWS) ** 0.5
    assert len({j[0] for j in jitters}) == recorded["jitter_order_distinct"] == 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", [c for c in CELLS if c.endswith("aug1")])
def test_pixels_in_distribution(cell, backend):
    image, crop, size, _ = cell.split("/")
    data = (GOLDEN / "images" / FILES[image]).read_bytes()
    views = TwoViews(int(size), float(crop.removeprefix("crop")), backend=backend)
    draws = 120 if size == "96" else 40
    measured = ([], [])
    for i in range(draws):
        for rows, pixels in zip(measured, views(data, seed=11, epoch=0, index=i), strict=True):
            x = pixels / 255.0
            normalised, gray = (x - IMAGENET_MEAN) / IMAGENET_STD, x.mean(2)
            laplacian = 4 * gray[1:-1, 1:-1] - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
            rows.append(
                [
                    *normalised.mean((0, 1)),
                    *normalised.std((0, 1)),
                    np.abs(np.diff(gray, axis=1)).mean(),
                    np.abs(np.diff(gray, axis=0)).mean(),
                    np.abs(laplacian).mean(),
                ]
            )
    for view, rows in enumerate(measured):
        recorded = CELLS[cell.removesuffix("1") + str(view + 1)]
        wanted = [
            *recorded["channel_mean"],
            *recorded["channel_std"],
            recorded["abs_dx"],
            recorded["abs_dy"],
            recorded["abs_laplacian"],
        ]
        values = np.array(rows)
        for i, want in enumerate(wanted):
            near(values[:, i].mean(), values[:, i].std() / draws**0.5, want, (view, i))
