"""Which images are the training, validation and test part, and which class each has: one rule for all commands."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from mocov3 import cli
from mocov3.config import EmbedConfig, PretrainConfig
from mocov3.data import open_source
from mocov3.data.loading.labelled import open_evaluated, open_labelled
from mocov3.data.sources.opening import has_unseen, open_unseen
from mocov3.data.sources.splits import choose, split_of_file, split_of_folder
from mocov3.data.sources.transfer import open_pair
from mocov3.errors import UserError
from mocov3.evaluation import compare, embed
from mocov3.evaluation.knn_inputs import open_sets
from mocov3.pretraining.inputs import open_images


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tree(root, *paths):
    """Files that hold their own names: what is an image is told by the name."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def tar(path, *members):
    """An archive of names, or of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            name, data = member if isinstance(member, tuple) else (member, member.encode())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def table(path, rows, labels):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [f"{path.name} {i}".encode() for i in range(rows)], "label": labels}), path)


def names(source):
    return sorted(source.name(i).replace("\\", "/") for i in range(len(source)))


def classes(source):
    """What the source says of every image: name → class."""
    return dict(
        zip((source.name(i).partition("/")[2] for i in range(len(source))), source.labels.tolist(), strict=True)
    )


def said(source):
    return "\n".join(source.skipped)


# --- (a) archives: which members are images, and of which class ------------------------------------------------


def test_dots_in_names_keep_their_classes(tmp_path):
    members = [x for i in range(5) for x in (f"cam/shot.{i}.png", (f"cam/shot.{i}.cls", str(i % 3).encode()))]
    more = [
        "plain.jpg",
        ("plain.cls", b"7"),
        "stereo.left.jpg",
        "stereo.right.jpg",
        ("stereo.cls", b"4"),
        "photo.v2.jpg",
        ("photo.cls", b"2"),
        "a.b.JPG",
        ("a.b.cls", b"1"),
    ]
    source = open_source(str(tar(tmp_path / "x.tar", *members, *more)))
    assert classes(source) == {
        **{f"cam/shot.{i}.png": i % 3 for i in range(5)},
        "plain.jpg": 7,
        "stereo.left.jpg": 4,
        "stereo.right.jpg": 4,
        "photo.v2.jpg": 2,
        "a.b.JPG": 1,
    }
    assert len(source.skipped) == 1
    assert "5 images share" in said(source)


def test_a_class_without_its_image_is_nobodys(tmp_path):
    """Twelve classes, eleven images: each has its own, and the odd one is said."""
    members = [(f"f.{i}.cls", str(i).encode()) for i in range(12)] + [f"f.{i}.jpg" for i in range(11)]
    source = open_source(str(tar(tmp_path / "x.tar", *members)))
    assert source.labels.tolist() == list(range(11))
    assert "1 .cls files lie beside no image; first: x.tar: f.11.cls" in said(source)
    source = open_source(str(tar(tmp_path / "y.tar", "f.0.jpg", "f.1.jpg", "f.2.jpg", ("f.0.cls", b"5"))))
    assert source.labels.tolist() == [5, -1, -1]
    assert "2 of 3 images have no label" in said(source)
    source = open_source(str(tar(tmp_path / "z.tar", "f.0.jpg", ("f.1.cls", b"5"))))
    assert source.labels is None


def test_classes_that_contradict_each_other(tmp_path):
    source = open_source(str(tar(tmp_path / "x.tar", "a.jpg", ("a.cls", b"1"), ("a.cls", b"2"))))
    assert source.labels is None
    assert "a.cls: is there more than once, with classes 1 and 2" in said(source)
    source = open_source(str(tar(tmp_path / "y.tar", "a.jpg", "a.jpg", ("a.cls", b"1"), ("a.cls", b"1"))))
    assert source.labels.tolist() == [1, 1]
    assert "1 images have the name of an earlier member" in said(source)
    assert "1 .cls files are there more than once" in said(source)


def test_masks_are_left_out_beside_images_only(tmp_path):
    members = [
        "1.jpg",
        "1.seg.png",
        ("1.cls", b"0"),
        "2.jpg",
        "2.depth.png",
        "2.normal.png",
        ("2.cls", b"1"),
        "d/3.jpg",
        "d/3.left.jpg",
        ("d/3.cls", b"2"),
        "seg.4.jpg",
        ("seg.4.cls", b"3"),
        "x.normal.jpg",
        ("x.cls", b"4"),
        "carnival_mask.jpg",
        ("carnival_mask.cls", b"5"),
    ]
    source = open_source(str(tar(tmp_path / "x.tar", *members)))
    assert classes(source) == {
        "1.jpg": 0,
        "2.jpg": 1,
        "d/3.jpg": 2,
        "d/3.left.jpg": 2,
        "seg.4.jpg": 3,
        "x.normal.jpg": 4,
        "carnival_mask.jpg": 5,
    }
    assert source.skipped == [
        "3 masks or the like beside images are left out (.seg.png, .mask.png, .depth.png …); first: x.tar: 1.seg.png"
    ]
    for i in range(3):  # over several archives it is one line
        tar(tmp_path / "many" / f"{i}.tar", f"{i}.jpg", f"{i}.mask.png", f"o{i}.seg.png")
    many = open_source(str(tmp_path / "many"))
    assert names(many) == ["0.tar/0.jpg", "1.tar/1.jpg", "2.tar/2.jpg"]
    assert len(many.skipped) == 2
    assert "3 files are left out" in said(many)


def test_members_that_a_folder_passes_over(tmp_path):
    members = [
        "a.jpg",
        "./b.jpg",
        "._a.jpg",
        "d/._c.jpg",
        "__MACOSX/a.jpg",
        "d/@eaDir/a.jpg",
        ".cache/a.jpg",
        "d/c.jpg",
    ]
    source = open_source(str(tar(tmp_path / "x.tar", *members)))
    assert names(source) == ["x.tar/./b.jpg", "x.tar/a.jpg", "x.tar/d/c.jpg"]
    assert "5 members in hidden folders" in said(source)
    tree(tmp_path / "d", *(m.removeprefix("./") for m in members))
    assert names(open_source(str(tmp_path / "d"))) == ["a.jpg", "b.jpg", "d/c.jpg"]


def test_an_archive_of_several_parts_is_used_and_said(tmp_path):
    source = open_source(str(tar(tmp_path / "x.tar", "a/train/1.jpg", "a/train/2.jpg", "a/val/3.jpg")))
    assert len(source) == 3
    assert "2 train, 1 val images" in said(source)
    assert open_source(str(tar(tmp_path / "y.tar", "a/train/1.jpg", "a/train/2.jpg"))).skipped == []


# --- (b) parts by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("imagenet-val-000.tar", "val"),
        ("x/validation-1.tar", "val"),
        ("set_test_3.tar", "test"),
        ("DEV.tar", "val"),
        ("speed-test-train-001.tar", "train"),
        ("training.tar", "train"),
        ("latest.tar", None),
        ("contest-0.tar", None),
        ("trainer-0.tar", None),
        ("testament.parquet", None),
        ("000.tar", None),
        ("intervals-val2.tar", "val"),
    ],
)
def test_words_of_files(name, split):
    assert split_of_file(name) == split


def test_words_of_folders():
    expected = {
        "train": "train",
        "TRAIN": "train",
        "Validation": "val",
        "dev": "val",
        "eval": "val",
        "test": "test",
        "val2017": "val",
        "01_train": "train",
        "training": "train",
        "latest": None,
        "contest": None,
        "train_station": None,
        "test_tube": None,
        "trainset": None,
        "t-rain": None,
        "": None,
    }
    assert {name: split_of_folder(name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["folders", "tars", "tables"])
@pytest.mark.parametrize(("train", "val"), [("train", "valid"), ("Training", "dev"), ("train", "test")])
def test_parts_of_every_kind(kind, train, val, tmp_path):
    for part, n in ((train, 4), (val, 3)):
        for i in range(n):
            if kind == "folders":
                tree(tmp_path / "d", f"{part}/c{i % 2}/{i}.jpg")
            elif kind == "tars":
                tar(tmp_path / "d" / f"set-{part}-{i:03d}.tar", f"{i}.jpg", (f"{i}.cls", str(i % 2).encode()))
            else:
                table(tmp_path / "d" / f"{part}-0000{i}-of-00009.parquet", 1, [i % 2])
    data = str(tmp_path / "d")
    found, unseen = open_source(data, "train"), open_source(data, "val")
    assert (len(found), len(unseen)) == (4, 3)
    assert found.labels.tolist() == [0, 1, 0, 1] or found.labels.tolist() == [0, 0, 1, 1]
    assert ("the test part is used" in said(unseen)) == (val == "test")
    assert ("left out: 3" in said(found)) == (kind != "folders")
    assert has_unseen(data)


def test_a_folder_of_one_part_is_used_whole(tmp_path):
    tree(tmp_path / "test", "1.jpg", "2.jpg")
    for i in range(2):
        tar(tmp_path / "x" / "val" / f"val-{i}.tar", f"{i}.jpg")
    assert len(open_source(str(tmp_path / "test"))) == 2
    part = open_source(str(tmp_path / "x" / "val"))
    assert (len(part), part.skipped) == (2, [])
    assert len(open_source(str(tmp_path / "x"))) == 2
    assert "has no training part; val/ is used" in said(open_source(str(tmp_path / "x")))
    assert len(open_source(str(tmp_path / "x"), "val")) == 2
    assert not has_unseen(str(tmp_path / "x"))  # nothing to validate on that is not trained on
    with pytest.raises(UserError, match="one part only"):
        open_unseen(str(tmp_path / "x"))


def test_files_without_a_word_beside_files_with_one(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "extra.tar", "test.tar"):
        tar(tmp_path / "a" / name, f"{name}.jpg")
    source = open_source(str(tmp_path / "a"))
    assert len(source) == 2
    assert "2 of 4 files are used (training); left out: 1 of no part, 1 test" in said(source)
    for name in ("0.tar", "1.tar", "latest.tar", "val-0.tar"):
        tar(tmp_path / "b" / name, f"{name}.jpg")
    assert len(open_source(str(tmp_path / "b"))) == 3
    assert len(open_source(str(tmp_path / "b"), "val")) == 1
    for name in ("val.tar", "test.tar"):
        tar(tmp_path / "c" / name, f"{name}.jpg")
    with pytest.raises(UserError, match="none of train"):
        open_source(str(tmp_path / "c"))
    assert names(open_source(str(tmp_path / "c"), "val")) == ["val.tar/val.tar.jpg"]


def test_a_pattern_is_taken_as_given(tmp_path):
    for name in ("train-0.tar", "test-0.tar", "x.tar"):
        tar(tmp_path / name, f"{name}.jpg")
    assert len(open_source(f"{tmp_path}/*-0.tar")) == 2
    assert "names files of several parts (1 test, 1 training)" in said(open_source(f"{tmp_path}/*-0.tar"))
    assert open_source(f"{tmp_path}/{{test-0,x}}.tar").skipped == []
    with pytest.raises(UserError, match="val"):
        open_source(f"{tmp_path}/*.tar", "val")


def test_the_root_of_a_hugging_face_repository(tmp_path):
    table(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet", 5, [0, 1, 2, 0, 1])
    table(tmp_path / "repo" / "data" / "test-00000-of-00001.parquet", 2, [-1, -1])
    (tmp_path / "repo" / "README.md").write_text("x")
    source, test = (open_source(str(tmp_path / "repo"), split) for split in ("train", "val"))
    assert (source.labels.tolist(), test.labels) == ([0, 1, 2, 0, 1], None)
    assert "column label holds no label" in said(test)


# --- (c) a part, or a class that is called so -------------------------------------------------------------------


def test_a_class_called_like_a_part(tmp_path):
    for word in ("train", "val", "Test"):
        root = tree(tmp_path / word, "bus/1.jpg", "car/2.jpg", f"{word}/3.jpg", "truck/4.jpg")
        source = open_source(str(root))
        assert source.classes == sorted(["bus", "car", word, "truck"])
        assert len(source) == 4
        assert f"{word}/ taken for a class, like bus/, car/, truck/" in said(source)
        with pytest.raises(UserError, match=r"no such folder|class among others"):
            open_source(str(root), "val")
    assert len(open_source(str(tmp_path / "train" / "train"))) == 1


def test_a_part_that_looks_like_one(tmp_path):
    tree(tmp_path / "a", "train/1.jpg", "cover.jpg")  # the only folder with images
    tree(tmp_path / "b", "train/cat/1.jpg", "train/dog/2.jpg", "extra/3.jpg", "extra/4.jpg")  # classes are inside
    tree(tmp_path / "c", "train/1.jpg", "unlabeled/2.jpg", "test/3.jpg")  # another part is beside
    tree(tmp_path / "d", "train/1.jpg", "masks/1.png")
    for name, left in (
        ("a", "1 images directly"),
        ("b", "extra/ (2 images)"),
        ("c", "unlabeled/ (1 image)"),
        ("d", "masks/ (1 image)"),
    ):
        source = open_source(str(tmp_path / name))
        assert all(n.endswith(("1.jpg", "dog/2.jpg")) for n in names(source)), name
        assert left in said(source)
    assert open_source(str(tmp_path / "b")).classes == ["cat", "dog"]


def test_what_is_named_for_validation_is_never_trained_on(tmp_path):
    tree(tmp_path / "loose", "1.jpg", "2.jpg", "val/3.jpg")
    tree(tmp_path / "nested", "cat/1.jpg", "dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")
    for root, left in (("loose", ["1.jpg", "2.jpg"]), ("nested", ["cat/1.jpg", "dog/2.jpg"])):
        source = open_source(str(tmp_path / root))
        assert names(source) == left
        assert "val/ left out of training" in said(source)
    train, val = open_labelled(str(tmp_path / "nested"))
    assert train.classes == val.classes == ["cat", "dog"]


def test_odd_folders(tmp_path):
    tree(tmp_path / "empty", "val/cat/1.jpg").joinpath("train").mkdir()
    with pytest.raises(UserError, match="train: holds no image"):
        open_source(str(tmp_path / "empty"))
    tree(tmp_path / "rest", "cat/1.jpg", "dog/2.jpg").joinpath("train").mkdir()
    assert len(open_source(str(tmp_path / "rest"))) == 2
    tree(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    tree(tmp_path / "link", "val/3.jpg").joinpath("train").symlink_to(tmp_path / "elsewhere")
    assert len(open_source(str(tmp_path / "link"))) == 2
    tree(tmp_path / "two", "train2014/1.jpg", "train2017/2.jpg", "val2017/3.jpg")
    with pytest.raises(UserError, match="train2014/, train2017/ are named for the training part"):
        open_source(str(tmp_path / "two"))
    tree(tmp_path / "no_train", "val/1.jpg", "test/2.jpg")
    with pytest.raises(UserError, match="no train/"):
        open_source(str(tmp_path / "no_train"))
    assert names(open_source(str(tmp_path / "no_train"), "val")) == ["1.jpg"]
    tree(tmp_path / "numbered", "train1/1.jpg", "train2/2.jpg")
    assert open_source(str(tmp_path / "numbered")).classes == ["train1", "train2"]


def test_what_else_is_said(tmp_path):
    tree(tmp_path / "deep", "chest/train/a/1.jpg", "chest/val/a/2.jpg")
    source = open_source(str(tmp_path / "deep"))
    assert len(source) == 2
    assert "chest/train/, chest/val/ are used alike" in said(source)
    tree(tmp_path / "left", "train/n1/1.jpg", "val/n1/2.jpg")  # archives that were unpacked where they lie
    tar(tmp_path / "left" / "train" / "n1.tar", "1.jpg")
    assert "left out, beside archives or tables: n1/ (1 image)" in said(open_source(str(tmp_path / "left")))
    tree(tmp_path / "repo", "assets/1.jpg")
    tar(tmp_path / "repo" / "data" / "train-0.tar", "2.jpg", "3.jpg")
    assert "left out 1 .tar: name the files, or the folder that holds them; first: data/train-0.tar" in said(
        open_source(str(tmp_path / "repo"))
    )
    for name in ("0.tar", "val-1.tar"):
        tar(tmp_path / "mixed" / "train" / name, f"{name}.jpg")
    tree(tmp_path / "mixed", "test/1.jpg")
    source = open_source(str(tmp_path / "mixed"))
    assert names(source) == ["0.tar/0.tar.jpg"]
    assert "left out: 1 validation" in said(source)


# --- (d) one rule for all commands ------------------------------------------------------------------------------


def jpeg(i):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 44, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def openers():
    """How each command opens its data: (training part, validation part or ``None``)."""

    def pretrain(d):
        return open_images(PretrainConfig(data=d, batch_size=1))[0], None

    return {
        "pretrain, check, auto, report": pretrain,
        "knn": open_sets,
        "lincls": open_labelled,
        "finetune": lambda d: tuple(open_pair("folder", d))[:2],
        "compare": lambda d: (None, compare._images(d)[0]),
        "lincls -e, verify": lambda d: (None, open_evaluated(d)),
        "quality, online k-NN": lambda d: (None, open_unseen(d)),
    }


@pytest.mark.parametrize("command", openers())
@pytest.mark.parametrize("kind", ["folders", "tars", "beside"])
def test_all_commands_take_the_same_images(command, kind, tmp_path):
    d = tmp_path / "d"
    for part, n in (("train", 6), ("validation", 4), ("test", 2)):
        if kind != "tars":
            tree(d, *(f"{part}/c{i % 2}/{part}{i}.jpg" for i in range(n)))
        else:
            tar(
                d / f"{part}-0.tar",
                *(x for i in range(n) for x in (f"{part}{i}.jpg", (f"{part}{i}.cls", b"%d" % (i % 2)))),
            )
    if kind == "beside":
        tree(d, "extra/x.jpg", "y.jpg")
    train, val = openers()[command](str(d))
    want = {s: names(open_source(str(d), s)) for s in ("train", "val")}
    assert (len(want["train"]), len(want["val"])) == (6, 4)
    assert train is None or names(train) == want["train"]
    assert val is None or names(val) == want["val"]


@pytest.mark.parametrize(
    "command", ["pretrain, check, auto, report", "knn", "finetune", "lincls", "quality, online k-NN"]
)
def test_all_commands_know_a_class_called_train(command, tmp_path):
    d = tree(tmp_path / "d", *(f"{c}/{i}.jpg" for c in ("bus", "car", "train") for i in range(4)))
    if command in ("pretrain, check, auto, report", "knn"):
        train, val = openers()[command](str(d))
        assert (len(train), val) == (12, None)
    else:
        with pytest.raises(UserError):
            openers()[command](str(d))


def test_commands_say_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mocov3.distributed.launch", lambda *_, **__: 0)  # said before the ranks start
    d = tmp_path / "d"
    for path in tree(d, *(f"{c}/{i}.jpg" for c in ("bus", "train") for i in range(4))).rglob("*.jpg"):
        path.write_bytes(jpeg(len(str(path)) + int(path.stem)))
    assert (
        embed.main(
            EmbedConfig(
                model="resnet10_w16",
                data=str(d),
                output=str(tmp_path / "e.npy"),
                image_size=32,
                workers=0,
                device="cpu",
                untrained=True,
            )
        )
        == 0
    )
    assert "train/ taken for a class, like bus/" in capsys.readouterr().err
    assert cli.main(["pack", str(d), "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr()
    assert "train/ taken for a class" in out.err
    assert "8 images" in out.out
    tree(d, "val/bus/1.jpg")
    assert cli.main(["pretrain", str(d), "--recipe", "defaults", "-b", "999", "--output-dir", str(tmp_path / "o")]) == 2
    assert "left out, as of no part: bus/ (4 images)" in capsys.readouterr().err
    assert "the validation part is not in it" in embed.other_part(str(d))
    assert embed.other_part(str(d / "bus")) == ""


# --- what must not change ---------------------------------------------------------------------------------------


def test_digests_of_ordinary_layouts_are_pinned(tmp_path):
    """A run of an earlier version must find its data again: sha256 as they were before parts were told by name."""
    tree(tmp_path / "classes", "cat/1.jpg", "cat/2.png", "dog/1.jpg")
    tree(tmp_path / "flat", "1.jpg", "2.jpg")
    tree(tmp_path / "splits", "train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")
    tar(tmp_path / "tars" / "000.tar", ("a/1.jpg", b"11"), ("a/1.cls", b"0"), ("a/2.png", b"222"), ("a/2.cls", b"1"))
    tar(tmp_path / "tars" / "001.tar", ("3.jpg", b"3"), ("3.json", b"{}"), ("3.cls", b"1"))
    expected = {
        ("classes", "train"): "a23475fe7ea94a1a22aaa79226df7769123c83da30a79ac2f2b85b3bdda5fb7f",
        ("flat", "train"): "3fc837428ee1f7206903d78563a93ac6a5154d91e8e03fb9131ba26f13224fdd",
        ("splits", "train"): "f7c4b85983b81c58bc5fedae1ef7c03d38d1ae9816947f1a9a7fabee9d713acf",
        ("splits", "val"): "a59d161d1cac974b9239ec8fa5093e9de176f2954196effe50fc2de9e51a3187",
        ("tars", "train"): "81986c9f1362744c8b678035c626c7d74bfb61b79f77721e811397ba81168d2b",
    }
    assert {(n, s): open_source(str(tmp_path / n), s).digest for n, s in expected} == expected


def test_digest_of_plain_tables_is_pinned(tmp_path):
    for name, labels in (("0.parquet", [0, 1]), ("1.parquet", [2])):
        table(tmp_path / "d" / name, len(labels), labels)
    text = "".join(f"{name}:{(tmp_path / 'd' / name).stat().st_size}\n" for name in ("0.parquet", "1.parquet"))
    expected = hashlib.sha256(text.encode() + np.array([0, 1, 2], np.int32).tobytes()).hexdigest()
    assert open_source(str(tmp_path / "d")).digest == expected


def test_a_folder_without_parts_is_read_once(tmp_path):
    tree(tmp_path / "d", *(f"c{i}/1.jpg" for i in range(20)))
    part = choose(str(tmp_path / "d"), "train")
    assert (part.place, part.files, part.without, part.remarks) == (str(tmp_path / "d"), (), (), ())
    assert choose(str(tmp_path / "d"), "val") is None
