"""Hostile and damaged input: nothing runs code, takes memory unchecked, or ends in a traceback (docs/security.md)."""

import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trials import record, trials

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig, read_yaml
from mocov3.config.command_lines import parse_pretrain
from mocov3.data import CentreView, TwoViews
from mocov3.data.views.decode import DecodeError
from mocov3.errors import UserError
from mocov3.weights import checkpoint

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def fuzzed(suite, soak):
    return settings(max_examples=trials(suite, soak), **QUICK)


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint of a small model as training writes it."""
    torch.manual_seed(0)
    model = models.build("vit_small", image_size=32, dim=8, mlp_dim=16, embed_dim=24, depth=1, num_heads=3)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), 0.9).backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("whole") / "checkpoint_0000.pth.tar"
    contents = checkpoint.pack(
        arch="vit_small",
        model=model,
        optimizer=optimizer,
        scaler={},
        position=checkpoint.Position(1, 0, 5),
        extra={"seed": 1},
    )
    checkpoint.write(path, contents)
    return path


def plain(contents):
    return json.dumps(contents, default=lambda t: [str(t.dtype), t.double().flatten().tolist(), list(t.shape)])


def refused_or_equal(path, expected):
    try:
        contents = checkpoint.read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return True
    assert plain(contents) == expected, "a damaged file was taken for a whole one"
    return False


def test_cut_and_flipped_checkpoints(whole, tmp_path):
    data, expected, rng = whole.read_bytes(), plain(checkpoint.read(whole)), random.Random(0)
    path = tmp_path / "damaged.pth.tar"
    cuts = flips = equal = 0
    for _ in range(trials(200, 2000)):
        path.write_bytes(data[: rng.randrange(len(data))])
        assert refused_or_equal(path, expected)
        cuts += 1
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        equal += not refused_or_equal(path, expected)
        flips += 1
    assert equal < flips / 4  # padding and dates
    # the directory and the pickle are small parts of the file: flip there too
    for _ in range(trials(200, 2000)):
        damaged = bytearray(data)
        where = rng.choice([range(len(data) - 6000, len(data)), range(min(len(data), 40_000))])
        damaged[rng.choice(where)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        equal += not refused_or_equal(path, expected)
        flips += 1
    record("checkpoints cut at a random place", cuts, "all refused in one line")
    record(
        "checkpoints with a flipped bit",
        flips,
        f"{flips - equal} refused in one line, {equal} read equal (the bit lay in padding or a date), none half-loaded",
    )


@pytest.mark.parametrize(("place", "bit"), [(38, 0x10), (24, 0x08), (24, 0x80), (26, 0x01)])
def test_a_directory_that_misleads_torch_is_refused(whole, tmp_path, place, bit):
    # one bit of a member's entry, under no checksum: as a folder, or larger than what is stored, it has torch's reader
    # leave memory as it was found
    data, path = whole.read_bytes(), tmp_path / "damaged.pth.tar"
    at, refused = data.find(b"PK\x01\x02"), 0
    while at >= 0:
        damaged = bytearray(data)
        damaged[at + place] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"refused|damaged"):
            checkpoint.read(path)
        at, refused = data.find(b"PK\x01\x02", at + 4), refused + 1
    assert refused > 50


def test_an_old_file_that_claims_much_takes_no_memory(tmp_path):
    path = tmp_path / "old.pth"
    for claim in (2**62, 2**30):  # found by coverage: MemoryError; and what a machine would hand out
        path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", claim) + b"x.")
        tracemalloc.start()
        try:
            with pytest.raises(UserError):
                checkpoint.read(path)
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


class Code:
    def __reduce__(self):
        return print, ("this code must never run",)


class Forged:
    """A tensor that claims a thousand million numbers over a storage of two."""

    def __reduce__(self):
        storage = torch.ones(2).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, 0, (10**9,), (1,), False, collections.OrderedDict())


def nested(depth):
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


HOSTILE = {
    "code": {"a": Code()},
    "forged size": {"a": Forged()},
    "bytearray": {"a": bytearray(10)},
    "deep key": {nested(10): 1},
    "set": {"a": {1, 2}},
    "module": {"a": torch.nn.Linear(1, 1)},
    "path": {"a": Path("x")},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("archive", [True, False])
def test_hostile_checkpoints(name, archive, tmp_path, capsys):
    path = tmp_path / "hostile.pth"
    torch.save(HOSTILE[name], path, _use_new_zipfile_serialization=archive)
    with pytest.raises(UserError, match=r"refused|forged") as error:
        checkpoint.read(path)
    assert "\n" not in str(error.value)
    assert "must never run" not in capsys.readouterr().out


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """The archive again, each member through ``change(name, data)`` → data or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            data = change(info.filename, old.read(info))
            if data is not None:
                new.writestr(info.filename, data)


def test_archives_that_torch_does_not_write(whole, tmp_path):
    path = tmp_path / "archive.pth"
    cases = {
        "compressed": lambda: rewritten(whole, path, lambda n, d: d, zipfile.ZIP_DEFLATED),
        "no pickle": lambda: rewritten(whole, path, lambda n, d: None if n.endswith(".pkl") else d),
        "short storage": lambda: rewritten(whole, path, lambda n, d: d[:8] if "/data/" in n else d),
        "no storage": lambda: rewritten(whole, path, lambda n, d: None if "/data/" in n else d),
        "huge string": lambda: rewritten(
            whole, path, lambda n, d: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x." if n.endswith(".pkl") else d
        ),
        "not a dict": lambda: rewritten(whole, path, lambda n, d: pickle.dumps([1]) if n.endswith(".pkl") else d),
    }
    for name, make in cases.items():
        make()
        with pytest.raises(UserError) as error:
            checkpoint.read(path)
        if name == "compressed":  # a bomb would be: little on the disk, much in memory
            assert "torch does not write" in str(error.value)
    # a memo entry with a number of four thousand million is one, but Python's unpickler makes an array of so many
    rewritten(whole, path, lambda n, d: b"\x80\x02}r\xff\xff\xff\xff." if n.endswith(".pkl") else d)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


@fuzzed(60, 4000)
@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_break_the_reader(tmp_path_factory, data, archive):
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    if archive:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            file.writestr("a/data.pkl", b"\x80\x02" + data)
            file.writestr("a/version", "3")
    else:
        path.write_bytes(data)
    try:
        checkpoint.read(path)
    except UserError as error:
        assert "\n" not in str(error)


# --- configuration -----------------------------------------------------------------------------------------

FLAGS = sorted(
    name
    for f in PretrainConfig.__dataclass_fields__.values()
    if not f.metadata["positional"]
    for name in (f.metadata["names"] or (f"--{f.name.replace('_', '-')}",))
)
VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e999", "nan", "inf", "-0", "1e-320", "9" * 400, "auto", "x\ny", "<b>", "\x1b[2J"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
)


@fuzzed(200, 3000)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), max_size=5))
def test_no_flags_break_the_configuration(pairs):
    argv = [part for pair in pairs for part in pair]
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stderr(said):
            parse_pretrain(argv, prog="mocov3 pretrain").check()
    except SystemExit as stop:
        assert stop.code in (0, 2)
    except UserError as error:
        said.write(str(error) + "\n")
    lines = said.getvalue().splitlines()
    assert len([line for line in lines if "error" in line or line]) <= 1, lines
    assert all(c.isprintable() for line in lines for c in line)


@fuzzed(100, 2000)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.sampled_from([*PretrainConfig.__dataclass_fields__, "x"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                lambda inner: st.lists(inner, max_size=3),
            ),
            max_size=4,
        ).map(lambda d: json.dumps(d).encode()),
    )
)
def test_no_file_breaks_the_configuration(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    try:
        values = read_yaml(path, PretrainConfig)
        assert set(values) <= set(PretrainConfig.__dataclass_fields__)
        PretrainConfig(**values).check()
    except UserError as error:
        assert "\n" not in str(error)


def test_yaml_that_stands_for_more_than_memory_holds(tmp_path):
    path = tmp_path / "bomb.yaml"
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path.write_text("\n".join([*layers, "arch: *a11"]))
    with pytest.raises(UserError, match="a0"):
        read_yaml(path, PretrainConfig)
    path.write_text(path.read_text().replace("a0: &a0", "arch: &a0").replace("\na", "\nlr: &b [1]\n#"))
    with pytest.raises(UserError):
        read_yaml(path, PretrainConfig)
    path.write_text("lr: " + "1" * (2 << 20))
    with pytest.raises(UserError, match="larger than"):
        read_yaml(path, PretrainConfig)


# --- images ----------------------------------------------------------------------------------------------


def encoded():
    rng = np.random.Generator(np.random.PCG64(0))
    image = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).resize((60, 48))
    exif = Image.Exif()
    exif[274], exif[270] = 6, "words"
    made = []
    for kind, options in (
        ("JPEG", {"exif": exif, "icc_profile": b"\0" * 200}),
        ("JPEG", {"progressive": True}),
        ("PNG", {"exif": exif}),
        ("WEBP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        made.append(file.getvalue())
    return made


ENCODED = encoded()


@fuzzed(140, 3000)
@given(st.data())
def test_no_image_breaks_the_views(data):
    image = bytearray(data.draw(st.sampled_from(ENCODED)))
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, min(len(image), 400) - 1) | st.integers(0, len(image) - 1))
        image[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del image[data.draw(st.integers(1, len(image) - 1)) :]
    for view in (TwoViews(16), CentreView(16)):
        try:
            made = view(bytes(image), seed=0, epoch=0, index=0)
        except DecodeError as error:
            assert str(error)
        else:
            assert all(v.shape == (16, 16, 3) and v.dtype == np.uint8 for v in made)


def png(width, height, body=b""):
    """A PNG that claims a size, with so much of its pixels as ``body`` says."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_claims_of_size_are_checked_before_memory_is_taken():
    for data in (png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(2**31 - 1, 1)):
        with pytest.raises(DecodeError):
            TwoViews(16)(data, seed=0, epoch=0, index=0)
    thin = TwoViews(16)(png(65535, 1, b"\0" * (1 + 3 * 65535)), seed=0, epoch=0, index=0)
    assert thin[0].shape == (16, 16, 3)


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_cannot_forge_lines(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.Generator(np.random.PCG64(0))
    names = [
        b"<script>alert(1)</script>".replace(b"/", b"_"),
        b"a\nmocov3: error: forged",
        b"\x1b[2J\x07bell",
        b"\xff\xfe not utf-8",
        "ünïcode \u202e rtl".encode(),
        b"'\"; rm -rf ~",
        b"$(id)",
        b" ",
        b"%s%n",
    ]
    for i, name in enumerate(names):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, "PNG")
        target = os.path.join(os.fsencode(data), name + b".png")
        with open(target, "wb") as out:
            out.write(file.getvalue() if i != 1 and i != 2 and i != 3 else b"no image")
    argv = ["pretrain", str(data), *TINY, "-b", "8", "--epochs", "6", "--output-dir", str(tmp_path / "run")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert not [line for line in (out + err).splitlines() if line.startswith("mocov3: error")]
    listed = [json.loads(line) for line in (tmp_path / "run" / "corrupt.jsonl").read_text().splitlines()]
    assert len(listed) == 3
    assert all(entry["name"].isprintable() for entry in listed)


def test_the_number_of_fuzzed_inputs():
    counts = [
        function._hypothesis_internal_use_settings.max_examples
        for function in (
            test_no_bytes_break_the_reader,
            test_no_flags_break_the_configuration,
            test_no_file_breaks_the_configuration,
            test_no_image_breaks_the_views,
        )
    ]
    assert sum(counts) >= 500
    record(
        "fuzzed inputs: bytes of checkpoints, flags, configuration files, bytes of images",
        sum(counts),
        "no traceback, no hang",
    )
