"""Few giants do not rule: smaller copies, their place and bounds, slow images, processes that follow, planned time."""

import io
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from slow_images import Failing, Slow, Stamp

from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.config.local_views import LocalViews
from mocov3.config.presets import PRESETS, Reading, ViewPreset
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.loading.dispatch import Follow
from mocov3.data.loading.loader import batches, slots_ahead
from mocov3.data.sources.survey import giants
from mocov3.data.views import copies
from mocov3.data.views.copies import Copies, factor_of, opened_copies, size_of, used
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.label_free import ViewsToJudge, features_of_views, pixel_features
from mocov3.planning.choose import _looked_at
from mocov3.planning.reading import mean_seconds, parts_by_size
from mocov3.pretraining import inputs
from mocov3.pretraining.label_free_evaluation import _many_giants

PLAIN = ViewPreset(jitter_probability=0, blur_probability=(0, 0), solarize_probability=(0, 0))
ORIENTATION = 0x0112


def drawing(height, width, seed=0):
    """Smooth colours under sharp lines, as large as wanted."""
    rng = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for at in rng.integers(0, min(height, width) - 8, 30):
        pixels[at : at + 5], pixels[:, at : at + 7] = 0, 255
    return pixels


def saved(pixels, kind, turn=0):
    exif, buffer = Image.Exif(), io.BytesIO()
    if turn:
        exif[ORIENTATION] = turn
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "turn", "reading"),
    [("PNG", 0, Reading()), ("JPEG", 6, Reading()), ("TIFF", 0, Reading()), ("PNG", 0, Reading(channels=1))],
)
def test_views_of_copies_are_those_of_the_image(kind, turn, reading, tmp_path):
    data = saved(drawing(1203, 1699), kind, turn)
    width, height = (1699, 1203) if turn < 5 else (1203, 1699)
    preset = ViewPreset(**{**vars(PLAIN), "reading": reading})
    local = LocalViews(2, 16, 0.1, 0.4)
    views = TwoViews(32, 0.2, preset, local=local, copies=Copies(str(tmp_path), 1 << 20))
    whole = TwoViews(32, 0.2, preset, local=local)
    assert views.copy_factor(data) > 4
    for index in range(4):
        where = {"seed": 0, "epoch": 0, "index": index}
        assert views._choices(width, height, **where) == whole._choices(width, height, **where)
        pairs = list(zip(views(data, **where), whole(data, **where), strict=True))
        assert len(pairs) == 4
        for ours, theirs in pairs:
            difference = np.abs(ours.astype(float) - theirs)
            assert difference.mean() <= 3  # the bound of JPEGs that are decoded smaller
            assert abs(ours.mean() - theirs.mean()) < 1
            assert abs(ours.std() - theirs.std()) < 2.5
    assert used(str(tmp_path))[0] == 1


def test_a_giant_is_decoded_once_and_never_changes_a_view(tmp_path, monkeypatch):
    data = saved(drawing(1500, 1700), "PNG")
    where = {"seed": 3, "epoch": 1, "index": 5}
    without_room = TwoViews(16, 0.3, PLAIN, copies=Copies(str(tmp_path), 0))
    views = TwoViews(16, 0.3, PLAIN, copies=Copies(str(tmp_path), 1 << 20))
    first = without_room(data, **where)
    assert used(str(tmp_path)) == (0, 0)
    made = views(data, **where)
    count, size = used(str(tmp_path))
    assert (count, size) == (1, views.copies.added)
    (file,) = tmp_path.glob("*/*.copy")
    file.write_bytes(file.read_bytes()[:40])  # cut short: it is made again
    mended = views(data, **where)
    monkeypatch.setattr(copies, "ImageBytes", lambda *_: pytest.fail("decoded again"))
    found = TwoViews(16, 0.3, PLAIN, copies=Copies(str(tmp_path), 0))(data, **where)
    for a, b, c, d in zip(first, made, mended, found, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
        assert np.array_equal(a, d)


def test_only_images_many_times_larger_have_copies(tmp_path):
    giant, small = saved(drawing(1500, 1700), "PNG"), saved(drawing(200, 300), "PNG")
    assert [size_of(d) for d in (giant, small, b"none", b"")] == [(1700, 1500), (300, 200), None, None]
    side = np.sqrt(0.2 * 1500 * 1700 * 0.75)
    assert factor_of(giant, PLAIN, [(0.2, 32)]) == int(side / 64)
    assert factor_of(giant, PLAIN, [(0.2, 32), (0.05, 32)]) == int(side / 2 / 64)
    assert factor_of(giant, PLAIN, [(0.2, 224)]) == factor_of(small, PLAIN, [(0.2, 32)]) == 1
    assert factor_of(giant, PRESETS["gray"], [(0.2, 32)]) == 1  # which adds a border
    several = ViewPreset(**{**vars(PLAIN), "reading": Reading(channels=5)})
    assert factor_of(giant, several, [(0.2, 32)]) == 1
    kept = Copies(str(tmp_path), 1 << 20)
    assert TwoViews(32, 0.2, PLAIN, "pillow", copies=kept).copy_factor(giant) == 1
    assert TwoViews(32, 0.2, PLAIN, copies=kept).copy_factor(drawing(1500, 1700)) == 1


def test_the_size_of_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "MOST", 4000)
    folder = tmp_path / "smaller" / "ab"
    folder.mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.copy").write_bytes(bytes(800))
        os.utime(folder / f"{i}.copy", (i, i))
    kept = opened_copies(tmp_path, 2)
    assert sorted(f.name for f in folder.iterdir()) == ["6.copy", "7.copy", "8.copy"]  # the newest
    assert (kept.room, used(kept.folder)) == (800, (3, 2400))
    kept.pixels(saved(np.zeros((900, 900, 3), np.uint8), "PNG"), Reading(), 9)  # little, as it is black
    assert 0 < kept.added <= 800
    kept.pixels(saved(drawing(900, 900), "PNG"), Reading(), 9)
    assert kept.added <= 800


@pytest.mark.parametrize("where", [".", "smaller", "smaller/??"])
def test_no_cache_changes_no_view(tmp_path, monkeypatch, where):
    """A file lies where a folder should, which also root cannot write into."""
    data, draws = saved(drawing(1500, 1700), "PNG"), {"seed": 3, "epoch": 1, "index": 5}
    kept = TwoViews(16, 0.3, PLAIN, copies=opened_copies(tmp_path, 1))(data, **draws)
    base = tmp_path / "bad" / "mocov3"
    for number in range(256 if "?" in where else 1):
        file = base / where.replace("??", f"{number:02x}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no folder")
    monkeypatch.setattr(inputs, "cache_folder", lambda: base)
    found = inputs.copies_of(PretrainConfig(), 1)
    views = TwoViews(16, 0.3, PLAIN, copies=found)(data, **draws)
    assert all(np.array_equal(a, b) for a, b in zip(kept, views, strict=True))
    assert used(found.folder) == (0, 0)


def test_without_any_folder_for_a_cache_views_are_the_same(monkeypatch, tmp_path):
    def refuse():
        raise UserError("nowhere can be written")

    data, draws = saved(drawing(1500, 1700), "PNG"), {"seed": 3, "epoch": 1, "index": 5}
    kept = TwoViews(16, 0.3, PLAIN, copies=opened_copies(tmp_path, 1))(data, **draws)
    monkeypatch.setattr(inputs, "cache_folder", refuse)
    views = TwoViews(16, 0.3, PLAIN, copies=inputs.copies_of(PretrainConfig(), 1))(data, **draws)
    assert all(np.array_equal(a, b) for a, b in zip(kept, views, strict=True))


def test_a_run_says_what_it_keeps(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(16):
        Image.fromarray(drawing(*((1400, 1300) if i == 3 else (40, 50)), seed=i)).save(folder / f"{i}.png")
    flags = [str(folder), *TINY, "--image-size", "16", "--epochs", "1", "--crop-min", ".3", "--warmup-epochs", "0"]
    assert main(["pretrain", *flags, "--no-smaller-copies", "--output-dir", str(tmp_path / "a")]) == 0
    assert "smaller cop" not in capsys.readouterr().out
    assert main(["pretrain", *flags, "--output-dir", str(tmp_path / "b")]) == 0
    assert "1 smaller copies of large images, 0.0 MB of at most" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "mocov3" / "smaller").glob("*/*.copy"))) == 1


def test_a_look_and_judgements_go_without_a_few_giants(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "GIANT", 40 * 40 - 1)
    for number in range(24):
        (tmp_path / f"{number:02d}.png").write_bytes(saved(drawing(16, 16, number), "PNG"))
    (tmp_path / "03.png").write_bytes(saved(drawing(40, 40), "PNG"))
    (tmp_path / "07.png").write_bytes(b"no image")
    source, everything = open_source(str(tmp_path)), np.arange(24)
    assert np.flatnonzero(giants(source, everything)).tolist() == [3]
    assert _looked_at(source).tolist() == [n for n in range(24) if n != 3]
    assert not _many_giants(source)
    seen = [
        features_of_views(
            Extractor(torch.nn.Identity(), pixel_features, view, (0.5,) * 3, (0.2,) * 3),
            ViewsToJudge(source, view, world=World(0, 1, torch.device("cpu"))),
        )[1].tolist()
        for view in (ProbeViews(16, giants=seen_too) for seen_too in (True, False))
    ]
    assert seen == [[n for n in range(24) if n != 7], [n for n in range(24) if n not in (3, 7)]]
    for number in range(24):  # all of them: there is nothing else to look at
        (tmp_path / f"{number:02d}.png").write_bytes(saved(drawing(40, 40, number), "PNG"))
    assert _looked_at(source).tolist() == everything.tolist()
    assert _many_giants(source)


def test_a_slow_image_does_not_stop_the_others():
    works = list(batches(160, seed=1, batch_size=8, rank=0, ranks=1, start=(0, 0), epochs=1))
    slow = int(works[1].indices[3])
    ready = []
    with Loader(Slow(160, {slow}, 1.5), Stamp(), batch_size=8, seed=1, workers=2) as loader:
        for work, made in zip(works, loader.run(works), strict=True):
            assert made.work is work
            ready.append(made.pixels[0].reshape(8, -1)[:, :8].copy().view(np.float64).ravel())
    end = ready[1][3]
    before = sum(bool((times < end).all()) for times in ready)
    assert before >= 18  # all other batches were made meanwhile by the other process
    assert slots_ahead(100) == 32
    assert slots_ahead(20 << 20) == 3
    assert slots_ahead(300 << 20) == 2


def test_what_fails_in_the_thread_is_raised():
    works = list(batches(32, seed=1, batch_size=8, rank=0, ranks=1, start=(0, 0), epochs=1))
    before = threading.active_count()
    with (
        Loader(Slow(32, (), 0), Failing(), batch_size=8, seed=1, workers=1) as loader,
        pytest.raises(RuntimeError, match="on purpose"),
    ):
        next(iter(loader.run(works)))
    assert threading.active_count() == before


def test_processes_follow_the_share_of_waiting():
    now = SimpleNamespace(seconds=0.0)
    follow = Follow(1, 3, lambda: now.seconds)

    def windows(count, share):
        for _ in range(count * 4):
            now.seconds += Follow.WINDOW / 4
            follow.waited(share * Follow.WINDOW / 4)
        return follow.active

    assert windows(3, 0.05) == 1
    assert windows(1, 0.4) == 2
    assert windows(1, 0.4) == 3
    assert windows(5, 0.4) == 3  # there are no more
    assert windows(20, 0.0) == 3  # fewer were too few a moment ago
    assert windows(30, 0.0) < 3
    assert windows(60, 0.0) == 1


def test_planned_time_knows_the_giants():
    rng = np.random.Generator(np.random.PCG64(0))
    sizes = rng.integers(5_000, 60_000, 8112)
    sizes = rng.permutation(np.append(sizes, rng.integers(900_000, 4_000_000, 9)))
    asked = []

    def timed(place):
        asked.append(place)
        small = sizes[place] < 100_000
        return (0.002, 0.002) if small else (2.5, 0.003)

    mean = mean_seconds(sizes, timed, longest=30)
    true = np.mean([0.002 if s < 100_000 else 0.003 + 2.497 / 10 for s in sizes])
    assert mean == pytest.approx(true, rel=0.25)
    assert len(asked) < 400
    parts = parts_by_size(sizes)
    assert sorted(np.concatenate(parts).tolist()) == list(range(8121))
    assert [len(p) for p in parts[-3:]] == [2, 1, 1] or [len(p) for p in parts[-2:]] == [1, 1]
    # no time to read the largest: judged by the seconds a byte of those before
    quick = mean_seconds(sizes, lambda place: (0.1, 0.1), longest=0.35)
    assert quick > 0.1
    assert mean_seconds(np.zeros(50), lambda place: (0.2, 0.2)) == pytest.approx(0.2)
    assert mean_seconds(np.arange(9), lambda place: None) == 0
