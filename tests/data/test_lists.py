"""Lists, labels and tables in the forms in which people have them; classes that are matched by name."""

import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from mocov3.data import open_source
from mocov3.data.loading.labelled import open_labelled
from mocov3.data.sources.classes import numbered, ordered
from mocov3.data.sources.labels import matched, read_labels, with_labels
from mocov3.data.sources.opening import Roots
from mocov3.data.sources.transfer import open_pair
from mocov3.errors import UserError
from mocov3.evaluation.embeddings import class_names
from mocov3.evaluation.knn_inputs import open_sets


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


FILES = ("w/red fox/a 1.jpg", "w/red fox/b2.PNG", "w/owl/c.jpeg", "w/owl/d.jpg")


def tree(root, *paths):
    """Files that hold their own paths, so that what is read tells which file it was."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def written(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / name)


def contents(source):
    return [source.read(i).decode() for i in range(len(source))]


def labels(source):
    """Name of every image's class."""
    return None if source.labels is None else [source.classes[n] if n >= 0 else "" for n in source.labels]


def lines(form, classes=("red fox", "red fox", "owl", "owl")):
    return "".join(form.format(p=p, b=p.replace("/", "\\"), c=c) for p, c in zip(FILES, classes, strict=True))


CLASSES = ["red fox", "red fox", "owl", "owl"]
READ = {
    "blanks behind.txt": (lines("{p} \t\n"), None),
    "blanks before.lst": (lines("  {p}\r\n"), None),
    "dot.txt": (lines("./{p}\n"), None),
    "windows.txt": ("\ufeff" + lines("{b}\r\n"), None),
    "utf16.txt": (lines("{p}\r\n").encode("utf-16"), None),
    "quotes.txt": (lines('"{p}"\n'), None),
    "home.txt": (lines("~/{p}\n"), None),
    "one line.txt": ("w/owl/c.jpeg 7", ["7"]),
    "words behind.txt": (lines("{p} {c}\n"), CLASSES),
    "tabs.txt": (lines("{p}\t{c}\n"), CLASSES),
    "windows tabs.txt": (lines("{b}\t{c}\r\n"), CLASSES),
    "commas.txt": (lines("{p},{c}\n"), CLASSES),
    "header.txt": ("file;class\n" + lines("{p};{c}\n"), CLASSES),
    "label first.txt": (lines("{c} {p}\n", ("x", "x", "y", "y")), ["x", "x", "y", "y"]),
    "numbers first.txt": ("".join(f"{i} {p}\n" for i, p in enumerate(FILES, 100)), None),
    "comments.txt": ("# made by hand\n" + lines("{p} {c}\n") + "#w/gone.jpg owl\n", CLASSES),
    "several values.txt": (lines("{p} 1 0 0.5\n"), None),
    "label in one line.txt": (f"{FILES[0]} 3\n" + "".join(f"{p}\n" for p in FILES[1:]), ["3", "", "", ""]),
    "some labels.txt": (f"{FILES[0]}\n{FILES[1]} a b\n{FILES[2]} 0\n{FILES[3]} a b\n", ["", "a b", "0", "a b"]),
    "pandas.csv": (
        ",path,label\n" + "".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(zip(FILES, CLASSES, strict=True))),
        CLASSES,
    ),
    "kaggle.csv": ("id,breed\n" + lines("{p},{c}\n"), CLASSES),
    "semicolons.csv": ("Image Path;Class Name\n" + lines('"{b}"; "{c}"\n'), CLASSES),
    "tabs.tsv": ("label\timg_path\n" + lines("{c}\t{p}\n"), CLASSES),
    "tabs.csv": ("img\ttarget\tsize\n" + lines("./{p}\t{c}\t10\n"), CLASSES),
    "own names.csv": ("Bild,Art\n" + lines("{p},{c}\n"), CLASSES),
    "no header.csv": ("".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(zip(FILES, CLASSES, strict=True))), CLASSES),
    "comment.csv": ("# of 2024\n#filename,label\n" + lines("{p},{c}\n"), CLASSES),
    "ids and names.csv": ("image_id,file_name,category\n" + lines("7,{p},{c}\n"), CLASSES),
    "missing.csv": ("file,label\n" + lines("{p},{c}\n", ("nan", "", "owl", "NaN")), ["", "", "owl", ""]),
    "attributes.csv": ("image,wings,fur\n" + lines("{p},1,0\n"), None),
}


@pytest.mark.parametrize("name", READ)
def test_a_list_is_read_as_it_is_meant(name, tmp_path):
    tree(tmp_path, *FILES)
    text, classes = READ[name]
    source = open_source(written(tmp_path, name, text))
    assert contents(source) == (list(FILES) if name != "one line.txt" else [FILES[2]])
    assert labels(source) == classes


def test_how_it_was_read_is_said(tmp_path):
    tree(tmp_path, *FILES)
    said = {}
    for name, (text, _) in READ.items():
        said[name] = "\n".join(open_source(written(tmp_path, name, text)).skipped)
    assert said["utf16.txt"] == said["tabs.tsv"] == ""
    assert "paths from column path, labels from column label" in said["pandas.csv"]
    assert "paths from column Bild, labels from column Art" in said["own names.csv"]
    assert "\\ in paths are resolved" in said["windows.txt"]
    assert "2 lines that begin with # are passed over" in said["comments.txt"]
    assert "line 1 holds several values (1 0 0.5)" in said["several values.txt"]
    assert "1 of 4 images have no label" in said["some labels.txt"]
    assert "no labels" in said["attributes.csv"]


def test_what_a_list_says_comes_first(tmp_path):
    """Names that look like another form are names, where there are such files."""
    odd = ["a.jpg 1", "#b.jpg", '"c".jpg', "d,e.jpg"] + (["f\\g.jpg"] if os.name != "nt" else [])
    tree(tmp_path, *odd)
    source = open_source(written(tmp_path, "l.txt", "\n".join(odd)))
    assert (contents(source), source.labels, source.skipped) == (odd, None, [])


def test_images_are_found_by_names_without_endings(tmp_path):
    tree(tmp_path, "train/7f3a.jpg", "train/0b.png", "part_2/c1.jpeg", "top.jpg", "test/0b.png", "twice/c1.jpeg")
    text = "image_id,label\n7f3a,1\n0b,10\ntop,9\n"
    source = open_source(written(tmp_path, "train.csv", text))
    assert contents(source) == ["train/7f3a.jpg", "train/0b.png", "top.jpg"]
    assert source.classes == ["1", "9", "10"]
    assert "found by their names beside the list" in source.skipped[0]
    source = open_source(written(tmp_path, "other.csv", "id\n7f3a\ntrain/0b\nc1\n0b\n"))
    assert contents_or_none(source) == ["train/7f3a.jpg", "train/0b.png", None, None]  # the last two lie in two folders


def contents_or_none(source):
    out = []
    for i in range(len(source)):
        try:
            out.append(source.read(i).decode())
        except OSError:
            out.append(None)
    return out


def test_paths_below_the_folder_above_and_the_working_directory(tmp_path, monkeypatch):
    tree(tmp_path, *FILES)
    (tmp_path / "lists").mkdir()
    (tmp_path / "deep" / "lists").mkdir(parents=True)
    source = open_source(written(tmp_path / "lists", "l.txt", lines("{p} {c}\n")))
    assert (contents(source), labels(source)) == (list(FILES), CLASSES)
    assert f"paths are relative to {tmp_path}" in source.skipped[0]
    far = written(tmp_path / "deep" / "lists", "l.txt", lines("{p}\n"))
    with pytest.raises(UserError, match="line 1: w/red fox/a 1"):
        open_source(far)
    monkeypatch.chdir(tmp_path)
    assert contents(open_source(far)) == list(FILES)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.csv", 'path,label\nw/owl/c.jpeg,"owl\nw/owl/d.jpg,owl\n', "line 3 is not CSV"),
        ("l.csv", "# x\npath,label\nw/owl/d.jpg,owl\n  ,owl\n", "line 4 holds no path"),
        ("l.txt", "\nw/owl/gone.jpg owl\n", "first: line 2: w/owl/gone.jpg;"),
        ("l.csv", "a,b\nw/owl/c.jpeg,w/owl/d.jpg\n", "columns a and b both name images"),
        ("l.txt", "w/owl/c.jpeg w/owl/d.jpg\nw/owl/c.jpeg w/owl/d.jpg\n", "columns 1 and 2 both name images"),
        ("l.txt", "# only\n# comments\n", "names no image"),
    ],
)
def test_what_is_ambiguous_is_named(name, text, words, tmp_path):
    tree(tmp_path, *FILES)
    with pytest.raises(UserError, match=f"{re.escape(name)}: .*{re.escape(words)}"):
        open_source(written(tmp_path, name, text))


def test_a_long_list_is_probed_not_searched(tmp_path, monkeypatch):
    tree(tmp_path, *(f"{i}.jpg" for i in range(10)))
    asked = []
    real = os.path.isfile
    monkeypatch.setattr("os.path.isfile", lambda path: asked.append(path) or real(path))
    assert len(open_source(written(tmp_path, "l.txt", "".join(f"{i % 10}.jpg\n" for i in range(5000))))) == 5000
    assert len(asked) < 200


# --- order and names of classes -----------------------------------------------------------------------------------


def test_numbers_of_classes():
    assert ordered(["10", "9", "-1", "2"]) == ["-1", "2", "9", "10"]
    assert ordered(["10", "9", "b"]) == ["10", "9", "b"]
    assert ordered(["1.0", "10.0", "2.0"]) == ["1.0", "2.0", "10.0"]
    numbers, classes = numbered(["owl", "", "fox", "owl"])
    assert (numbers.tolist(), classes) == ([1, -1, 0, 1], ["fox", "owl"])
    assert numbered(["", ""]) == (None, [])


def parts(tmp_path, train, val):
    """train/ and val/ of class folders with as many images as are told."""
    for part, counts in (("train", train), ("val", val)):
        tree(tmp_path, *(f"{part}/{c}/{i}.jpg" for c, n in counts.items() for i in range(n)))
    return str(tmp_path)


OPENERS = {"lincls": open_labelled, "knn": open_sets, "finetune": lambda d: open_pair("folder", d)[:2]}


@pytest.mark.parametrize("command", OPENERS)
def test_folders_are_matched_by_name(command, tmp_path):
    data = parts(tmp_path / "d", {"a": 2, "b": 2, "c": 2}, {"b": 1, "c": 2})
    train, val = OPENERS[command](data)
    assert (train.classes, val.classes) == (["a", "b", "c"], ["a", "b", "c"])
    assert labels(val) == [val.name(i).replace("\\", "/").split("/")[0] for i in range(3)] == ["b", "c", "c"]
    assert "1 of 3 classes have no validation image, first 'a'" in val.skipped[-1]
    tree(tmp_path / "d", "val/d/1.jpg", "val/d/2.jpg")
    with pytest.raises(UserError, match="2 validation images are of classes that training lacks, first 'd'"):
        OPENERS[command](data)


def test_other_orders_of_classes_are_matched(tmp_path):
    tree(tmp_path, *FILES)
    names = ["zoo", "apple", "moon", "zoo"]
    val = open_source(written(tmp_path, "v.csv", "path,label\n" + lines("{p},{c}\n", names)))
    assert val.classes == ["apple", "moon", "zoo"]
    found = matched(["zoo", "moon", "sun", "apple"], val, "here")
    assert (labels(found), found.labels.tolist()) == (names, [0, 3, 1, 0])
    assert [found.read(i) for i in range(4)] == [val.read(i) for i in range(4)]
    assert matched(["apple", "moon", "zoo"], val, "here") is val


def test_several_sources_share_classes_by_name(tmp_path):
    tree(tmp_path, "one/b/1.jpg", "one/a/2.jpg", "two/c/3.jpg", "two/a/4.jpg", "flat/5.jpg")
    sources = [open_source(str(tmp_path / name)) for name in ("one", "two", "flat")]
    whole = Roots(sources, [1.0, 1.0, 1.0])
    assert labels(whole) == ["a", "b", "a", "c", ""]
    assert whole.skipped == []  # nothing that pre-training would need to hear
    known = with_labels(whole)
    assert labels(known) == ["a", "b", "a", "c"]
    assert "1 of 5 images have no label" in known.skipped[-1]
    assert Roots(sources[2:], [1.0]).labels is None


# --- labels that are missing, or lie in a file of their own -----------------------------------------------------


def test_images_without_labels_are_left_out_of_scores_alone(tmp_path):
    tree(tmp_path, *FILES)
    file = written(tmp_path, "l.csv", "path,label\n" + lines("{p},{c}\n", ("", "owl", "fox", "fox")))
    source = open_source(file)
    assert len(source) == 4
    assert class_names(source) == ["", "owl", "fox", "fox"]
    bank, queries = open_sets(file)
    assert (labels(bank), contents(bank), queries) == (["owl", "fox", "fox"], list(FILES[1:]), None)
    assert "1 of 4 images have no label" in bank.skipped[0]
    alone = open_source(written(tmp_path, "m.csv", "path,label\n" + lines("{p},{c}\n")))
    assert with_labels(alone) is alone
    assert open_source(written(tmp_path, "n.csv", "path,label\n" + lines("{p},\n"))).labels is None


def test_files_of_labels_have_the_same_forms(tmp_path):
    images = open_source(str(tree(tmp_path / "d", *FILES)))
    expected = {"w/red fox/a 1.jpg": "1", "w/red fox/b2.PNG": "0", "w/owl/c.jpeg": "1", "w/owl/d.jpg": "0"}
    for name, text in {
        "a.csv": "path,label\n" + lines("{p},{c}\n", "1010"),
        "b.csv": "label;file\n" + lines("{c};d\\{b}\n", "1010"),
        "c.txt": lines("{p} {c}\n", "1010"),
        "d.csv": "image_id,target\na 1,1\nb2,0\nc,1\nd,0\n",
        "e.csv": "file,label,by\n" + lines("./{p},{c},me\n", "1010"),
    }.items():
        known = read_labels(tmp_path / os.path.basename(written(tmp_path, name, text)), images)
        got = {images.name(int(i)): known.classes[n] for i, n in zip(known.indices, known.numbers, strict=True)}
        assert got == expected, name
    text = "path,label\n" + lines("{p},{c}\n", "1010") + "w/owl/d.jpg,\n"
    known = read_labels(tmp_path / os.path.basename(written(tmp_path, "f.csv", text)), images)
    assert "1 of 5 images have no label" in known.remarks[-1]
    wrong = written(tmp_path, "g.csv", "path,label\n" + lines("{p},{c}\n", "1010") + "xw/owl/d.jpg,1\n")
    with pytest.raises(UserError, match=r"line 6: xw/owl/d\.jpg is none of the images"):
        read_labels(tmp_path / os.path.basename(wrong), images)


# --- tables -------------------------------------------------------------------------------------------------------


def picture(seed, kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (9, 8, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def table(tmp_path, columns, metadata=None, name="t.parquet"):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = pa.table(columns)
    if metadata:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(made, tmp_path / name, row_group_size=3)
    return str(tmp_path / name)


PNGS = [picture(i, "PNG") for i in range(6)]
NOISE = [b"no image %d" % i for i in range(6)]


@pytest.mark.parametrize(
    ("columns", "which"),
    [
        ({"audio": NOISE, "scan": PNGS}, "scan"),
        ({"bytes": NOISE, "scan": [None, *PNGS[1:]]}, "scan"),
        ({"depth": [picture(9)] * 6, "Image": PNGS}, "Image"),
        ({"thumb": [picture(9)] * 6, "img": [{"bytes": b, "path": "x"} for b in PNGS]}, "img"),
        ({"image": NOISE, "mel": NOISE}, "image"),
    ],
)
def test_the_column_of_images_is_told_by_its_bytes(columns, which, tmp_path):
    source = open_source(table(tmp_path, columns))
    last = columns[which][5]
    assert source.read(5) == (last["bytes"] if isinstance(last, dict) else last)
    others = [name for name in columns if name != which and columns[name] is not NOISE]
    assert source.skipped == [] if not others else f"left out: column {others[0]}" in source.skipped[0]


def test_columns_that_do_not_tell_are_named(tmp_path):
    with pytest.raises(UserError, match="columns left and right both hold images; call the one to use image"):
        open_source(table(tmp_path, {"left": PNGS, "right": PNGS}))
    with pytest.raises(UserError, match="has no column of images"):
        open_source(table(tmp_path, {"mel": NOISE, "caption": ["x"] * 6}))


HF = {"Species": {"_type": "ClassLabel", "names": ["wolf", "fox", "owl"]}, "image": {"_type": "Image"}}


@pytest.mark.parametrize(
    ("column", "metadata", "expected", "classes"),
    [
        ({"class": ["owl", "fox", None, "owl", "fox", ""]}, None, ["owl", "fox", "", "owl", "fox", ""], ["fox", "owl"]),
        ({"Label": [2.0, None, 0.0, 2.0, float("nan"), 0.0]}, None, ["2", "", "0", "2", "", "0"], ["0", "1", "2"]),
        ({"Species": [1, 0, -1, 1, None, 0]}, HF, ["fox", "wolf", "", "fox", "", "wolf"], ["wolf", "fox", "owl"]),
        ({"target": [7, 700_000_000, 7, 8, 8, 7]}, None, ["7", "700000000", *"7887"], ["7", "8", "700000000"]),
        ({"label": [-1, 1, 1, -1, -1, 1]}, None, ["-1", "1", "1", "-1", "-1", "1"], ["-1", "1"]),
        ({"label": [-1, 1, 2, -1, 0, 1]}, None, ["", "1", "2", "", "0", "1"], ["0", "1", "2"]),
        ({"y": [True, False] * 3}, None, ["True", "False"] * 3, ["False", "True"]),
        ({"label": [[0], [1, 2]] * 3}, None, None, []),
    ],
)
def test_labels_of_tables(column, metadata, expected, classes, tmp_path):
    source = open_source(table(tmp_path, {"image": PNGS, **column}, metadata))
    assert (labels(source), source.classes) == (expected, classes)
    missing = 0 if expected is None else expected.count("")
    assert bool(source.skipped) == (expected is None or missing > 0)
    assert not missing or f"{missing} of 6 images have no label" in source.skipped[0]


def test_texts_of_several_tables_are_joined(tmp_path):
    pa = pytest.importorskip("pyarrow")
    (tmp_path / "t").mkdir()
    coded = pa.array(["b", "a", "b", "b", "a", "a"]).dictionary_encode()
    table(tmp_path / "t", {"image": PNGS, "label": coded}, name="0.parquet")
    table(tmp_path / "t", {"image": PNGS, "label": ["c", "b", "a", "c", "b", "a"]}, name="1.parquet")
    source = open_source(str(tmp_path / "t"))
    assert labels(source) == ["b", "a", "b", "b", "a", "a", "c", "b", "a", "c", "b", "a"]
    assert (source.classes, source.read(7)) == (["a", "b", "c"], PNGS[1])
