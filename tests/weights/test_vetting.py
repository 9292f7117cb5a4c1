"""Forged files of weights: what two readers would read differently, what grows without end, what claims too much."""

import collections
import functools
import io
import pickle
import struct
import tarfile
import time
import zipfile

import pytest
import torch

from mocov3.errors import UserError
from mocov3.models import build_backbone
from mocov3.weights import checkpoint, convert, tensorfiles
from mocov3.weights.find import find_backbone
from mocov3.weights.locate import places
from mocov3.weights.vetting import vet

WEIGHTS = torch.arange(4.0)


@functools.cache
def resnet():
    return {k: v for k, v in build_backbone("resnet10_w16").state_dict().items() if not k.startswith("fc.")}


class Trainer:
    """An object of a training program: a file with it is read by another unpickler."""


def saved(contents, **options):
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def archive(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
        for name, data in entries:
            target.writestr(name, data)
    return file.getvalue()


def with_pickle(pickled, **more):
    """An archive with this pickle and storages key → bytes."""
    return archive([("a/data.pkl", pickled), ("a/version", b"3"), *((f"a/data/{k}", v) for k, v in more.items())])


def refused(path, data, match):
    path.write_bytes(data)
    with pytest.raises(UserError, match=match) as error:
        tensorfiles.read(path)
    assert "\n" not in str(error.value)


# --- what the two readers of archives would read differently ------------------------------------------------------


def test_names_that_differ_in_case_are_one_to_torch(tmp_path):
    whole = members(saved({"a": WEIGHTS, "trainer": Trainer()}))
    name = next(n for n in whole if n.endswith("/data.pkl"))
    other = pickle.dumps({"a": "not what was vetted"}, 2)
    for upper in (name.replace("data.pkl", "DATA.PKL"), name.replace("data.pkl", "Data.pkl")):
        refused(tmp_path / "a.pth", archive([(upper, other), *whole.items()]), "torch does not write")
    storage = next(n for n in whole if n.endswith("/data/0"))
    forged = [*whole.items(), (storage.replace("/data/0", "/Data/0"), b"12")]
    refused(tmp_path / "a.pth", archive(forged), "torch does not write")


@pytest.mark.parametrize("name", ["a/data/0/", "a/data/ü", "a/data/1\0x"])
def test_names_that_readers_spell_differently_are_refused(name, tmp_path):
    data = saved({"a": WEIGHTS})
    path = tmp_path / "a.pth"
    if "\0" in name:  # the writer cuts it there, as the reader does
        data = archive([*members(data).items(), (name.replace("\0", "_"), b"1234")])
        data = data.replace(name.replace("\0", "_").encode(), name.encode())
    else:
        data = archive([*members(data).items(), (name, b"1234" * (not name.endswith("/")))])
    refused(path, data, "torch does not write")


def test_a_directory_that_readers_could_find_elsewhere_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    whole, other = (archive(members(saved({"a": value})).items()) for value in (WEIGHTS, WEIGHTS + 1))
    path.write_bytes(whole)
    assert tensorfiles.read(path)["a"].equal(WEIGHTS)  # of Python's writer, without the second record
    assert len(whole) == len(other)
    refused(path, other[:-22] + whole, "damaged")  # Python's reader takes the last, torch's the one at the place told
    refused(path, b"PK" + whole, "damaged")
    refused(path, whole + b"\0", "damaged")
    refused(path, whole[:-2] + b"\3\0abc", "damaged")


def test_the_second_record_of_large_archives_has_one_place(tmp_path):
    path = tmp_path / "a.pth"
    whole = bytearray(saved({"a": WEIGHTS}))
    locator = whole.rfind(b"PK\6\7")
    assert locator == len(whole) - 42
    for place, value in ((locator + 8, 0), (locator - 8, 0), (locator - 16, 1)):
        forged = bytearray(whole)
        struct.pack_into("<Q", forged, place, value)
        refused(path, bytes(forged), "damaged")
    path.write_bytes(whole)
    assert tensorfiles.read(path)["a"].equal(WEIGHTS)


def test_a_tar_that_is_a_pickle_too_is_refused(tmp_path):
    # torch reads tars of its first years by pickles of their own, which are not those that were vetted
    old = saved({"a": WEIGHTS, "trainer": Trainer()}, _use_new_zipfile_serialization=False)
    name = b"\x80\x02\x8d" + struct.pack("<Q", 512 + 12 - 11) + b"n"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as target:
        info = tarfile.TarInfo("n" * 11)
        info.size = len(old)
        target.addfile(info, io.BytesIO(old))
    data = bytearray(file.getvalue())
    data[: len(name)] = name
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    refused(tmp_path / "a.pth", bytes(data), "format of 2016")


# --- what claims more than is stored ------------------------------------------------------------------------------


def tensor_of(key, kind, items, size=None, stride=1):
    """The pickle of a tensor over a storage: operations only."""
    size = items if size is None else size
    name = f"ctorch\n{kind}\n".encode()
    storage = b"(X\7\0\0\0storage" + name + key + b"X\3\0\0\0cpu" + number(items) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(0)
        + number(size)
        + b"\x85"
        + number(stride)
        + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    )


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def dict_of(*values):
    return b"\x80\x02}(" + b"".join(text(f"k{i}") + value for i, value in enumerate(values)) + b"u."


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("DoubleStorage", 1), ("ByteStorage", 8)),
        (("DoubleStorage", 1), ("FloatStorage", 2)),
        (("FloatStorage", 2), ("HalfStorage", 4)),
    ],
)
def test_two_references_to_a_storage_say_the_same(first, second, tmp_path):
    # torch makes the storage of the first and gives it out again: the second tensor would read what lies behind it
    pickled = dict_of(*(tensor_of(text("0"), *which) for which in (first, second)))
    refused(tmp_path / "a.pth", with_pickle(pickled, **{"0": b"12345678"}), "larger than what is stored")
    same = dict_of(*[tensor_of(text("0"), *first)] * 2)
    (tmp_path / "a.pth").write_bytes(with_pickle(same, **{"0": b"12345678"}))
    assert len(tensorfiles.read(tmp_path / "a.pth")) == 2


def test_one_number_is_not_a_tensor_of_thousands_of_millions(tmp_path):
    for size in (2**40, 2**31, 100_000):
        pickled = dict_of(tensor_of(text("0"), "FloatStorage", 1, size, 0))
        refused(tmp_path / "a.pth", with_pickle(pickled, **{"0": b"1234"}), "larger than what is stored")
    torch.save({"a": torch.arange(3.0).expand(4, 3)}, tmp_path / "a.pth")  # a few are stored so
    assert tensorfiles.read(tmp_path / "a.pth")["a"].shape == (4, 3)


def test_keys_of_storages_are_text_that_all_read_alike(tmp_path):
    for key in (b"U\1\xe9", b"))\x86", number(0)):  # bytes of an encoding, a tuple, a number
        pickled = dict_of(tensor_of(key, "ByteStorage", 4))
        refused(tmp_path / "a.pth", with_pickle(pickled, **{"0": b"1234"}), "outside")


def test_old_files_hold_every_storage_that_they_claim(tmp_path):
    path, whole = tmp_path / "a.pth", saved({"a": WEIGHTS, "b": WEIGHTS + 1}, _use_new_zipfile_serialization=False)
    path.write_bytes(whole)
    assert tensorfiles.read(path)["b"].equal(WEIGHTS + 1)
    file = io.BytesIO(whole)
    for _ in range(3):
        pickle.load(file)
    vet(path)
    end = whole.index(b".", whole.index(b"OrderedDict", file.tell()))
    last = whole.index(b"\x80\x02]", end)
    keys = pickle.loads(whole[last:])
    for fewer in (keys[:1], [], [*keys, "1"], "ab"):  # what is left out torch would give out as it found it
        forged = whole[:last] + pickle.dumps(fewer, 2) + whole[last + len(pickle.dumps(keys, 2)) :]
        refused(path, forged, "not stored|damaged")


# --- what never ends, or ends the process -------------------------------------------------------------------------


def deep(operations=b")", depth=3000):
    return operations + b"\x85" * depth


@pytest.mark.parametrize("foreign", [False, True])
def test_nothing_deep_is_hashed(foreign, tmp_path):
    # the hash of a tuple asks those in it, on the stack of the process, which ends there
    more = (b"cargparse\nNamespace\n)\x81",) if foreign else ()
    pairs = b"ccollections\nOrderedDict\n](" + b"]" + deep() + b"aK\1ae\x85R"
    for value in (pairs, b"\x8f(" + deep() + b"\x90", b"ccollections\nOrderedDict\n" + deep() + b"K\1\x86\x85\x85R"):
        refused(tmp_path / "a.pth", with_pickle(dict_of(value, *more)), "keys|pairs")


def test_ordered_dicts_of_python_2_are_read(tmp_path):
    pairs = b"ccollections\nOrderedDict\n](]" + text("w") + b"a" + tensor_of(text("0"), "FloatStorage", 2) + b"ae\x85R"
    for more in ((), (b"cargparse\nNamespace\n)\x81",)):
        path = tmp_path / "a.pth"
        path.write_bytes(with_pickle(dict_of(pairs, *more), **{"0": struct.pack("<2f", 1, 2)}))
        assert tensorfiles.read(path)["k0"] == collections.OrderedDict(w=pytest.approx(torch.tensor([1.0, 2.0])))


def test_lists_in_lists_in_lists_take_no_time(tmp_path):
    path, began = tmp_path / "a.pth", time.monotonic()
    value = {"w": WEIGHTS}
    for _ in range(100):
        value = [value] * 3
    torch.save({"net": {"w": WEIGHTS}, "trainer": Trainer(), "many": value}, path)
    contents = tensorfiles.read(path)
    assert contents["net"]["w"].equal(WEIGHTS)
    assert "trainer" not in contents
    torch.save({"trainer": Trainer(), "many": [[[1] * 3] * 3] * 3, "more": value[:1]}, path)
    tensorfiles.read(path)
    dicts = {"w": torch.ones(2, 2)}
    for _ in range(5):
        dicts = {f"{i}": dicts for i in range(1000)}
    assert places(dicts) == ([], None)
    assert time.monotonic() - began < 20


def test_a_name_made_of_tuples_takes_no_memory(tmp_path):
    tuples = b")" + b"q\1h\1\x86" * 60  # written out, 2⁶⁰ of them
    for pickled in (tuples + text("x") + b"\x93", text("x") + tuples + b"\x93"):
        refused(tmp_path / "a.pth", with_pickle(dict_of(pickled)), "no text")
    refused(tmp_path / "a.pth", with_pickle(dict_of(tensor_of(tuples, "ByteStorage", 1))), "outside")


@pytest.mark.parametrize("index", [5000, 2**30 + 571, 2**32 - 1])
def test_a_memo_that_skips_takes_no_memory(index, tmp_path):
    trainer = b"cargparse\nNamespace\n)\x81"
    put = b"r" + struct.pack("<I", index)
    refused(tmp_path / "a.pth", with_pickle(dict_of(trainer + put)), "damaged")
    few = dict_of(trainer + b"r" + struct.pack("<I", 900), tensor_of(text("0"), "FloatStorage", 1))
    (tmp_path / "a.pth").write_bytes(with_pickle(few, **{"0": bytes(4)}))
    assert tensorfiles.read(tmp_path / "a.pth").keys() == {"k1"}


@pytest.mark.parametrize("codec", ["zip", "idna", "hex", "no such codec"])
def test_text_is_encoded_as_bytes_only(codec, tmp_path):
    call = b"c_codecs\nencode\n" + text("é") + text(codec) + b"\x86R"
    refused(tmp_path / "a.pth", with_pickle(dict_of(call)), "encoding")
    (tmp_path / "a.pth").write_bytes(
        with_pickle(dict_of(b"c_codecs\nencode\n" + text("é") + text("latin1") + b"\x86R"))
    )
    assert tensorfiles.read(tmp_path / "a.pth") == {"k0": b"\xe9"}


# --- what a file says of itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", ["text", [1], 3, {"config": "text"}, {"step": "x"}, {"corrupt": ["x"]}, {"format": []}]
)
def test_an_entry_of_other_kinds_is_damaged(wrong, tmp_path):
    contents = {"epoch": 1, "arch": "resnet10_w16", "state_dict": {}, "optimizer": {}, "mocov3": wrong}
    with pytest.raises(UserError, match="'mocov3' is damaged"):
        checkpoint.check_entries(contents, tmp_path)
    with pytest.raises(UserError):
        find_backbone(contents, "here")


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(0, 3), 10**400, float("nan"), [[1]], "x" * 9])
@pytest.mark.parametrize("name", ["view_preset", "image_size", "mean_std"])
def test_a_configuration_of_other_kinds_is_refused_in_a_line(wrong, name):
    contents = {"mocov3": {"config": {name: wrong}}, "model": resnet()}
    with pytest.raises(UserError) as error:
        convert.build_from(contents, "here", arch="resnet10_w16")
    assert "\n" not in str(error.value)
