"""Archives and tables: the folder's images again, hostile and broken archives, packing, and resume after kills."""

import io
import os
import pickle
import random
import sys
import tarfile

import numpy as np
import pytest
from conftest import TINY
from killing import Process, assert_same_run, kill_until_done

from mocov3 import cli
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.loading.loader import batches
from mocov3.data.sources import archives as shards_module
from mocov3.data.sources.archives import expand, open_shards, read_members
from mocov3.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packed(images, tmp_path, capsys):
    assert cli.main(["pack", str(images), "--out", str(tmp_path / "packed")]) == 0
    capsys.readouterr()
    return tmp_path / "packed"


def archive(path, members):
    """A tar of (name or TarInfo, bytes)."""
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def loaded(source, workers):
    works = list(batches(len(source), seed=3, batch_size=16, rank=0, ranks=1, start=(0, 0), epochs=1))
    with Loader(source, TwoViews(32), batch_size=16, seed=3, workers=workers) as loader:
        return [b.pixels.copy() for b in loader.run(works)]


def test_a_packed_folder_is_the_folder(images, packed):
    for split in ("train", "val"):
        folder, shards = open_source(str(images), split), open_source(str(packed), split)
        assert [shards.read(i) for i in range(len(shards))] == [folder.read(i) for i in range(len(folder))]
        assert np.array_equal(shards.labels, folder.labels)
        assert shards.classes == folder.classes
        assert shards.skipped == []
    train = open_source(str(packed))
    assert train.name(0) == "shard-000000.tar/class0/00.jpg"
    for one, other in zip(loaded(open_source(str(images)), 0), loaded(train, 2), strict=True):
        assert np.array_equal(one, other)


def test_packing_is_reproducible_and_splits(images, tmp_path, capsys):
    for name in ("a", "b"):
        threads = "1" if name == "a" else "3"
        flags = ["--out", str(tmp_path / name), "--resize", "32", "--quality", "80", "-j", threads]
        assert cli.main(["pack", str(images), *flags]) == 0
    a, b = ((tmp_path / n / "train" / "shard-000000.tar").read_bytes() for n in "ab")
    assert a == b
    from mocov3.data.views.decode import ImageBytes

    source = open_source(str(tmp_path / "a"))
    sizes = {min(ImageBytes(source.read(i)).width, ImageBytes(source.read(i)).height) for i in range(len(source))}
    assert sizes == {32}
    assert "64 images in 1 archive" in capsys.readouterr().out


def test_packing_splits_by_size_and_leaves_out_the_unreadable(tmp_path, capsys):
    rng = np.random.Generator(np.random.PCG64(0))
    folder = tmp_path / "in"
    folder.mkdir()
    from PIL import Image

    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (350, 350, 3), dtype=np.uint8)).save(folder / f"x.{i}.png")
    (folder / "x_0.jpg").write_bytes((folder / "x.0.png").read_bytes())  # the same key once dots are gone
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xffno")
    assert cli.main(["pack", str(folder), "--out", str(tmp_path / "out"), "--shard-mb", "1"]) == 0
    said = capsys.readouterr()
    assert "bad.jpg" in said.err
    assert "6 images in 3 archive(s)" in said.out
    source = open_source(str(tmp_path / "out"))
    assert len({source.name(i).split("/")[1] for i in range(6)}) == 6
    assert source.labels is None
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{in}", "--out", "{in}/x"], "outside"),
        (["{in}", "--out", "{in}"], "not empty"),
        (["{in}", "--out", "{out}", "--quality", "0"], "--quality"),
        (["{in}", "--out", "{out}", "--resize", "-1"], "--resize"),
        (["{in}/nothing", "--out", "{out}"], "no such"),
    ],
)
def test_packing_refuses(flags, words, images, tmp_path, capsys):
    places = {"in": str(images / "val"), "out": str(tmp_path / "out")}
    assert cli.main(["pack", *(f.format(**places) for f in flags)]) == 2
    assert words in capsys.readouterr().err


def test_patterns(tmp_path):
    for i in range(12):
        archive(tmp_path / f"s-{i:03d}.tar", [(f"{i}.jpg", b"x")])
    assert len(expand(f"{tmp_path}/s-{{000..011}}.tar")) == 12
    assert [os.path.basename(f) for f in expand(f"{tmp_path}/s-0{{02,10}}.tar")] == ["s-002.tar", "s-010.tar"]
    assert len(expand(f"{tmp_path}/s-00*.tar")) == 10
    assert len(expand(f"{tmp_path}/s-0{{0,1}}*.tar")) == 12
    assert len(open_source(f"{tmp_path}/s-{{000..003}}.tar")) == 4
    for wrong in ("s-{000..012}.tar", "t*.tar", "s-{5..1}.tar", "s-{0..99999999999}.tar", "s.tar"):
        with pytest.raises(UserError):
            expand(f"{tmp_path}/{wrong}")
    (tmp_path / "a{1..2}.tar").write_bytes(b"")  # such a name, where it exists, is a name
    assert expand(f"{tmp_path}/a{{1..2}}.tar") == [f"{tmp_path}/a{{1..2}}.tar"]


def test_what_cannot_be_used_is_listed(images, tmp_path):
    good = (images / "train" / "class0" / "00.jpg").read_bytes()
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    path = archive(
        tmp_path / "x.tar",
        [
            ("a.jpg", good),
            ("a.cls", b"3"),
            ("../../b.jpg", good),
            ("/c.jpg", good),
            (link, b""),
            (device, b""),
            ("d.txt", b"words"),
            ("d.json", b"{}"),
            ("e.cls", b"dog"),
            ("f.JPG", good),
            ("g.jpg\n\x1b[2J.jpg", good),
            ("no ending", b""),
        ],
    )
    found, problems = read_members(str(path))
    assert [m.name for m in found] == [b"a.jpg", b"f.JPG", b"g.jpg\n\x1b[2J.jpg"]
    assert [m.label for m in found] == [3, -1, -1]
    text = "\n".join(problems)
    assert len(problems) == 4
    assert problems[-1].startswith("left out 1 without an ending, 1 .json, 1 .txt")
    for words in ("2 files are left out, as their names", "../../b.jpg", "2 links, devices", "link.jpg", "e.cls"):
        assert words in text
    assert "\x1b" not in text
    source = open_source(str(path))
    assert source.labels.tolist() == [3, -1, -1]
    assert source.read(0) == source.read(2) == good


@pytest.mark.parametrize("cut", [100, 600, 1500, -600, -1300])
def test_cut_archives(cut, tmp_path):
    rng = np.random.Generator(np.random.PCG64(0))
    whole = [(f"{i}.jpg", rng.bytes(3000)) for i in range(4)]
    data = archive(tmp_path / "x.tar", whole).read_bytes()
    data = data[: 4 * 3584]  # without the zeros at the end
    (tmp_path / "x.tar").write_bytes(data[:cut])
    found, problems = read_members(str(tmp_path / "x.tar"))
    assert len(found) == (0 if cut > 0 else 3)
    assert problems
    if not found:
        with pytest.raises(UserError, match="no image"):
            open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_end(seed, tmp_path):
    """Headers with bytes changed at random, sizes and checksums made to fit: an end, no crash, nothing outside."""
    rng = np.random.Generator(np.random.PCG64(seed))
    base = archive(tmp_path / "x.tar", [(f"{i}.jpg", bytes(700)) for i in range(3)]).read_bytes()
    for _ in range(60):
        data = bytearray(base)
        header = 1536 * int(rng.integers(0, 3))
        for _ in range(int(rng.integers(1, 6))):
            data[header + int(rng.integers(100, 512))] = int(rng.choice([0, 32, 45, 48, 55, 128, 255, 120, 76, 83]))
        data[header + 148 : header + 156] = b" " * 8
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        (tmp_path / "y.tar").write_bytes(data)
        found, _ = read_members(str(tmp_path / "y.tar"))
        assert all(m.offset >= 0 and m.offset + m.size <= len(data) for m in found)


def test_a_header_that_leads_backwards(tmp_path):
    """CVE-2025-8194: a negative size sent Python's reader round for ever."""
    good = archive(tmp_path / "x.tar", [("a.jpg", bytes(700)), ("b.jpg", bytes(700))]).read_bytes()
    data = bytearray(good)
    data[1536 + 124 : 1536 + 136] = b"\xff" * 10 + (0x10000 - 2560).to_bytes(2, "big")  # −2,560 in base 256
    data[1536 + 148 : 1536 + 156] = b" " * 8
    data[1536 + 148 : 1536 + 156] = b"%06o\0 " % sum(data[1536:2048])
    (tmp_path / "x.tar").write_bytes(data)
    found, problems = read_members(str(tmp_path / "x.tar"))
    assert [m.name for m in found] == [b"a.jpg"]
    assert problems


def test_the_index_is_kept_and_shared(packed, monkeypatch):
    first = open_source(str(packed))
    monkeypatch.setattr(shards_module, "read_members", None)  # would fail
    monkeypatch.setattr(shards_module, "_SHARE_FROM", 0)
    again = open_source(str(packed))
    sent = pickle.dumps(again)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert [there.name(i) for i in range(64)] == [first.name(i) for i in range(64)]
    assert there.read(63) == first.read(63)
    assert there.digest == first.digest
    monkeypatch.undo()
    shard = packed / "train" / "shard-000000.tar"
    os.utime(shard, (1, 1))  # another archive, as far as one can see: read anew
    assert open_source(str(packed)).digest == first.digest
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(OSError, match="shorter"):
        there.read(63)
    rest = open_source(str(packed))
    assert 0 < len(rest) < 64
    assert rest.skipped


def test_compressed_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO(b""))
    with pytest.raises(UserError, match="compressed"):
        open_source(str(tmp_path / "x.tar.gz"))
    with pytest.raises(UserError, match="val"):
        open_source(str(tmp_path / "x.tar"), "val")


def test_the_program_lists_what_it_skips(images, tmp_path, capsys):
    good = (images / "train" / "class0" / "00.jpg").read_bytes()
    archive(tmp_path / "x.tar", [(f"{i}.jpg", good) for i in range(3)] + [(f"../{i}.jpg", good) for i in range(15)])
    flags = ["--recipe", "defaults", "-b", "4096", "--output-dir", str(tmp_path / "o")]
    assert cli.main(["pretrain", str(tmp_path / "x.tar"), *flags]) == 2
    said = capsys.readouterr().err
    assert "15 files are left out, as their names lead out of the archive; first: x.tar: ../0.jpg" in said
    assert "3 images" in said


def test_parquet(images, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = open_source(str(images))
    data = [folder.read(i) for i in range(64)]
    plain = pa.table({"text": ["x"] * 40, "image": data[:40], "label": folder.labels[:40]})
    hugging = pa.table({"image": [{"bytes": b, "path": "p"} for b in data[40:]], "label": folder.labels[40:]})
    (tmp_path / "one").mkdir()
    pq.write_table(plain, tmp_path / "one" / "a.parquet", row_group_size=7)
    pq.write_table(hugging, tmp_path / "b.parquet", row_group_size=50)
    one, other = open_source(str(tmp_path / "one")), open_source(str(tmp_path / "b.parquet"))
    for i in np.random.Generator(np.random.PCG64(0)).permutation(40).tolist():
        assert one.read(i) == data[i]
    assert [pickle.loads(pickle.dumps(other)).read(i) for i in range(24)] == data[40:]
    assert np.array_equal(np.concatenate([one.labels, other.labels]), folder.labels)
    assert one.name(9) == "a.parquet:9"
    assert cli.main(["pack", str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 0
    assert open_source(str(tmp_path / "out")).read(11) == data[11]
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    for wrong, words in (("c", "column"), ("d", "Parquet"), ("e", "no such file")):
        with pytest.raises(UserError, match=words):
            open_source(str(tmp_path / f"{wrong}.parquet"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX process groups")
def test_killed_and_resumed_on_archives(packed, tmp_path):
    """With 0, 1, 2 loader processes and random kills, the run is the one never killed."""

    def command(workers):
        return lambda folder: [
            sys.executable,
            "-m",
            "mocov3",
            "pretrain",
            str(packed),
            *TINY,
            "--epochs",
            "6",
            "-j",
            str(workers),
            "--checkpoint-every",
            "6",
            "--checkpoint-steps",
            "2",
            "--output-dir",
            str(folder),
            "--resume",
            "auto",
            "--quiet",
        ]

    Process(command(0)(tmp_path / "whole")).finish()
    kill_until_done([command(n) for n in (0, 1, 2)], tmp_path / "killed", kills=2, rng=random.Random(5))
    assert_same_run(tmp_path / "whole", tmp_path / "killed", last="checkpoint_0005.pth.tar")


def test_open_shards_needs_images(tmp_path):
    with pytest.raises(UserError, match="no image"):
        open_shards([str(archive(tmp_path / "x.tar", [("a.txt", b"")]))])
