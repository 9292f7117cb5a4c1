"""Links between folders, and what is left out of folders, archives and tables, with what to do about it."""

import io
import os
import random
import sys
import tarfile
import time

import numpy as np
import pytest
from conftest import tree
from doors import refused
from PIL import Image

from mocov3 import cli
from mocov3.data import open_source
from mocov3.data.sources import index as index_module
from mocov3.data.sources.labels import with_labels
from mocov3.data.sources.left_out import LeftOut
from mocov3.data.sources.opening import scan
from mocov3.data.sources.survey import Survey
from mocov3.data.views import formats
from mocov3.errors import UserError
from mocov3.planning.check import _facts

links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


def link(root, **targets):
    """``a_b=target`` makes root/a/b → target, which is relative to root/a."""
    for name, target in targets.items():
        path = root / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)


def names(source):
    return [source.name(i).replace(os.sep, "/") for i in range(len(source))]


def said(source):
    return "\n".join(source.skipped)


# --- links ------------------------------------------------------------------------------------------------------


@links
@pytest.mark.parametrize(
    ("made", "found", "again"),
    [
        ({"a_to": "../b", "b_to": "../a"}, ["a/1.jpg", "b/2.jpg"], 2),
        ({"a_to": "../b", "b_to": "../c", "c_to": "../a"}, ["a/1.jpg", "b/2.jpg"], 3),
        ({"a_up": "..", "b_x_up": "../.."}, ["a/1.jpg", "b/2.jpg"], 2),
        ({"0": "b", "zz": "a"}, ["a/1.jpg", "b/2.jpg"], 2),  # a real path wins, whatever the names
        ({"y": "../out", "x": "../out"}, ["a/1.jpg", "b/2.jpg", "x/3.jpg", "x/deep/4.jpg"], 1),
        ({"a_0": "../../out", "z": "../out"}, ["a/1.jpg", "b/2.jpg", "z/3.jpg", "z/deep/4.jpg"], 1),  # the nearer link
        ({"y": "../out", "x": "../out/deep"}, ["a/1.jpg", "b/2.jpg", "x/4.jpg", "y/3.jpg"], 1),
        ({"x": "../back"}, ["a/1.jpg", "b/2.jpg", "x/5.jpg"], 1),  # a linked folder that holds a link into the tree
    ],
)
def test_every_folder_is_read_once(made, found, again, tmp_path):
    root = tree(tmp_path / "d", "a/1.jpg", "b/2.jpg", "c/notes")
    tree(tmp_path, "out/3.jpg", "out/deep/4.jpg", "back/5.jpg")
    link(tmp_path, back_in="../d/a")
    link(root, **made)
    source = scan(root)
    assert names(source) == found
    assert f"{again} links to folders are not followed" in said(source)


@links
@pytest.mark.parametrize("seed", range(5))
def test_random_links_reach_every_file_once(seed, tmp_path, monkeypatch):
    """Compared with a walk by real paths; the order in which a file system lists names does not matter."""
    rng = random.Random(seed)
    folders = ["in"]
    for i in range(12):
        folders.append(f"{rng.choice(folders)}/f{i}" if i % 3 else f"out{i}")
    for i, folder in enumerate(folders):
        tree(tmp_path, *(f"{folder}/{i}-{k}.png" for k in range(2)))
    for i in range(15):
        (tmp_path / rng.choice(folders) / f"l{i}").symlink_to(tmp_path / rng.choice(folders))
    reached, todo = set(), [str(tmp_path / "in")]
    while todo:
        folder = os.path.realpath(todo.pop())
        if folder not in reached:
            reached.add(folder)
            todo += [os.path.join(folder, n) for n in os.listdir(folder) if os.path.isdir(os.path.join(folder, n))]
    expected = sorted(os.path.join(f, n) for f in reached for n in os.listdir(f) if n.endswith(".png"))
    first = scan(tmp_path / "in")
    assert sorted(os.path.realpath(first.path(i)).decode() for i in range(len(first))) == expected
    assert names(first) == sorted(names(first))
    listed = os.scandir

    class Shuffled:
        def __init__(self, place):
            self.entries = list(listed(place))
            rng.shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    again = scan(tmp_path / "in")
    assert (names(again), again.classes, again.skipped) == (names(first), first.classes, first.skipped)


@links
def test_links_round_and_round_are_no_part(tmp_path):
    """Telling parts from classes walks too: it ends, and finds what is there."""
    root = tree(tmp_path / "d", "train/c/1.jpg", "val/c/2.jpg").joinpath("x")
    link(root, a_to="../b", b_to="../a", b_all="../../train")
    assert names(open_source(str(tmp_path / "d"))) == ["c/1.jpg"]
    link(tree(tmp_path / "e", "1.jpg", "val/2.jpg", "test/3.jpg"), more="val")  # never trained on, by no name
    assert names(open_source(str(tmp_path / "e"))) == ["1.jpg"]


@links
def test_broken_links_are_said_and_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_SHARE_FROM", 1)
    root = tree(tmp_path / "d", "1.jpg", "ok/2.jpg")
    link(root, self="self", ok_disk="/nowhere/at/all")
    (root / "gone.jpg").symlink_to(tmp_path / "later.jpg")
    os.utime(root, (1, 1))
    os.utime(root / "ok", (1, 1))
    assert "3 links lead nowhere; first: gone.jpg" in said(scan(root))
    tree(tmp_path, "later.jpg")  # no folder of the tree changes
    assert names(scan(root)) == ["1.jpg", "gone.jpg", "ok/2.jpg"]
    assert "2 links lead nowhere; first: ok/disk" in said(scan(root))


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (["x.tgz", "a/y.tar.zst", "a/z.TAR.GZ", "b/c.Zip"], ["1 .tar.gz, 1 .tar.zst, 1 .tgz, 1 .zip: unpack, or"]),
        (["a/t/1.tar", "a/t/2.TAR"], ["left out 2 .tar: name the files, or the folder"]),
        (["data/train.arrow", "data/0.parquet"], ["1 .arrow: write their images", "1 .parquet: name the files"]),
        (["a/0fe3", "a/IMG.0001", "b/1.2.840.1", "a/x.jpeg?w=640"], ["left out 4 without an ending: not taken"]),
        (["a/s.nii", "a/raw.NEF", "v.mp4"], ["1 .nef, 1 .nii: convert", "1 .mp4: save their frames"]),
        (["a/1.txt", "a/2.txt", "README", "b/data.csv.gz"], ["2 .txt, 1 without an ending: not", "1 .gz: unpack"]),
        ([".DS_Store", "a/Thumbs.db", ".git/x.heic", "a/._1.heic", "$RECYCLE.BIN/1.jpg", "@Recycle/2.zip"], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_left_out_of_folders_and_archives(files, lines, packed, tmp_path):
    root = tree(tmp_path / "d", "a/1.jpg", "b/2.jpg", *files)
    if packed:
        with tarfile.open(tmp_path / "d.TAR", "w") as tar:
            tar.add(root, "")
    source = open_source(str(tmp_path / "d.TAR") if packed else str(root))
    assert len(source) == 2
    text = said(source)
    for line in lines:
        assert line in text
    assert ("left out" in text) == bool(lines)
    if not packed:
        assert all(line.startswith(f"{root}: ") for line in source.skipped)


def test_formats_that_need_an_extra(monkeypatch):
    monkeypatch.setattr(formats, "_there", lambda module: False)
    left_out = LeftOut()
    left_out.add([b"2.heif", b"1.HEIC", b"3.heic", b"x.jxl", b"d.dcm", b"s.nii"])
    first, third, second = left_out.lines()
    assert first == "left out 2 .heic, 1 .heif, 1 .jxl: pip install 'mocov3[formats]'; first: 1.HEIC"
    assert second == "left out 1 .dcm: pip install 'mocov3[dicom]'; first: d.dcm"
    assert third.startswith("left out 1 .nii: convert")


def test_many_kinds_are_few_lines(tmp_path):
    tree(tmp_path / "d", "1.jpg", *(f"{i}.x{i}" for i in range(300)), *(f"{i}.dat" for i in range(7)))
    (line,) = open_source(str(tmp_path / "d")).skipped
    assert line.startswith(f"{tmp_path / 'd'}: left out 7 .dat, 1 .x0, ")
    assert "296 of other endings" in line


def test_a_tree_that_is_remembered_says_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "_SHARE_FROM", 1)
    root = tree(tmp_path / "d", "a/1.jpg", "a/2.cr2")
    for folder in (root, root / "a"):
        os.utime(folder, (time.time() - 100,) * 2)
    first = scan(root)
    monkeypatch.setattr("mocov3.data.sources.scan._list_all", None)  # nothing is listed
    assert scan(root).skipped == first.skipped
    assert "1 .cr2" in said(first)


def test_loose_images_beside_class_folders(tmp_path):
    source = open_source(str(tree(tmp_path / "d", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg", "cover.jpg", "z.png")))
    labels = dict(zip(names(source), source.labels.tolist(), strict=True))
    assert labels == {"cat/1.jpg": 0, "dog/2.jpg": 1, "dog/3.jpg": 1, "cover.jpg": -1, "z.png": -1}
    assert "images beside its 2 class folders: 2 of 5 images have no label; left out of what needs classes" in said(
        source
    )
    assert names(with_labels(source)) == ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg"]
    one = open_source(str(tree(tmp_path / "one", "1.jpg", "more/2.jpg")))
    assert (len(one), one.labels, one.classes, one.skipped) == (2, None, [], [])
    assert open_source(str(tree(tmp_path / "flat", "1.jpg", "2.jpg"))).skipped == []
    assert open_source(str(tree(tmp_path / "classes", "cat/1.jpg", "dog/2.jpg"))).skipped == []


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    tree(tmp_path / "d", "a/1.jpg", "b/2.jpg", "b/c/3.jpg")
    listed = os.scandir

    def scandir(place):
        if os.fsdecode(place).endswith(("b", "c")):
            raise PermissionError(13, "Permission denied")
        return listed(place)

    monkeypatch.setattr(os, "scandir", scandir)
    source = scan(tmp_path / "d")
    assert names(source) == ["a/1.jpg"]
    assert "1 folders cannot be read (Permission denied); first: b" in said(source)


@pytest.mark.parametrize(
    ("name", "words"),
    [("x.tar.xz", "re-pack as plain .tar"), ("a/x.nii", "convert"), ("b/c/0.tar", "name the files"), ("x", "a list")],
)
def test_a_folder_without_images_says_what_is_there(name, words, tmp_path):
    tree(tmp_path / "d", name)
    if name.endswith("0.tar"):
        tree(tmp_path / "d" / "b", "y.lmdb")
    with pytest.raises(UserError, match="holds no image") as error:
        open_source(str(tmp_path / "d"))
    assert words in str(error.value)


@pytest.mark.parametrize(("name", "words"), [("x.zip", "unpack"), ("x.h5", "write their images"), ("x.cr3", "convert")])
def test_a_file_that_cannot_be_read_says_what_to_do(name, words, tmp_path):
    tree(tmp_path, name)
    assert words in refused("check", tmp_path / name)


def test_archives_in_capitals_and_what_lies_beside_them(tmp_path):
    for name in ("0.TAR", "1.Tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{name}.jpg"), io.BytesIO())
    assert names(open_source(str(tmp_path))) == ["0.TAR/0.TAR.jpg", "1.Tar/1.Tar.jpg"]
    tree(tmp_path, "2.tgz", "3.parquet", "a.jpg")
    text = said(open_source(str(tmp_path)))
    for line in ("1 images directly in it", "left out 1 .tgz: unpack", "left out 1 .parquet: name the files"):
        assert line in text


def test_rows_that_a_folder_passes_over(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = ["1.jpg", "__MACOSX/._1.jpg", None, "a/.cache/3.jpg", "a/b.jpg", "._5.jpg", "/x/./6.jpg", "a/@eaDir/7.jpg"]
    for k in range(2):
        rows = [{"bytes": f"{k} {i}".encode(), "path": path} for i, path in enumerate(paths)]
        table = pa.table({"image": rows, "label": [k * 8 + i for i in range(8)]})
        pq.write_table(table, tmp_path / f"{k}.parquet", row_group_size=3)
    source = open_source(str(tmp_path))
    kept = [k * 8 + i for k in range(2) for i in (0, 2, 4, 6)]
    assert source.labels.tolist() == kept
    assert [source.read(i) for i in range(8)] == [f"{k // 8} {k % 8}".encode() for k in kept]
    assert "8 rows in hidden folders" in said(source)


@pytest.mark.parametrize(
    "command", [["pretrain", "--recipe", "defaults", "-b", "999", "--output-dir", "o"], ["pack", "--out", "p"]]
)
def test_commands_say_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        tree(tmp_path / "d", name, "a/3.CR2", "b/4.tar.bz2")
        Image.fromarray(rng.integers(0, 255, (40, 44, 3), dtype=np.uint8)).save(tmp_path / "d" / name)
    cli.main([command[0], "d", *command[1:]])
    err = capsys.readouterr().err
    assert "data: d: left out 1 .cr2: convert to .png, .tif or .jpg; first: a/3.CR2" in err
    assert "data: d: left out 1 .tar.bz2: unpack" in err
    assert "  d: left out 1 .tar.bz2: unpack" in "\n".join(_facts(open_source("d"), Survey(4, 4), {}))
