"""Sources, draws, views and loader processes: the same images for any number of workers and ranks, and bad files."""

import gzip
import os
import shutil
import signal
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import BACKENDS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mocov3.config import PRESETS, ViewPreset
from mocov3.data import CentreView, FashionMnist, Loader, TwoViews, Work, open_source
from mocov3.data.loading.filling import Unreadable
from mocov3.data.loading.loader import batches
from mocov3.data.sources import embedded
from mocov3.data.sources import index as index_module
from mocov3.data.sources.index import Index
from mocov3.data.sources.opening import scan
from mocov3.data.views.decode import DecodeError, decode
from mocov3.data.views.draws import draw, permutation, replacement
from mocov3.errors import UserError


def loaded(source, workers, works, batch_size=16, seed=5, size=32):
    views = TwoViews(size, 0.2)
    with Loader(source, views, batch_size=batch_size, seed=seed, workers=workers) as loader:
        return [(b.work, b.pixels.copy(), b.corrupt) for b in loader.run(works)]


def epoch_plan(n, **changes):
    return list(
        batches(n, **{"seed": 5, "batch_size": 16, "rank": 0, "ranks": 1, "start": (0, 0), "epochs": 2, **changes})
    )


def test_workers_change_nothing(images):
    source = open_source(str(images))
    works = epoch_plan(len(source))
    assert len(works) == 8
    here = loaded(source, 0, works)
    spawned = loaded(source, 3, works)
    for (a, x, _), (b, y, _) in zip(here, spawned, strict=True):
        assert (a.epoch, a.iteration) == (b.epoch, b.iteration)
        assert np.array_equal(x, y)
    assert not np.array_equal(here[0][1], here[4][1])  # another epoch, other draws


def test_ranks_share_the_global_batch():
    whole = epoch_plan(50)
    parts = [epoch_plan(50, rank=r, ranks=4) for r in range(4)]
    for i, work in enumerate(whole):
        assert np.array_equal(work.indices, np.concatenate([p[i].indices for p in parts]))
    assert len(whole) == 2 * (50 // 16)  # the last part batch is dropped
    assert len(set(np.concatenate([w.indices for w in whole[:3]]))) == 48  # no image twice in an epoch


def test_a_plan_resumes_in_the_middle():
    whole = epoch_plan(50)
    rest = epoch_plan(50, start=(0, 2))
    assert [(w.epoch, w.iteration) for w in rest] == [(w.epoch, w.iteration) for w in whole[2:]]
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(rest, whole[2:], strict=True))


def test_permutation_is_one_and_pinned():
    assert sorted(permutation(1, 0, 100)) == list(range(100))
    assert not np.array_equal(permutation(1, 0, 100), permutation(1, 1, 100))
    assert not np.array_equal(permutation(1, 0, 100), permutation(2, 0, 100))
    # a resume years later must find the same order: recorded once
    assert permutation(7, 3, 8).tolist() == PINNED_ORDER
    first = draw(PRESETS["photos"], 0.08, 500, 375, seed=7, epoch=3, index=11, view=1)
    assert list(first[:4]) == PINNED_CROP
    assert 0 <= replacement(7, 3, 11, 0, 8) < 8


PINNED_ORDER = [2, 0, 7, 3, 5, 4, 1, 6]
PINNED_CROP = [27, 39, 299, 283]


@given(
    st.integers(1, 6000),
    st.integers(1, 4000),
    st.floats(0.01, 1),
    st.sampled_from(sorted(PRESETS)),
    st.integers(0, 2**31),
    st.integers(0, 1),
)
@settings(deadline=None, max_examples=200)
def test_every_crop_lies_in_the_image(width, height, crop_min, preset, seed, view):
    d = draw(PRESETS[preset], crop_min, width, height, seed=seed, epoch=0, index=3, view=view)
    pad = 2 * round(PRESETS[preset].pad * min(width, height))
    assert d.height >= 1
    assert d.width >= 1
    assert 0 <= d.top <= height + pad - d.height
    assert 0 <= d.left <= width + pad - d.width


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_any_image_becomes_two_views(backend, size, mode, tmp_path):
    rng = np.random.Generator(np.random.PCG64(1))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    out = np.full((2, 24, 24, 3), 7, np.uint8)
    a, b = TwoViews(24, 0.3, backend=backend)(path.read_bytes(), seed=1, epoch=0, index=0, out=out)
    assert a.shape == b.shape == (24, 24, 3)
    assert np.array_equal(out[0], a)
    assert np.array_equal(out[1], b)
    (centre,) = CentreView(24)(path.read_bytes())
    assert centre.shape == (24, 24, 3)


def test_centre_view_is_torchvisions():
    from torchvision import transforms as T

    for size in ((500, 375), (40, 64), (224, 224)):
        rng = np.random.Generator(np.random.PCG64(0))
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        theirs = T.Compose([T.Resize(round(96 * 256 / 224)), T.CenterCrop(96)])(image)
        (ours,) = CentreView(96)(np.asarray(image))
        assert np.array_equal(ours, np.asarray(theirs)), size


@pytest.mark.parametrize(("pad", "seen"), [(0.0, 0), (0.1, 60)])
def test_padding_shows_at_the_border(pad, seen):
    white = np.full((28, 28), 255, np.uint8)
    preset = ViewPreset(pad=pad, jitter_probability=0.0, blur_probability=(0.0, 0.0), solarize_probability=(0.0, 0.0))
    views = TwoViews(28, 0.9, preset)
    borders = sum(int((view == 0).any()) for i in range(50) for view in views(white, seed=1, epoch=0, index=i))
    assert borders == 0 if seen == 0 else borders >= seen


def test_folder_index(images):
    source = open_source(str(images))
    assert len(source) == 64
    assert source.classes == [f"class{i}" for i in range(4)]
    assert (np.bincount(source.labels) == 16).all()
    assert source.name(0) == os.path.join("class0", "00.jpg")
    assert len(open_source(str(images), "val")) == 16
    flat = scan(images / "train" / "class1")
    assert flat.labels is None
    assert len(flat) == 16
    assert flat.digest != source.digest
    assert scan(images / "train").digest == source.digest


def test_index_of_odd_names(tmp_path):
    names = ["a b.png", "ü.png", "x\ny.png"]
    names += [os.fsdecode(b"\xff.png")] if sys.platform == "linux" else []
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = scan(tmp_path)
    assert sorted(source.name(i) for i in range(len(source))) == sorted(names)
    assert all(source.read(i) for i in range(len(source)))


def test_large_index_is_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(index_module, "_SHARE_FROM", 100)
    paths = [f"{i:06d}.jpg".encode() for i in range(1000)]
    index = Index.build(paths, None)
    assert index.file
    assert index.file.startswith(str(tmp_path))
    import pickle

    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert pickle.loads(sent).path(999) == b"000999.jpg"
    os.unlink(index.file)  # the cache is emptied while this process goes on
    assert pickle.loads(pickle.dumps(index)).path(999) == b"000999.jpg"
    assert not list(tmp_path.rglob("*.partial"))


def test_fashion_mnist(tmp_path):
    train, val = FashionMnist("train"), FashionMnist("val")
    assert (len(train), len(val)) == (8000, 2000)
    assert train.read(0).shape == (28, 28)
    from torchvision.datasets import FashionMNIST

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    packaged = embedded._EMBEDDED
    for kind in ("images-idx3", "labels-idx1"):
        data = gzip.decompress((packaged / f"t10k-{kind}-ubyte.gz").read_bytes())
        (raw / f"t10k-{kind}-ubyte").write_bytes(data)
        (raw / f"train-{kind}-ubyte").write_bytes(data)  # stands in for the 60,000
    theirs = FashionMNIST(str(tmp_path), train=False)
    assert np.array_equal(theirs.data[:8000].numpy(), train.images)
    assert np.array_equal(theirs.targets[8000:].numpy(), val.labels)
    more = open_source(f"fashion-mnist:{tmp_path}")
    assert len(more) == 18000
    assert np.array_equal(more.images[10000:], train.images)
    (raw / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="missing"):
        open_source(f"fashion-mnist:{tmp_path}")
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0")
    with pytest.raises(UserError, match="IDX"):
        open_source(f"fashion-mnist:{tmp_path}")


def png_header(width, height):
    """A PNG that claims a size and holds no pixel."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\x04IDAT"


BAD = {"empty.jpg": b"", "text.png": b"this is no image", "cut.jpg": None, "bomb.png": png_header(100_000, 100_000)}


@pytest.fixture
def damaged(images, tmp_path):
    """Sixty-four good images and four that cannot be read, for four different reasons."""
    root = tmp_path / "damaged"
    shutil.copytree(images / "train", root)
    whole = (root / "class0" / "00.jpg").read_bytes()
    for i, (name, data) in enumerate(BAD.items()):
        (root / f"class{i}" / name).write_bytes(whole[: len(whole) // 2] if data is None else data)
    return root


def test_unreadable_images_are_replaced_alike(damaged):
    source = scan(damaged)
    works = epoch_plan(len(source), batch_size=17)
    runs = [loaded(source, workers, works, batch_size=17) for workers in (0, 2)]
    for (_, x, a), (_, y, b) in zip(*runs, strict=True):
        assert np.array_equal(x, y)
        assert sorted(c.index for c in a) == sorted(c.index for c in b)
    met = {c.name.split(os.sep)[-1]: c.reason for _, _, corrupt in runs[0] for c in corrupt}
    assert sorted(met) == sorted(BAD)
    assert "empty" in met["empty.jpg"]
    assert "pixels" in met["bomb.png"]
    assert met["text.png"] == "is not an image"


def test_nothing_readable_is_said(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    for workers in (0, 1):
        with pytest.raises(Unreadable, match=r"cannot be read"):
            loaded(scan(tmp_path), workers, [Work(0, 0, np.arange(3))])


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_a_image_or_a_reason(data):
    with pytest.raises(DecodeError):
        decode(data)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_a_killed_loader_process_is_named(images):
    source = open_source(str(images))
    works = epoch_plan(len(source), epochs=50)
    with Loader(source, TwoViews(64), batch_size=16, seed=1, workers=2) as loader:
        pids = [p.pid for p in loader._processes]
        coming = loader.run(works)
        for _ in range(3):
            next(coming)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="signal 9"):
            list(coming)
    for pid in pids:  # none is left behind
        for _ in range(50):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"loader process {pid} lives on")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_flat(monkeypatch):
    """10,000 samples of every kind, some damaged; benchmarks/memory.py does 200,000."""
    monkeypatch.syspath_prepend(ROOT)
    soak = pytest.importorskip("benchmarks.memory")
    held = [size for _, size in soak.measure(10_000, workers=1, size=32, folder=200)]
    assert len(held) >= 10
    assert held[-1] <= 1.05 * held[2]
