"""Damage in archives, tables, lists and images that fuzzing found, and claims that take memory or time."""

import contextlib
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from damaged_data import pixels
from PIL import EpsImagePlugin, Image

from mocov3.config.presets import Reading
from mocov3.data import CentreView
from mocov3.data.sources import lists, tables
from mocov3.data.sources.archives import open_shards
from mocov3.data.sources.lists import read_list
from mocov3.data.sources.opening import open_source
from mocov3.data.views import decode
from mocov3.data.views.decode import DecodeError
from mocov3.errors import UserError, one_line


def encoded(kind="PNG", **options):
    file = io.BytesIO()
    pixels().save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- archives -----------------------------------------------------------------------------------------------------


def sparse_header(extended):
    """The header of a sparse member as GNU tar wrote them first, which says that more of its map follows."""
    head = bytearray(tarfile.TarInfo("sparse.jpg").tobuf(tarfile.GNU_FORMAT))
    head[156:157], head[482:483] = b"S", bytes([extended])
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))
    return bytes(head)


@pytest.mark.parametrize("cut", [b"", b"\0" * 100, b"\0" * 504])
def test_a_sparse_map_that_is_cut_off_ends_an_archive(cut, tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(encoded())
        archive.addfile(info, io.BytesIO(encoded()))
    path = tmp_path / "a.tar"
    size = 512 + -(-len(encoded()) // 512) * 512
    path.write_bytes(file.getvalue()[:size] + sparse_header(1) + cut)
    shards = open_shards([str(path)])
    assert len(shards) == 1
    assert shards.read(0) == encoded()
    assert "1 images before that are used" in shards.skipped[0]


@pytest.mark.parametrize("name", ["a\nb", "c/\x1b[2J", "\x07/n\r"])
def test_names_of_other_members_are_printable(name, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for member, data in ((name, b""), ("a.png", encoded())):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (line,) = open_source(str(tmp_path / "a.tar")).skipped
    assert line.isprintable()
    assert line.endswith(f"a.tar: {name!r}".replace("'", ""))


# --- tables -------------------------------------------------------------------------------------------------------


def table(path, **columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


@pytest.mark.parametrize("error", ["ArrowNotImplementedError", "ArrowKeyError", "ArrowMemoryError", "ArrowTypeError"])
def test_whatever_pyarrow_raises_is_one_line(error, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table(path, image=[encoded()] * 3)
    source = tables.Parquet([str(path)])

    def fails(*_, **__):
        raise getattr(pa, error, getattr(pa.lib, error))("of two\nlines")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(OSError, match="cannot be read as Parquet"):
        source.read(0)
    monkeypatch.setattr(pq, "ParquetFile", fails)
    for attempt in (lambda: tables.Parquet([str(path)]), lambda: tables.used_rows(source)):
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            attempt()


def zigzag(value):
    """A number as footers hold it."""
    value, out = value * 2, b""
    while value >= 128:
        value, out = value >> 7, out + bytes([value & 127 | 128])
    return out + bytes([value])


@pytest.mark.parametrize("claim", [3, 2**25, 2**40])
def test_rows_that_are_only_claimed(claim, tmp_path):
    path = tmp_path / "a.parquet"
    data = table(path, image=[encoded()] * 2)
    length = int.from_bytes(data[-8:-4], "little")
    # the fields that hold 2 rows: of the file, and of its group
    footer = data[-8 - length : -8].replace(b"\x16\x04", b"\x16" + zigzag(claim))
    path.write_bytes(data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    if claim > 1000:
        with pytest.raises(UserError, match="more than it can hold"):
            tables.Parquet([str(path)])
        return
    source = tables.Parquet([str(path)])
    for index in range(len(source)):
        try:
            assert source.read(index) == encoded()
        except OSError:
            assert index == 2


@pytest.mark.parametrize("labels", [["001", "002", "001"], ["٣", "4", "٣"], ["7" * 5000, "8", "9"], ["+1", "2", "2"]])
def test_labels_that_are_numbers_in_another_spelling_are_names(labels, tmp_path):
    table(tmp_path / "a.parquet", image=[encoded()] * 3, label=labels)
    source = tables.Parquet([str(tmp_path / "a.parquet")])
    assert [source.classes[i] for i in source.labels] == labels


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["x" * 30_000, "\x85é" * 10_000, "'" * 20_000 + " 1"])
def test_long_lines_make_short_messages(line, tmp_path):
    (tmp_path / "a.txt").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_list(tmp_path / "a.txt")
    assert len(str(error.value)) < 2100
    assert str(error.value).endswith("or absolute")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("txt", ",")])
def test_of_a_line_of_many_cells_few_are_looked_for(ending, delimiter, tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / f"a.{ending}").write_text(f"b.jpg{delimiter}1\n" * 9 + "c" + f"{delimiter}c" * 50_000 + "\n")
    looked = []
    monkeypatch.setattr(lists.os.path, "isfile", lambda path: bool(looked.append(path)))
    with pytest.raises(UserError):
        read_list(tmp_path / f"a.{ending}")
    assert 1000 < len(looked) < 100_000


def test_one_line_keeps_both_ends():
    text = one_line("where:\n " + "\x1b" * 5000 + " cure")
    assert text.startswith("where: \\x1b")
    assert text.endswith("\\x1b cure")
    assert len(text) < 2100
    assert one_line("a\n b") == "a b"


# --- images -------------------------------------------------------------------------------------------------------


def test_reasons_are_one_line():
    pytest.importorskip("pillow_heif")
    from mocov3.data.views import formats

    formats._register()
    file = io.BytesIO()
    pixels(64).save(file, "HEIF")
    reasons = []
    for cut in (300, 400, 500):
        with pytest.raises(DecodeError) as error:
            decode.ImageBytes(file.getvalue()[:cut])
        reasons.append(str(error.value))
    assert all(reason and reason.isprintable() for reason in reasons)
    assert str(DecodeError("two\nlines")) == "two lines"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_postscript_is_not_run(name, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: ran.append(1) or Image.new("RGB", (9, 9)))
    pixels().save(tmp_path / name, "EPS")
    data = (tmp_path / name).read_bytes()
    with pytest.raises(DecodeError, match="PostScript"):
        CentreView(16)(data, seed=0, epoch=0, index=0)
    with pytest.raises(DecodeError, match="PostScript"):
        CentreView(16, reading=Reading(1, None))(data, seed=0, epoch=0, index=0)
    assert not ran


@pytest.mark.parametrize("samples", [14, 30, 60])
def test_a_tiff_of_many_samples_takes_no_memory(samples, monkeypatch):
    import tifffile

    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((64, 64, 4), np.uint16), photometric="rgb", planarconfig="contig", extrasamples=[0])
    data = bytearray(file.getvalue())
    place = data.index(struct.pack("<HHI", 277, 3, 1)) + 8
    data[place : place + 2] = struct.pack("<H", samples)
    with pytest.raises(DecodeError, match="bytes of samples"):
        CentreView(16, reading=Reading(4, None))(bytes(data), seed=0, epoch=0, index=0)


def test_a_png_that_begins_with_another_chunk_prints_nothing(capfd):
    data = encoded()
    for kind in (b"IDAT", b"PLTE", b"iCCP"):
        body = kind + bytes(8) + b"\x08\x02\0\0\0"  # where a header says 8 bits and RGB
        forged = data[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + data[8:]
        with contextlib.suppress(DecodeError):
            decode.ImageBytes(forged)
    assert capfd.readouterr().err == ""
    assert decode.ImageBytes(data).pixels()[0].shape == (24, 48, 3)
