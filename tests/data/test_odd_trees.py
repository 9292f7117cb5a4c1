"""Data as people have it: special files, names in other forms, archives that are joined or damaged, other kinds."""

import bz2
import gzip
import io
import lzma
import os
import socket
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from doors import refused
from PIL import Image

from mocov3.data import open_source
from mocov3.data.sources.classes import renumbered
from mocov3.data.sources.labels import matched
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.errors import UserError

NFC, NFD = "caf\u00e9", "cafe\u0301"


def png(seed=0):
    pixels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))
    return root


def packed(*names):
    """The bytes of an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("kind", ["pipe.jpg", "pipe", "socket.png", "link.jpg", "device.tar"])
def test_special_files_are_left_out_and_said(tmp_path, monkeypatch, kind):
    tree(tmp_path / "d", "a/1.png", "b/2.png")
    monkeypatch.chdir(tmp_path / "d" / "b")  # names of sockets are short
    if kind == "link.jpg":
        os.mkfifo(tmp_path / "outside")
        os.symlink(tmp_path / "outside", kind)
    elif kind == "device.tar":
        os.symlink("/dev/null", kind)
    elif kind == "socket.png":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(kind)
    else:
        os.mkfifo(kind)
    source = open_source(str(tmp_path / "d"))
    assert len(source) == 2
    assert [line.split(": ", 1)[1] for line in source.skipped] == [
        f"1 pipes, sockets or devices are left out; first: b/{kind}"
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize(
    "argv",
    [
        "check P.tar",
        "check P.csv",
        "check P",
        "inspect P",
        "knn D --model P.pth",
        "pretrain D --init P.pth",
        "export P.pth --to timm --output o",
    ],
)
def test_a_pipe_is_not_waited_for(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "D", "1.png", "2.png")
    for name in ("P", "P.tar", "P.csv", "P.pth"):
        os.mkfifo(name)
    assert "is a pipe, socket or device, not a plain file" in refused(*argv.split())


@pytest.mark.parametrize("name", ["checkpoint_0000.pth.tar", "a/model_best.PTH.TAR", "last.pt.tar"])
def test_checkpoints_in_a_data_folder_are_no_archives(tmp_path, name):
    tree(tmp_path, "a/1.png", "b/2.png", name)
    source = open_source(str(tmp_path))
    assert source.classes == ["a", "b"]
    assert len(source) == 2
    assert source.skipped[-1].endswith(f": weights; first: {name}")


@pytest.mark.parametrize(
    ("sheet", "data"), [("d/x.png", "d"), ("d/a/../b/x.png", "d"), ("x.png", "."), ("d/x.png", "d:0.5")]
)
def test_no_sheet_among_the_images(tmp_path, monkeypatch, sheet, data):
    monkeypatch.chdir(tree(tmp_path, "d/a/1.png", "d/b/2.png"))
    assert "would be taken for an image" in refused("check", data, "--sheet", sheet)


def test_only_plain_files_are_replaced(tmp_path):
    device = tmp_path / "null"
    os.symlink("/dev/null", device)
    (tmp_path / "w.pth").write_bytes(b"")
    assert "is no plain file" in refused("convert", "--input", tmp_path / "w.pth", "--output", device)
    assert device.is_symlink()


# --- names in other forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "listed"), [(NFC, NFD), (NFD, NFC), (f"{NFD}/x", f"{NFC}/x")])
def test_lists_in_another_form_of_unicode(tmp_path, there, listed):
    tree(tmp_path, "plain.png", f"{there}.png", "also.png")
    if (tmp_path / f"{listed}.png").exists():
        pytest.skip("the file system knows both forms")
    (tmp_path / "l.csv").write_text(f"path,label\nplain.png,0\n{listed}.png,1\nalso.png,1\n", encoding="utf-8")
    source = open_source(str(tmp_path / "l.csv"))
    assert [source.read(i) for i in range(3)] == [png(0), png(1), png(2)]


def test_classes_in_another_form_of_unicode(tmp_path):
    train = open_source(str(tree(tmp_path / "t", f"{NFC}/1.png", "dog/2.png", "\u00fc/3.png")))
    val = open_source(str(tree(tmp_path / "v", "dog/1.png", f"{NFD}/2.png")))
    fitted = matched(train.classes, val, "d")
    assert [train.classes[i] for i in fitted.labels] == [NFC, "dog"]
    assert any(line.endswith("no validation image, first '\u00fc'") for line in fitted.skipped)
    numbers = renumbered(np.array([0, 1]), [NFC, NFD], [NFD, NFC], 2)  # both are there: each is itself
    assert numbers.tolist() == [1, 0]


# --- archives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0, 512, 100_000])
def test_joined_archives_are_read_whole(tmp_path, between):
    first, second = packed("a/1.png", "a/2.png"), packed("b/3.png")
    (tmp_path / "x.tar").write_bytes(first + bytes(between // 512 * 512) + second)
    source = open_source(str(tmp_path / "x.tar"))
    assert [source.read(i) for i in range(3)] == [png(0), png(1), png(0)]
    assert len(source) == 3
    assert source.skipped == []


def test_what_archives_lose_is_said(tmp_path):
    whole = packed("1.png", "2.png", "3.png")
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        starts = [info.offset for info in tar]
    damaged = bytearray(whole)
    damaged[starts[2] + 150] ^= 0xFF  # in the checksum of the third header
    for name, data, said in (
        ("cut", whole[: starts[2]], "end without an end mark"),
        ("damaged", bytes(damaged), "a header is damaged; 2 images before that are used"),
        ("junk", whole + b"junk" * 200, "a header is damaged; 3 images before that are used"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        source = open_source(str(tmp_path / f"{name}.tar"))
        assert len(source) == (3 if name == "junk" else 2)
        assert len(source.skipped) == 1
        assert said in source.skipped[0]
    (tmp_path / "whole.tar").write_bytes(whole)
    assert open_source(str(tmp_path / "whole.tar")).skipped == []


def zipped(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a", data)
    return buffer.getvalue()


KINDS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "ZIP": zipped,
    "web page": lambda data: b"\n<!DOCTYPE HTML><html>404</html>" * 40,
    "Git LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "PDF": lambda data: b"%PDF-1.7" * 100,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is_instead(tmp_path, kind):
    data = KINDS[kind](packed("1.png"))
    with pytest.raises(DecodeError, match=kind):
        ImageBytes(data)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match=kind):
        open_source(str(tmp_path / "x.tar"))


def test_a_tiff_of_another_kind(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((5, 5)))
    with pytest.raises(DecodeError, match="TIFF of a kind that is not read"):
        ImageBytes((tmp_path / "x.tif").read_bytes())
