"""Folders, lists, several roots, groups: what is found, remembered and refused; the order of epochs; view strengths."""

import dataclasses
import os
import sys
import time

import numpy as np
import pytest
from conftest import tree
from doors import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mocov3.cli import parse_script
from mocov3.config import PRESETS, PretrainConfig, preset_of, read_yaml, write_yaml
from mocov3.data import TwoViews, open_source
from mocov3.data.loading.loader import batches
from mocov3.data.loading.order import Order
from mocov3.data.sources import index as index_module
from mocov3.data.sources.groups import groups_in
from mocov3.data.sources.index import recall
from mocov3.data.sources.opening import Roots, Subset, fractions, scan
from mocov3.data.views.draws import draw, permutation
from mocov3.errors import UserError
from mocov3.pretraining.inputs import open_images


def names(source):
    return [source.name(i).replace(os.sep, "/") for i in range(len(source))]


def test_a_tree_is_sorted_by_whole_paths(tmp_path):
    wanted = ["a-b/z.jpg", "a/b/c/0.png", "a/b/x.jpg", "a/b.jpg", "a/m.jpg", "a0/q.webp", "z.gif"]
    tree(tmp_path, *wanted, "a/notes.txt", "a/._m.jpg", ".hidden/x.jpg", "__MACOSX/m.jpg", "@eaDir/m.jpg")
    found = names(scan(tmp_path))
    assert found == sorted(wanted, key=os.fsencode)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed_but_never_back(tmp_path):
    tree(tmp_path / "data", "a/x.jpg")
    tree(tmp_path / "other", "y.jpg")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert names(scan(tmp_path / "data")) == ["a/x.jpg", "b/y.jpg"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_pipes_and_devices_are_never_opened(tmp_path):
    tree(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert names(scan(tmp_path)) == ["a.jpg"]
    (tmp_path / "l.txt").write_text("a.jpg\npipe.jpg\n/dev/zero\n")
    listed = open_source(str(tmp_path / "l.txt"))
    for index in (1, 2):
        with pytest.raises(OSError, match="regular"):
            listed.read(index)


def test_the_index_is_remembered_until_the_tree_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_SHARE_FROM", 1)
    data = tree(tmp_path / "data", "a/1.jpg", "b/2.jpg")
    old = time.time() - 100
    for folder in (data, data / "a", data / "b"):
        os.utime(folder, (old, old))
    first = scan(data)
    calls = []
    monkeypatch.setattr("mocov3.data.sources.scan._list_all", lambda root: calls.append(root))
    again = scan(data)  # nothing is listed
    assert (names(again), again.classes, again.digest) == (names(first), first.classes, first.digest)
    assert not calls
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_SHARE_FROM", 1)
    tree(data, "b/3.jpg")
    assert len(scan(data)) == 3
    # a folder changed just before it was read may change again unseen: it is read again
    assert recall(os.fsencode(data), "") is None
    (data / "b" / "3.jpg").unlink()
    assert len(scan(data)) == 2
    for file in (tmp_path / "cache").rglob("index-*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    os.utime(data / "b", (old, old))
    assert len(scan(data)) == 2  # damaged files of the cache are made anew, or passed over
    assert sorted(p.name for p in data.iterdir()) == ["a", "b"]


def test_lists(tmp_path):
    tree(tmp_path, "a/1.jpg", "b/ü 2.png", "#3.jpg")
    file = tmp_path / "list.txt"
    file.write_bytes("a/1.jpg\r\n\nb/ü 2.png\n#3.jpg\n".encode() + os.fsencode(tmp_path / "a" / "1.jpg"))
    source = open_source(str(file))
    assert names(source)[:3] == ["a/1.jpg", "b/ü 2.png", "#3.jpg"]
    assert [source.read(i) for i in range(4)] == [b"x"] * 4
    assert source.labels is None
    table = tmp_path / "list.csv"
    for text in (
        "label,path\ncat,a/1.jpg\ndog,b/ü 2.png\n",
        "a/1.jpg,cat\nb/ü 2.png,dog\n",
        '\ufefffile;class\na/1.jpg;cat\n"b/ü 2.png";dog\n',
    ):
        table.write_text(text, encoding="utf-8")
        source = open_source(str(table))
        assert (names(source), source.classes, source.labels.tolist()) == (
            ["a/1.jpg", "b/ü 2.png"],
            ["cat", "dog"],
            [0, 1],
        )
    table.write_text("path,label\na/1.jpg,cat\n#3.jpg,\n")
    assert open_source(str(table)).labels.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"", "names no image"),
        ("l.txt", b"gone.jpg\n", "none of the files"),
        ("l.txt", b"a.jpg\0\n", "zero bytes"),
        ("l.txt", "a.jpg".encode("utf-16") + b"\0", "UTF-16"),
        ("l.txt", b"https://example.org/a.jpg\n", "fetch the images"),
        ("l.csv", b"path,label\n,cat\n", "line 2 holds no path"),
        ("l.csv", b"path,label\n", "names no image"),
        ("l.bin", b"a.jpg\n", "a list ends in"),
        ("l.jpg", b"a.jpg\n", "name the folder"),
    ],
)
def test_bad_lists(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    line = refused("pretrain", tmp_path / name, "--output-dir", tmp_path / "out")
    assert message in line
    assert name in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DIR", "DIR:0"], "above 0 and at most 1"),
        (["DIR", "DIR:2"], "lower the others"),
        (["DIR", "gone"], "no such folder"),
        (["DIR", "DIR/empty"], "holds no image"),
        (["DIR", "DIR\n"], "line break"),
        (["x" * 5000], "File name too long"),
        (["DIR", "--group-by", "["], "regular expression"),
        (["DIR", "--group-by", "^"], "one group"),
        (["DIR", "--group-by", "^(.)", "-b", "3"], "2 groups"),
        (["DIR", "DIR:0.5", "--group-by", "^(.)", "-b", "2"], "fractions of folders"),
        (["DIR", "--hold-out", "3"], "at most half"),
        (["DIR", "--hold-out", "-1"], "--hold-out"),
        (["DIR", "--hue", "0.7"], "--hue must be 0 to 0.5"),
        (["DIR", "--blur-sigma", "2,1"], "smaller number comes first"),
        (["DIR", "--blur-probability", "often"], "commas"),
        (["DIR", "--solarize-probability", "0,2"], "between 0 and 1"),
        (["DIR", "--mean-std", "0.5,0"], "--mean-std"),
        (["DIR", "--turn-probability", "nan"], "--turn-probability"),
    ],
)
def test_bad_sources_and_strengths(words, message, tmp_path):
    tree(tmp_path / "d", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    (tmp_path / "d" / "empty").mkdir()
    argv = [w.replace("DIR", str(tmp_path / "d")) for w in words]
    assert message in refused("pretrain", *argv, "--output-dir", tmp_path / "out")


def test_several_roots_with_shares(tmp_path):
    one = tree(tmp_path / "one", *(f"{i:02d}.jpg" for i in range(20)))
    two = tree(tmp_path / "two", *(f"{i:02d}.jpg" for i in range(40)))
    config = parse_script("main_moco.py", [str(one), "-b", "4", "--epochs", "3", f"{two}:0.25"])
    source, _, order = open_images(config)
    assert isinstance(source, Roots)
    assert (len(source), order.images, order.iterations) == (60, 30, 7)
    assert (source.name(0), source.name(20), source.read(59)) == ("1:00.jpg", "2:00.jpg", b"x")
    epochs = [order.epoch(7, e) for e in range(40)]
    for indices in epochs:
        assert len(indices) == len(set(indices.tolist())) == 30
        assert (indices >= 20).sum() == 10
    assert len(set(np.concatenate(epochs).tolist())) == 60  # others each epoch
    works = list(batches(60, seed=7, batch_size=4, rank=0, ranks=1, start=(1, 2), epochs=2, order=order))
    assert np.array_equal(works[0].indices, epochs[1][8:12])
    write_yaml(config, tmp_path / "c.yaml", "x")
    assert "- " in (tmp_path / "c.yaml").read_text()
    assert PretrainConfig(**read_yaml(tmp_path / "c.yaml", PretrainConfig)) == config
    assert Roots([source, source], [1, 0.5]).digest != Roots([source, source], [1, 1]).digest


def test_images_held_out_are_no_function_of_seed_or_run(tmp_path):
    data = tree(tmp_path, *(f"{g}/{i}.jpg" for g in "abcdefgh" for i in range(5)))
    base = PretrainConfig(data=str(data), batch_size=4, hold_out=10)
    train, held, order = open_images(base)
    assert (len(train), len(held), order.n) == (30, 10, 30)
    assert set(names(train)).isdisjoint(names(held))
    assert names(open_images(dataclasses.replace(base, seed=5))[1]) == names(held)
    grouped = open_images(dataclasses.replace(base, group_by="^(.)"))
    assert {n[0] for n in names(grouped[0])}.isdisjoint({n[0] for n in names(grouped[1])})
    assert len(grouped[1]) == 10
    part = Subset(Roots([train, held], [1, 0.5]), np.array([0, 5, 31, 32]))
    assert fractions(part) == [(2, 1), (2, 0.5)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=100)
def test_a_batch_holds_one_of_a_group(groups, batch, seed):
    groups = np.array(groups, np.int32)
    order = Order(len(groups), batch, None, np.unique(groups, return_inverse=True)[1].astype(np.int32))
    sizes = np.bincount(groups)
    best = max(b for b in range(len(groups) // batch + 1) if np.minimum(sizes, b).sum() >= b * batch)
    assert order.iterations == best
    if not best:
        with pytest.raises(UserError):
            order.check()
        return
    indices = order.epoch(seed, 1)[: best * batch]
    assert len(set(indices.tolist())) == best * batch
    for part in groups[indices].reshape(best, batch):
        assert len(set(part.tolist())) == batch
    assert len({order.epoch(seed, e).tobytes() for e in range(1, 9)}) > 1 or len(groups) < 6


def test_groups_are_read_from_names(tmp_path):
    source = scan(tree(tmp_path, "film1/a_01.jpg", "film1/a_02.jpg", "film2/a_01.jpg", "single.jpg"))
    assert groups_in(source, "^([^/]+)/").tolist() == [0, 0, 1, 2]
    assert groups_in(source, r"film\d").tolist() == [0, 0, 1, 2]
    assert np.array_equal(Order(9, 2).epoch(3, 4), permutation(3, 4, 9))


def test_aerial_views_show_all_eight_ways_up():
    image = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    still = {
        "jitter_probability": 0.0,
        "gray_probability": 0.0,
        "blur_probability": (0.0, 0.0),
        "solarize_probability": (0.0, 0.0),
    }
    preset = dataclasses.replace(PRESETS["aerial"], **still)
    ways = {np.rot90(m, k).tobytes() for m in (image, image[:, ::-1]) for k in range(4)}
    for backend in ("fast", "pillow"):
        views = TwoViews(16, 1.0, preset, backend)
        seen = [v[..., 0].tobytes() for i in range(200) for v in views(image, seed=1, epoch=0, index=i)]
        counts = {way: seen.count(way) for way in ways}
        assert sum(counts.values()) > 0.15 * len(seen)  # the others are crops of another ratio
        assert all(counts.values())
    for name in ("photos", "gray"):  # draws of former presets carry no turn
        d = draw(PRESETS[name], 0.2, 60, 50, seed=1, epoch=2, index=3, view=1)
        assert (d.flip_vertical, d.turns) == (False, 0)


def test_strengths_are_flags_over_the_preset(tmp_path):
    argv = "x --view-preset inspection --blur-probability 0.7 --hue 0 --mean-std 0.5,0.25 --crop-pad 0.1"
    config = parse_script("main_moco.py", argv.split())
    wanted = dataclasses.replace(
        PRESETS["inspection"], blur_probability=(0.7, 0.7), hue=0.0, pad=0.1, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert config.preset == preset_of(dataclasses.asdict(config)) == wanted
    assert config.crop_min == PRESETS["inspection"].crop_min
    assert parse_script("main_moco.py", ["x", "--view-preset", "aerial", "--crop-min", "0.5"]).crop_min == 0.5
    assert parse_script("main_moco.py", ["x"]).preset == PRESETS["photos"]


def test_names_of_every_script(tmp_path):
    folder = tmp_path / "日本語 und ein langer Name" / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "Straße №1.png")
    source = scan(tmp_path)
    assert names(source)[0].endswith("Straße №1.png")
    assert source.read(0)
