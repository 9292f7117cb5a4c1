"""What Hugging Face's data sets say beside their images: ``metadata.csv`` or ``.jsonl``, and names of classes.

A metadata file lies in the folder of the images or of the part, or above the parts, and names each image below it
(``file_name``) with its class (``label``). Names of numbered classes are in the YAML at the head of ``README.md``
(``dataset_info``), or in ``dataset_infos.json``.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mocov3.data.sources.classes import numbered, remarks_on_missing
from mocov3.data.sources.index import Index
from mocov3.data.sources.rows import LABEL_COLUMNS, Place, read_rows
from mocov3.errors import UserError, printable

FILES = ("metadata.csv", "metadata.jsonl")
_MOST_TEXT = 1 << 22  # characters of a card


def labelled(root: str, place: str, index: Index, names: list[str]) -> tuple[Index, list[str], list[str]] | None:
    """The images of a folder with the classes that a metadata file gives them, and remarks; ``None`` without one.

    Args:
        root: the data set's folder.
        place: that of its part, or the same.
        index: the images below ``place``.
        names: of the classes that are declared, in order.
    """
    below = os.path.relpath(place, root)
    folders = {place: b"", root: b"" if below == os.curdir else os.fsencode(below.replace(os.sep, "/")) + b"/"}
    for folder, prefix in folders.items():
        for file in (Path(folder, name) for name in FILES):
            if file.is_file():
                return _by(file, prefix, index, names)
    return None


def _by(file: Path, prefix: bytes, index: Index, names: list[str]) -> tuple[Index, list[str], list[str]] | None:
    paths = [index.path(i) for i in range(len(index))]
    known = {prefix + path: path for path in paths}
    try:
        rows = read_rows(file, iter([Place(known.get, looked_up=True)]), labels_in=LABEL_COLUMNS)
    except UserError as error:
        return index, [], [f"{error}; it is not used"]
    if not rows.found:
        return index, [], [printable(f"{file}: names no image here; it is not used")]
    label_of = {path: label for path, label in zip(rows.paths, rows.labels, strict=True) if label}
    found = [label_of.get(path, "") for path in paths]
    if not any(found):
        return None
    numbers, classes = _numbered(found, names)
    remarks = [*rows.remarks, *remarks_on_missing(str(file), numbers)]
    if others := len(set(rows.paths) - set(paths)):
        remarks.append(f"{file}: {others} of its {len(rows.paths)} rows name no image of this part")
    return Index.build(paths, numbers), classes, [printable(line) for line in remarks]


def _numbered(labels: list[str], names: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """int32 class of each label, and names of the classes: those declared, where the labels are these or numbers."""
    used = set(labels) - {""}
    for spelled in (names, [str(i) for i in range(len(names))]):
        if used <= set(spelled):
            number = {"": -1} | {name: i for i, name in enumerate(spelled)}
            return np.array([number[label] for label in labels], np.int32), names
    return numbered(labels)


def class_names(root: str) -> list[str]:
    """Names of the classes that a data set declares beside its files, in order; empty where they are not clear."""
    for read in (_of_card, _of_infos):
        try:
            found = {tuple(names) for names in read(Path(root))}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, RecursionError):
            continue  # a card is prose with any head
        if len(found) == 1:
            return list(found.pop())
    return []


def _of_card(root: Path) -> Iterator[list[str]]:
    with (root / "README.md").open(encoding="utf-8") as file:
        text = file.read(_MOST_TEXT)
    if not text.startswith("---\n"):
        return
    head = yaml.safe_load(text[4:].split("\n---", 1)[0])
    infos = head["dataset_info"]
    for info in infos if isinstance(infos, list) else [infos]:
        for feature in info["features"]:
            kind = feature.get("dtype")
            if isinstance(kind, dict) and "class_label" in kind:
                yield _in_order(kind["class_label"]["names"])


def _of_infos(root: Path) -> Iterator[list[str]]:
    text = (root / "dataset_infos.json").read_text(encoding="utf-8")
    for info in json.loads(text).values():
        for feature in info["features"].values():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
                yield _in_order(feature["names"])


def _in_order(names: Any) -> list[str]:
    """Names by their numbers, which a card has as keys."""
    values: Iterable[Any] = names
    if isinstance(names, dict):
        values = [names[key] for key in sorted(names, key=int)]
    found = list(values)
    if not all(isinstance(name, str | int | float) for name in found):  # lists of lists may unfold to any length
        raise TypeError("names of classes are texts or numbers")
    return [str(name) for name in found]
