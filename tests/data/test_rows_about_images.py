"""Which images the rows of a CSV file are about: parts whose files share their names, other machines, private paths."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from mocov3.data import open_source
from mocov3.data.sources.findings import known_findings, names_findings
from mocov3.data.sources.groups import groups_of
from mocov3.data.sources.labels import read_labels
from mocov3.data.sources.table import read_table
from mocov3.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two parts of eight files each, called alike."""
    folder = tmp_path_factory.mktemp("set")
    for part in ("train", "val"):
        for i in range(8):
            place = folder / part / "scans"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(place / f"img{i}.png")
    return folder


def written(tmp_path, lines, header="path,label"):
    file = tmp_path / "rows.csv"
    file.write_text("\n".join([header, *lines]) + "\n")
    return file


def parts_of(data):
    return open_source(str(data), "train"), open_source(str(data), "val")


@pytest.mark.parametrize("before", ["", "FOLDER/", "/of/another/machine/"])
def test_a_row_names_its_own_part(before, data, tmp_path):
    before = before.replace("FOLDER", str(data))
    file = written(tmp_path, [f"{before}{part}/scans/img{i}.png,{part}" for part in ("train", "val") for i in range(8)])
    found = read_table(file, parts_of(data), "--labels").images
    assert found == [[i] for i in range(16)]
    groups = groups_of(parts_of(data), f"{file}:label")
    assert [len(np.unique(part)) for part in groups] == [1, 1]
    assert groups[0][0] != groups[1][0]


@pytest.mark.parametrize("before", ["", "/of/another/machine/"])
def test_rows_of_another_part_are_about_no_image(before, data, tmp_path):
    file = written(tmp_path, [f"{before}train/scans/img{i}.png,{i % 2}" for i in range(8)])
    for place in (data / "val", data / "val" / "scans"):
        with pytest.raises(UserError, match="names none of the 8 images"):
            read_labels(file, open_source(str(place)))
    assert len(read_labels(file, open_source(str(data / "train"))).indices) == 8
    assert len(read_labels(file, open_source(str(data / "train" / "scans"))).indices) == 8


def test_classes_of_both_parts_are_taken_for_one(data, tmp_path):
    file = written(
        tmp_path, [f"{p}/scans/img{i}.png,{(i + (p == 'val')) % 2}" for p in ("train", "val") for i in range(8)]
    )
    train, val = parts_of(data)
    for images, others, first in ((train, (val,), 0), (val, (train,), 1)):
        labels = read_labels(file, images, others=others)
        assert labels.numbers.tolist() == [(i + first) % 2 for i in range(8)]
    with pytest.raises(UserError, match="is none of the images judged"):
        read_labels(file, train)


def test_a_folder_that_was_renamed_is_found_by_what_follows(data, tmp_path):
    file = written(tmp_path, [f"C:\\photos\\scans\\img{i}.png,{i % 2}" for i in range(8)])
    assert read_labels(file, open_source(str(data / "train"))).numbers.tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("path,effusion,nodule", "1,", True),  # nothing known of one of them
        ("path,effusion,nodule", ",", False),
        ("path,effusion", "1", False),  # as well two classes
        ("path,label,nodule", "1,0", False),
    ],
)
def test_what_counts_as_findings(header, row, expected, data, tmp_path):
    file = written(tmp_path, [f"scans/img{i}.png,{row}" for i in range(8)], header)
    assert names_findings(str(file), [open_source(str(data / "train"))], "--labels") == expected


def test_what_is_wrong_is_said(data, tmp_path):
    train = open_source(str(data / "train"))
    file = written(tmp_path, [f"scans/img{i}.png,1,2" for i in range(8)], "path,effusion,nodule")
    with pytest.raises(UserError, match=r"holds no labels; .*\(its columns: path, effusion, nodule\)"):
        read_labels(file, train)
    with pytest.raises(UserError, match="line 2, column nodule: holds 2; write 1, 0 or nothing"):
        known_findings(f"{file}:effusion,nodule", [train])
    file = written(tmp_path, [f"scans/img{i}.png,1,0" for i in range(8)], "path,effusion,Effusion")
    with pytest.raises(UserError, match="several columns are called effusion"):
        known_findings(f"{file}:effusion", [train])


class Private:
    """Images whose paths are not to be shown."""

    labels, classes, digest = None, [], ""

    def __len__(self):
        return 4

    def read(self, index):
        raise OSError

    def name(self, index):
        return f"hash{index}"

    def path_name(self, index):
        return f"Smith/{index}.dcm"


def test_nothing_of_private_rows_is_shown(tmp_path):
    for lines, header in (
        (["Smith/0.dcm,Anna"], "path,effusion"),
        (["Smith/0.dcm,Anna", "Smith/0.dcm,Berta"], "path,label"),
        (["Smith/7.dcm,Anna", "Smith/0.dcm,Berta"], "path,label"),
        (["Smith/7.dcm,Anna"], "path,label"),
    ):
        file = written(tmp_path, lines, header)
        ask = partial(read_labels, file, Private())
        if "label" not in header:
            ask = partial(known_findings, f"{file}:effusion", [Private()])
        with pytest.raises(UserError) as caught:
            ask()
        assert not any(word in str(caught.value) for word in ("Smith", "Anna", "Berta"))
