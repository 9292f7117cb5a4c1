"""Fast views: every operation against Pillow over its range, the kernel's edges, shrunk decoding, and its building."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import BACKENDS, GOLDEN, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mocov3.config import PRESETS, ViewPreset
from mocov3.data import TwoViews
from mocov3.data.views import native
from mocov3.data.views.draws import Draw, draw, draw_all
from mocov3.data.views.operations import apply_draw

CHINA = np.asarray(Image.open(GOLDEN / "images" / "china.jpg").convert("RGB"))
PLAIN = Draw(0, 0, 224, 224, None, False, None, False, False)
FAST = BACKENDS[1:]
built = pytest.mark.skipif(not native.available(), reason="the kernel is not built: no compiler")


def mean_difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


def jitter(operation, factor):
    """A jitter of one operation; the others do nothing (hue still rounds to 8 bits, in Pillow too)."""
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[operation] = factor
    order = (operation, *(i for i in range(4) if i != operation))
    return (order, *factors)


CHANGES = {
    **{f"brightness {f}": {"jitter": jitter(0, f)} for f in (0.0, 0.6, 0.8, 1.0, 1.2, 1.4, 2.0)},
    **{f"contrast {f}": {"jitter": jitter(1, f)} for f in (0.0, 0.6, 0.8, 1.0, 1.2, 1.4, 2.0)},
    **{f"saturation {f}": {"jitter": jitter(2, f)} for f in (0.0, 0.8, 0.9, 1.1, 1.2, 2.0)},
    **{f"hue {f}": {"jitter": jitter(3, f)} for f in (-0.5, -0.1, -0.05, -0.004, 0.0, 0.03, 0.1, 0.5)},
    "all": {"jitter": ((3, 1, 0, 2), 1.3, 0.7, 1.15, 0.08)},
    "grey": {"gray": True},
    "solarise": {"solarize": True},
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("change", CHANGES)
def test_colours_are_pillows(change, backend):
    for part in (CHINA[:224, :224], CHINA[150:374, 300:524]):
        choice = PLAIN._replace(**CHANGES[change])
        ours, theirs = (apply_draw(part, choice, 224, b) for b in (backend, "pillow"))
        assert mean_difference(ours, theirs) <= (0.1 if backend == "native" else 1.5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.4, 0.7, 1.0, 1.3, 1.41, 1.42, 1.7, 2.0, 5.0, 30.0])
def test_blurs_are_pillows(sigma, backend):
    choice = PLAIN._replace(blur_sigma=sigma)
    ours, theirs = (apply_draw(CHINA[:224, :224], choice, 224, b) for b in (backend, "pillow"))
    assert mean_difference(ours, theirs) <= 3


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", [7, 28, 96, 224, 250])
def test_crops_are_pillows(size, backend):
    for seed in range(12):
        choice = draw(PRESETS["photos"], 0.05, 640, 427, seed=seed, epoch=0, index=0, view=0)
        choice = PLAIN._replace(top=choice.top, left=choice.left, height=choice.height, width=choice.width)
        ours, theirs = (apply_draw(CHINA, choice, size, b) for b in (backend, "pillow"))
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        flipped = apply_draw(CHINA, choice._replace(flip=True), size, backend)
        assert np.array_equal(flipped, ours[:, ::-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_turns(backend):
    choice = PLAIN._replace(flip=True, blur_sigma=1.0)
    want = apply_draw(CHINA, choice, 32, backend)
    out = np.empty((2, 32, 32, 3), np.uint8)
    for flip_vertical in (False, True):
        for turns in range(4):
            moved = choice._replace(flip_vertical=flip_vertical, turns=turns)
            assert apply_draw(Image.fromarray(CHINA), moved, 32, backend, out=out[1]).base is out
            assert np.array_equal(out[1], np.rot90(want[::-1] if flip_vertical else want, turns))


@built
def test_kernel_and_library_make_the_same_views():
    data = (GOLDEN / "images" / "flower.jpg").read_bytes()
    for index in range(40):
        ways = [TwoViews(96, backend=b)(data, seed=1, epoch=0, index=index) for b in ("native", "library")]
        for a, b in zip(*ways, strict=True):
            assert mean_difference(a, b) <= 1.5


@built
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 50), st.integers(0, 2**31), st.sampled_from([0, 128, 255])
)
@settings(deadline=None, max_examples=150)
def test_kernel_stays_inside(width, height, size, seed, value):
    """Any sizes: bytes around the output stay, one colour stays one colour (nothing overflows)."""
    preset = ViewPreset(jitter_probability=0, solarize_probability=(0, 0), blur_probability=(1, 0.5))
    choice = draw(preset, 0.01, width, height, seed=seed, epoch=0, index=0, view=1)
    room = np.full(3 * size * size + 64, 77, np.uint8)
    out = room[32:-32].reshape(size, size, 3)
    apply_draw(np.full((height, width, 3), value, np.uint8), choice, size, "native", out=out)
    assert (room[:32] == 77).all()
    assert (room[-32:] == 77).all()
    assert (out == value).all()


@built
@pytest.mark.parametrize("shape", [(6000, 4000), (4000, 6000), (1, 5000), (5000, 1)])
def test_kernel_shrinks_far(shape):
    """Some hundred pixels weighed into one: white stays white, and means stay means."""
    pixels = np.full((*shape, 3), 255, np.uint8)
    choice = PLAIN._replace(height=shape[0], width=shape[1], blur_sigma=2.0)
    assert (apply_draw(pixels, choice, 8, "native") == 255).all()
    pixels[::2] = 0
    if shape[0] > 1:
        assert abs(apply_draw(pixels, choice, 8, "native").mean() - 127.5) <= 1.5


@built
def test_kernel_takes_parts_of_images():
    """Rows apart, as in a part of a larger array; what the kernel cannot read is refused."""
    part = CHINA[10:110, 20:150]
    choice = PLAIN._replace(top=5, left=7, height=60, width=70)
    assert np.array_equal(
        apply_draw(part, choice, 32, "native"), apply_draw(np.ascontiguousarray(part), choice, 32, "native")
    )

    def view(pixels, box, out):
        native.views(pixels, [native.View(box, flip=False, jitter=None, gray=False, blur=0.0, solarize=False)], [out])

    out = np.empty((8, 8, 3), np.uint8)
    for box in ((0, 0, 101, 10), (-1, 0, 5, 5), (0, 125, 5, 6), (0, 0, 0, 5)):
        with pytest.raises(ValueError, match="lie"):
            view(part, box, out)
    with pytest.raises(ValueError, match="pixels"):
        view(CHINA[:, ::2], (0, 0, 5, 5), out)
    with pytest.raises(ValueError, match="out"):
        view(CHINA, (0, 0, 5, 5), out[:, :, ::-1])


@built
@pytest.mark.parametrize("preset", PRESETS)
def test_the_kernel_draws_what_is_drawn_without_it(preset):
    """To the last bit: of every shape, with ranges that leave no crop but the fallback's, far seeds and indices."""
    rng = np.random.default_rng(0)
    every = replace(
        PRESETS[preset], turn_probability=0.7, vertical_flip_probability=0.5, solarize_probability=(0.3, 0.6)
    )
    for drawn in (PRESETS[preset], every, replace(every, ratio=(0.4, 0.5)), replace(every, ratio=(2.0, 3.0))):
        crops = [(0.08, 1.0), (0.2, 1.0), (0.05, 0.4), (0.9, 1.0), (1.0, 1.0)]
        for width, height in [(32, 32), (28, 28), (500, 375), (1, 1), (1, 90), (3000, 2), (17, 640)]:
            for _ in range(8):
                seed, epoch, index = (int(n) for n in rng.integers(0, [1 << 63, 1000, 1 << 40]))
                where = {"seed": seed, "epoch": epoch, "index": index}
                wanted = [
                    draw(drawn, low, width, height, view=view, crop_max=most, **where)
                    for view, (low, most) in enumerate(crops)
                ]
                assert draw_all(drawn, crops, width, height, **where) == wanted


def test_large_images_are_decoded_smaller(tmp_path):
    """A 12-megapixel JPEG: at 1/2 to 1/8 where every crop allows, and hardly another view."""
    big = Image.fromarray(np.tile(CHINA, (7, 6, 1))[:2800, :3600])
    big.save(tmp_path / "big.jpg", quality=90)
    data = (tmp_path / "big.jpg").read_bytes()
    whole = np.asarray(Image.open(tmp_path / "big.jpg"))
    plain = ViewPreset(jitter_probability=0, blur_probability=(0, 0), solarize_probability=(0, 0))
    for index in range(3):
        ours = TwoViews(224, 0.2, plain)(data, seed=0, epoch=0, index=index)
        theirs = TwoViews(224, 0.2, plain, backend="pillow")(whole, seed=0, epoch=0, index=index)
        for a, b in zip(ours, theirs, strict=True):
            assert 0 < mean_difference(a, b) <= 3


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16"]),
    st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]),
    st.sampled_from([1, 17, 32, 96]),
    st.integers(0, 2**40),
)
@settings(deadline=None, max_examples=120)
def test_any_image_any_view(width, height, mode, kind, size, index):
    """Any size, kind of pixels and file: the fast views are near Pillow's of the same draws."""
    smooth = np.add.outer(np.arange(height) % 97, 2 * (np.arange(width) % 61)).astype(np.uint8)
    image = Image.fromarray(np.dstack([smooth, smooth[:, ::-1], 255 - smooth])).convert("RGB")
    image = Image.fromarray(smooth.astype(np.uint16) << 8) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
    except (OSError, KeyError):  # no such mode in such a file
        image.convert("RGB").save(buffer, kind)
    ways = [
        TwoViews(size, 0.08, backend=b)(buffer.getvalue(), seed=2, epoch=1, index=index) for b in ("fast", "pillow")
    ]
    bound = 16 if size == 1 else 8  # all operations together, on images full of edges, decoded smaller or not
    for ours, theirs in zip(*ways, strict=True):
        assert ours.shape == (size, size, 3)
        assert mean_difference(ours, theirs) <= bound


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_24_megapixels(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(CHINA[:400, :600], (10, 10, 1))).save(
        buffer, kind, **{"PNG": {"compress_level": 1}}.get(kind, {})
    )
    views = TwoViews(32, 0.08)(buffer.getvalue(), seed=0, epoch=0, index=0)
    assert abs(np.mean(views) - CHINA[:400, :600].mean()) < 60


def test_threads_make_the_same_views():
    """Draws keep one generator a thread."""
    from concurrent.futures import ThreadPoolExecutor

    def one(index):
        return draw(PRESETS["photos"], 0.08, 500, 375, seed=3, epoch=index % 5, index=index, view=index % 2)

    alone = [one(i) for i in range(400)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(400))) == alone


def test_without_the_kernel(tmp_path):
    """The switch: the same call by the library path."""
    code = (
        "import sys, numpy as np; from mocov3.data.views import TwoViews, native; assert not native.available();"
        "views = TwoViews(32)(open(sys.argv[1], 'rb').read(), seed=1, epoch=0, index=0);"
        "print(*(int(v.sum()) for v in views))"
    )
    image = GOLDEN / "images" / "china.jpg"
    done = subprocess.run(
        [sys.executable, "-c", code, image],
        cwd=ROOT,
        env={**os.environ, "MOCOV3_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    views = TwoViews(32, backend="library")(image.read_bytes(), seed=1, epoch=0, index=0)
    assert [int(x) for x in done.stdout.split()] == [int(v.sum()) for v in views]


@pytest.mark.skipif(os.name == "nt" or not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_building(compiler, tmp_path):
    """With a compiler the kernel is built, as an install does; without, building succeeds without it."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for 77, which an install fetches")
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "mocov3/version.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    shutil.copytree(
        ROOT / "mocov3/data/views/native", tmp_path / "mocov3/data/views/native", ignore=shutil.ignore_patterns("*.so")
    )
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "CC": compiler},
    )
    assert done.returncode == 0, done.stderr
    made = native._load(str(tmp_path / "mocov3/data/views/native"))
    assert (made is not None) == (compiler == "cc"), done.stderr


@built
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_the_compiled_centre_is_pillows_to_the_last_bit(resample):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (2, 1), (1, 300), (64, 64), (375, 500), (500, 375), (40, 333), (600, 300)]
    shapes += [(min(h, 2 * w), w) for h, w in rng.integers(1, 400, (30, 2)).tolist()]
    for height, width in shapes:
        pixels = (
            rng.integers(0, 256, (height, width, 3), dtype=np.uint8) // 128 * 255
        )  # the cubic goes beyond 0 and 255
        size = int(rng.integers(1, 260))
        side = size + int(rng.integers(0, 60))
        tall, wide = (max(side * n // min(height, width), side) for n in (height, width))
        top, left = round((tall - size) / 2), round((wide - size) / 2)
        whole = Image.fromarray(pixels).resize((wide, tall), resample)
        found = native.centre(
            np.pad(pixels, ((0, 0), (0, 5), (0, 0)))[:, :width],  # rows apart
            (tall, wide),
            (top, left),
            size,
            cubic=resample == Image.Resampling.BICUBIC,
        )
        assert np.array_equal(found, np.asarray(whole)[top : top + size, left : left + size]), (height, width, size)


@built
def test_the_compiled_centre_refuses_what_lies_outside():
    pixels = np.zeros((8, 8, 3), np.uint8)
    for resized, corner, size in (((8, 8), (1, 0), 8), ((8, 8), (0, -1), 8), ((7, 8), (0, 0), 8), ((8, 8), (0, 0), 0)):
        with pytest.raises(ValueError, match="does not lie in"):
            native.centre(pixels, resized, corner, size)
    with pytest.raises(ValueError, match="side by side"):
        native.centre(pixels.transpose(1, 0, 2), (8, 8), (0, 0), 8)
