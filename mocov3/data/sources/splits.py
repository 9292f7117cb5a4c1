"""Which files and folders of a data folder are its training, validation and test part: the one owner of that rule.

A folder, archive or table belongs to a part by its name. The name of a folder has no other letters than the word
(``train``, ``Val``, ``train2017``); that of an archive or table holds the word between characters that are no letters,
as Hugging Face has it (``train-00000-of-00001.parquet``, ``imagenet-val-000.tar``). Names of single images are ignored.
A folder with such a name may be a class too (a set of vehicles has a class ``train``), so it is a part only where the
folders beside it do not look like classes too (``_are_parts``).
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

from mocov3.data.sources.contents import Contents, has_class_folders, holds, look, number
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.errors import UserError, printable

_PARTS = ("train", "val", "test")
_TITLES = {"train": "training", "val": "validation", "test": "test", "": "of no part"}
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
_LETTERS = re.compile(r"[^\W\d_]+")
_ABOUT_IMAGES = {"annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentations"}
_NAMED = 3
_MOST_ASKED = 100


@dataclass(frozen=True)
class Part:
    """Images that are one part of a data folder, or all of it."""

    place: str
    """The folder."""
    files: tuple[str, ...] = ()
    """Its archives or tables; empty where the images below it are meant."""
    without: tuple[str, ...] = ()
    """Subfolders that are other parts."""
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What is left out or remarkable, a line each."""


def split_of_folder(name: str) -> str | None:
    """The part that a folder's name says: its letters are the word."""
    words = _LETTERS.findall(name.lower())
    return _WORDS.get(words[0]) if len(words) == 1 else None


def split_of_file(name: str) -> str | None:
    """The part that the name of an archive or table says: the last such word that no letter touches."""
    stem = os.path.basename(name).lower().rpartition(".")[0]
    words = [_WORDS[word] for word in _LETTERS.findall(stem) if word in _WORDS]
    return words[-1] if words else None


def choose(folder: str, split: str) -> Part | None:
    """The part ``split`` (``train`` or ``val``) of a folder; ``None`` where it has none.

    ``train`` is the training part where there is one, else all that belongs to no other part; a folder with one part
    only is used whole. ``val`` is the validation part, else the test part.

    Raises:
        UserError: if names of parts do not tell which is meant.
    """
    top = look(folder)
    named = {name: word for name in top.folders if (word := split_of_folder(name))}
    if not named:
        return _whole(folder, split, top)
    holding = {name: word for name, word in named.items() if holds(folder, name)}
    others = [name for name in top.folders if name not in named and holds(folder, name)]
    if _are_parts(folder, named, holding, others):
        return _of_folders(folder, split, named, holding, others, top)
    part = _whole(folder, split, top)
    return part and replace(part, remarks=(*_as_classes(folder, named, holding, others), *part.remarks))


def no_part(folder: str, split: str) -> UserError:
    """The error that says why a folder has no such part."""
    place = os.path.join(folder, split)
    if not os.path.isdir(place):
        return UserError(f"data {place}: there is no such folder, and no other with validation or test images")
    if not holds(place):
        return UserError(f"data {place}: holds no image ({', '.join(EXTENSIONS[:10])} …)")
    return UserError(
        f"data {folder}: {split}/ looks like a class among others, not like the validation part; "
        "put the classes into train/ beside it"
    )


def apart(folder: str) -> bool:
    """Whether a folder has validation or test images that are not those it is trained on."""
    val = choose(folder, "val")
    try:
        return val is not None and val != choose(folder, "train")
    except UserError:  # no training part: said where that is wanted
        return True


def parts_of(folder: str) -> list[str]:
    """``train`` and ``val``, where a folder has them apart; ``train`` alone where only that is named; else nothing."""
    train = choose(folder, "train")
    if apart(folder):
        return ["train", "val"]
    return (
        ["train"]
        if train
        and os.path.abspath(train.place) != os.path.abspath(folder)
        and (split_of_folder(os.path.basename(train.place)) == "train")
        else []
    )


def remark_on_mix(pattern: str, files: list[str]) -> list[str]:
    """A line where files that the user named are of several parts: they are taken as named."""
    counts = _by_part(files)
    if len([name for name in counts if name]) < 2:
        return []
    return [f"{pattern}: names files of several parts ({_counted(counts)}); all are used, as named"]


# --- parts by folders -------------------------------------------------------------------------------------------


def _are_parts(folder: str, named: dict[str, str], holding: dict[str, str], others: list[str]) -> bool:
    """Whether folders named as parts are parts, and not classes.

    They are if two different ones hold images (or an empty ``train`` lies beside one that does); if one is the only
    subfolder that holds images; or if it holds class folders and none of those beside it does.
    """
    kinds = set(holding.values())
    if not holding or len(kinds | ({"train"} & set(named.values()))) > 1:
        return bool(holding)
    if len(holding) > 1 and not kinds & set(holding):
        return False  # train1, train2 …
    equals = [name for name in others if name.lower() not in _ABOUT_IMAGES]
    if not equals:
        return True
    nested = all(has_class_folders(os.path.join(folder, name)) for name in holding)
    return nested and not any(has_class_folders(os.path.join(folder, name)) for name in equals)


def _of_folders(
    folder: str, split: str, named: dict[str, str], holding: dict[str, str], others: list[str], top: Contents
) -> Part | None:
    """The part that is meant, of a folder whose subfolders are parts."""
    kinds = [kind for kind in _PARTS if kind in holding.values()]
    if split == "val":
        if not {"val", "test"} & set(kinds):
            return None
        kind = "val" if "val" in kinds else "test"
        name = _one(folder, kind, holding)
        said = [f"{folder}: has no validation part; the test part is used, {name}/"] if kind == "test" else []
        if more := [f"{n}/" for n, word in holding.items() if word == kind and n != name]:
            said.append(f"{folder}: left out beside {name}/: {_listed(more)}")
        return _inside(folder, name, kind, said)
    if "train" in named.values():
        name = _one(folder, "train", holding if "train" in kinds else named)
        more = [n for n, word in holding.items() if word == "train" and n != name]
        return _inside(folder, name, "train", _beside(folder, more + others, top))
    if others or top.images or top.packed:
        names = _listed(f"{name}/" for name in holding)
        said = [f"{folder}: {names} left out of training, as named for another part; all else is used"]
        whole = _whole(folder, split, top)
        assert whole is not None
        return replace(whole, without=() if whole.files else tuple(sorted(holding)), remarks=(*said, *whole.remarks))
    if len(kinds) > 1:
        raise UserError(f"data {folder}: holds {_listed(f'{n}/' for n in holding)} and no train/; name the one to use")
    name = _one(folder, kinds[0], holding)
    return _inside(folder, name, kinds[0], [f"{folder}: has no training part; {name}/ is used"])


def _one(folder: str, kind: str, names: dict[str, str]) -> str:
    """The folder of a part: the one called just so, or the only one."""
    folders = [name for name, word in names.items() if word == kind]
    if kind not in folders and len(folders) > 1:
        raise UserError(
            f"data {folder}: {_listed(f'{n}/' for n in folders)} are named for the {_TITLES[kind]} part; "
            "name the one to use"
        )
    return kind if kind in folders else folders[0]


def _inside(folder: str, name: str, kind: str, said: list[str]) -> Part:
    """A subfolder that is a part: all of it, but for files that are named for another."""
    place = os.path.join(folder, name)
    contents = look(place)
    parts = _by_part(contents.packed)
    files = parts.get(kind) or parts.get("") or contents.packed
    if rest := [file for file in contents.packed if file not in files]:
        said = [
            *said,
            f"{place}: {len(files)} of {len(contents.packed)} files are used; left out: {_counted(_by_part(rest))}",
        ]
    others = [inner for inner in contents.folders if files and holds(place, inner)]
    return Part(place, tuple(files), (), (*said, *(_beside(place, others, contents, within=True) if files else ())))


def _beside(folder: str, others: list[str], top: Contents, *, within: bool = False) -> list[str]:
    """A line on what is left out: folders and files beside parts, or images beside archives."""
    left = [f"{name}/ ({number(os.path.join(folder, name))})" for name in others[:_NAMED]]
    left += [f"{len(others) - _NAMED} more folders"] if len(others) > _NAMED else []
    left += [f"{top.images} images directly in it"] if top.images else []
    left += [f"{len(top.packed)} archives or tables directly in it"] if top.packed and not within else []
    why = "beside archives or tables" if within else "as of no part"
    said = [f"{folder}: left out, {why}: {', '.join(left)}"] if left else []
    # lists of classes, texts and the like lie beside archives
    return said + [f"{folder}: {line}" for line in top.left_out.lines(others=False)] if within else said


def _as_classes(folder: str, named: dict[str, str], holding: dict[str, str], others: list[str]) -> list[str]:
    if not holding:
        empty = [f"{name}/" for name, word in named.items() if word == "train"]
        return [f"{folder}: {_listed(empty)} holds no image; all else is used"] if empty else []
    names = _listed(f"{name}/" for name in holding)
    equals = _listed(f"{name}/" for name in others) or "each other"
    first = os.path.join(folder, next(iter(holding)))
    return [f"{folder}: {names} taken for a class, like {equals}; if it is a part of the data, name {first}"]


# --- parts by files, and the whole ------------------------------------------------------------------------------


def _whole(folder: str, split: str, top: Contents) -> Part | None:
    """A folder without part folders: its archives or tables, or those of its only folder with any (as on Hugging Face:
    data/, or a configuration's), or its images."""
    if top.packed:
        others = [name for name in top.folders if not split_of_folder(name) and holds(folder, name)]
        return _of_files(folder, split, top.packed, _beside(folder, others, top, within=True))
    holding = [] if top.images else list(islice((name for name in top.folders if holds(folder, name)), 2))
    if len(holding) == 1:
        inner = os.path.join(folder, holding[0])
        contents = look(inner)
        if contents.packed:
            return _whole(inner, split, contents)
    return Part(folder, (), (), tuple(_deeper(folder, top))) if split == "train" else None


def _deeper(folder: str, top: Contents) -> list[str]:
    """A line where parts lie a level deeper, as of an unpacked archive with a folder of its own: they are not told."""
    for name in top.folders[:_MOST_ASKED]:
        words = [
            word for word in _WORDS if any(os.path.isdir(os.path.join(folder, name, w)) for w in (word, word.title()))
        ]
        if len({_WORDS[word] for word in words}) > 1:
            parts = _listed(f"{name}/{word}/" for word in words)
            return [f"{folder}: {parts} are used alike; for the training part alone, name {os.path.join(folder, name)}"]
    return []


def _of_files(folder: str, split: str, files: list[str], said: list[str]) -> Part | None:
    """The files of a part."""
    parts = _by_part(files)
    kinds = [kind for kind in _PARTS if kind in parts]
    if split == "val":
        if not {"val", "test"} & set(kinds):
            return None
        kind = "val" if "val" in kinds else "test"
    else:
        kind = "train" if "train" in kinds else "" if "" in parts else kinds[0]
        if kind not in ("train", "") and len(kinds) > 1:
            raise UserError(
                f"data {folder}: holds files of the parts {_listed(kinds)} and none of train; name the files to use"
            )
        if len(parts) > 1:
            rest = {other: names for other, names in parts.items() if other != kind}
            used = f"{len(parts[kind])} of {len(files)} files are used ({_TITLES[kind]})"
            said = [f"{folder}: {used}; left out: {_counted(rest)}", *said]
    if kind not in (split, "") and split_of_folder(os.path.basename(os.path.abspath(folder))) != kind:
        said = [f"{folder}: has no {_TITLES[split]} part; the {_TITLES[kind]} part is used", *said]
    return Part(folder, tuple(parts[kind]), (), tuple(said))


def _by_part(files: Iterable[str]) -> dict[str, list[str]]:
    """Files by part; "" for those whose names say none."""
    parts: dict[str, list[str]] = {}
    for file in files:
        parts.setdefault(split_of_file(file) or "", []).append(file)
    return parts


def _counted(parts: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(files)} {_TITLES[kind]}" for kind, files in sorted(parts.items()))


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    text = ", ".join(all_names[:_NAMED]) + (f" and {len(all_names) - _NAMED} more" if len(all_names) > _NAMED else "")
    return printable(text)
