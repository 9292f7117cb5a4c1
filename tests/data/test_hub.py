"""Hugging Face's folders: metadata beside images, names of classes in cards and tables, parts, configurations."""

import io
import json

import numpy as np
import pytest
from conftest import TINY, documented
from doors import refused
from PIL import Image

from mocov3 import cli
from mocov3.data import open_source
from mocov3.data.sources.hub import class_names
from mocov3.errors import UserError

RNG = np.random.Generator(np.random.PCG64(3))
CARD = """---
license: cc0-1.0
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '1': dog
          '0': cat
          '2': emu
---
# A set

---
"""

BOMB = "---\nx0: &x0 [ha, ha, ha, ha]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 8)}]\n" for i in range(1, 20)
)
BOMB += "dataset_info: {features: [{name: label, dtype: {class_label: {names: *x19}}}]}\n---\n"
OTHER_LABEL = """  - name: site
    dtype:
      class_label:
        names:
          '0': here
"""


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (40, 44, 3), np.uint8)).save(path)


def folder(root, files, rows, kind):
    """Images and a metadata file of ``rows``, whose first is that of names."""
    for name in files:
        image(root / name)
    keys, *values = rows
    if kind == "csv":
        text = "\n".join(",".join("" if v is None else str(v) for v in row) for row in rows)
    else:
        text = "\n".join(json.dumps({k: v for k, v in zip(keys, row, strict=True) if v is not None}) for row in values)
    (root / f"metadata.{kind}").write_text(text + "\n")
    return root


def by_name(source):
    return {
        source.name(i): source.classes[label] if label >= 0 else None for i, label in enumerate(source.labels.tolist())
    }


kinds = pytest.mark.parametrize("kind", ["csv", "jsonl"])


@kinds
def test_classes_come_from_the_metadata(kind, tmp_path):
    files = ["3.jpg", "a/1.jpg", "b/2.jpg", "b/4.jpg"]
    rows = [("file_name", "label"), ("b/2.jpg", "x"), ("a/1.jpg", "y"), ("3.jpg", "x"), ("gone.jpg", "y")]
    source = open_source(str(folder(tmp_path / "d", files, rows, kind)))
    assert by_name(source) == {"3.jpg": "x", "a/1.jpg": "y", "b/2.jpg": "x", "b/4.jpg": None}
    said = "\n".join(source.skipped)
    assert "1 of its 4 rows name no image of this part" in said
    assert "1 of 4 images have no label" in said
    assert "not taken for images" not in said  # as of the metadata
    assert "class folders" not in said


@kinds
def test_numbers_have_the_names_of_the_card(kind, tmp_path):
    rows = [("file_name", "label"), ("1.jpg", 2), ("2.jpg", 0), ("3.jpg", 2)]
    root = folder(tmp_path / "d", ["1.jpg", "2.jpg", "3.jpg"], rows, kind)
    assert open_source(str(root)).classes == ["0", "2"]
    (root / "README.md").write_text(CARD)
    source = open_source(str(root))
    assert source.classes == ["cat", "dog", "emu"]  # of dogs there is no image
    assert by_name(source) == {"1.jpg": "emu", "2.jpg": "cat", "3.jpg": "emu"}
    rows = [(name, "cat" if label == 0 else "emu" if label == 2 else label) for name, label in rows]
    assert open_source(str(folder(root, [], rows, kind))).classes == ["cat", "dog", "emu"]  # in the card's order
    rows = [("file_name", "label"), ("1.jpg", 7), ("2.jpg", 0), ("3.jpg", 7)]  # not the card's
    assert open_source(str(folder(root, [], rows, kind))).classes == ["0", "7"]


@kinds
@pytest.mark.parametrize("above", [True, False])
def test_parts_with_metadata_in_them_or_above(kind, above, tmp_path):
    root, files = tmp_path / "d", ["1.jpg", "2.jpg"]
    labels = {"train": ("x", "y"), "test": ("y", "x")}
    for part in labels:
        for name in files:
            image(root / part / name)
    if above:
        rows = [("file_name", "label"), *((f"{p}/{f}", labels[p][i]) for p in labels for i, f in enumerate(files))]
        folder(root, [], rows, kind)
    else:
        for part, names in labels.items():
            folder(root / part, [], [("file_name", "label"), *zip(files, names, strict=True)], kind)
    assert by_name(open_source(str(root))) == {"1.jpg": "x", "2.jpg": "y"}
    assert by_name(open_source(str(root), "val")) == {"1.jpg": "y", "2.jpg": "x"}


def test_metadata_that_are_no_classes_change_nothing(tmp_path):
    files = ["a/1.jpg", "a/2.jpg", "b/3.jpg"]
    for i, text in enumerate(
        (
            "file_name,text\na/1.jpg,a cat\na/2.jpg,a cat\nb/3.jpg,a dog\n",  # captions
            "study,site\n1,2\n1,3\n",
            "no table at all",
            '"',
            "",
        )
    ):
        root = tmp_path / str(i)
        for name in files:
            image(root / name)
        (root / "metadata.csv").write_text(text)
        source = open_source(str(root))
        assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 0, 1])
        assert ("is not used" in "".join(source.skipped)) == (i > 0)


def test_json_lines_are_lists_too(tmp_path):
    rows = [("image", "class", "boxes"), ("1.jpg", 1, [1, 2]), ("2.jpg", 0, None), ("3.jpg", 1, [3])]
    root = folder(tmp_path, ["1.jpg", "2.jpg", "3.jpg"], rows, "jsonl")
    source = open_source(str(root / "metadata.jsonl"))
    assert by_name(source) == {"1.jpg": "1", "2.jpg": "0", "3.jpg": "1"}
    several = [("image", "label"), ("1.jpg", [1, 2]), ("2.jpg", [1, 0]), ("3.jpg", [1])]
    source = open_source(str(folder(tmp_path, [], several, "jsonl") / "metadata.jsonl"))
    assert source.labels is None
    assert "holds several values" in "".join(source.skipped)
    (root / "metadata.jsonl").write_text('{"image": "1.jpg"}\n["2.jpg"]\n')
    assert "line 2 is no JSON object" in refused("check", root / "metadata.jsonl")
    (root / "metadata.jsonl").write_text(json.dumps({str(i): 1 for i in range(2000)}))
    assert "2000 keys" in refused("check", root / "metadata.jsonl")


@pytest.mark.parametrize(
    "text",
    [
        "no head",
        "---\n: [\n---\n",
        "---\ndataset_info: 5\n---\n",
        "---\ndataset_info:\n  features: [1]\n---",
        "---\n&a [*a]\n---\n",
        CARD.replace("'2': emu", "two: emu"),
        BOMB,
        CARD.replace("  - name: image\n    dtype: image\n", OTHER_LABEL),
    ],
)
def test_cards_that_declare_nothing_clear(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert class_names(str(tmp_path)) == []


def test_names_in_infos(tmp_path):
    about = {"features": {"label": {"_type": "ClassLabel", "names": ["u", "v"]}, "image": {"_type": "Image"}}}
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": about}))
    assert class_names(str(tmp_path)) == ["u", "v"]


@pytest.mark.parametrize("place", ["data", "plain_text"])
def test_tables_have_the_names_of_the_card(place, tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / place).mkdir()
    for part, labels in (("train", [1, 0, 1]), ("test", [0, 0])):
        made = []
        for _ in labels:
            file = io.BytesIO()
            Image.fromarray(RNG.integers(0, 256, (40, 44, 3), np.uint8)).save(file, "PNG")
            made.append({"bytes": file.getvalue(), "path": None})
        table = pa.table({"image": made, "label": pa.array(labels, pa.int64())})
        pq.write_table(table, tmp_path / place / f"{part}-00000-of-00001.parquet")
    assert open_source(str(tmp_path)).classes == ["0", "1"]
    (tmp_path / "README.md").write_text(CARD)
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "val")
    assert (train.classes, train.labels.tolist()) == (["cat", "dog", "emu"], [1, 0, 1])
    assert (test.classes, test.labels.tolist()) == (["cat", "dog", "emu"], [0, 0])
    (tmp_path / "README.md").write_text(CARD.replace("          '1': dog\n", "").replace("          '2': emu\n", ""))
    assert open_source(str(tmp_path)).classes == ["0", "1"]  # a card of fewer classes is another set's


def test_the_documented_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 16), ("test", 4)):
        files = [f"{i}.jpg" for i in range(count)]
        rows = [("file_name", "label"), *((name, i % 2) for i, name in enumerate(files))]
        folder(tmp_path / "SET" / part, files, rows, "csv")
    (tmp_path / "SET" / "README.md").write_text(CARD)
    usual = ["-j", "0", "--device", "cpu"]
    more = {"pretrain": [*TINY, "-b", "8"], "knn": usual, "lincls": [*usual, "--epochs", "1", "-b", "8"]}
    lines = documented("## Hugging Face's folders")
    assert len(lines) == 3
    for line in lines:
        argv = line.replace("0099", "0001").split()[1:]
        assert cli.main([*argv, *more[argv[0]]]) == 0, line


def test_a_list_of_nothing_is_refused(tmp_path):
    (tmp_path / "l.jsonl").write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        open_source(str(tmp_path / "l.jsonl"))
