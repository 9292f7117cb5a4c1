"""The labelled data sets of fine-tuning: CIFAR, Oxford Flowers and Pets, class folders, the embedded images.

Layouts are torchvision's, and those that the reference's transfer documentation names (``flowers/jpg`` with
``setid.mat``, ``pets/annotations``). Nothing is fetched.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocov3.data.sources.embedded import FashionMnist
from mocov3.data.sources.findings import findings_of, refuse_one_sided
from mocov3.data.sources.groups import without_shared
from mocov3.data.sources.index import Index
from mocov3.data.sources.labels import matched, with_labels
from mocov3.data.sources.opening import Folder, Source, open_source
from mocov3.data.sources.splits import apart, parts_of
from mocov3.errors import UserError, printable


class Pair(NamedTuple):
    """Images to train on and to test on, with the same classes."""

    train: Source
    test: Source
    per_class: bool
    """Whether the field reports the mean accuracy over classes for this set (Flowers, Pets)."""


def open_pair(data_set: str, path: str, group_by: str = "", labels: str = "") -> Pair:
    """The images of a data set, without those to test on that are of a group (``groups``) that training has.

    Args:
        data_set: ``cifar10 cifar100 flowers pets fashion-mnist``; ``folder`` or ``IMNET`` for PATH/train/CLASS and
            PATH/val/CLASS, or what else ``mocov3.data.sources.splits`` takes for these parts.
        path: where it lies.
        group_by: as ``--group-by``.
        labels: of ``folder`` and ``IMNET``: a file of findings in place of classes (``findings``).

    Raises:
        UserError: naming the file that is missing or damaged, or how classes differ.
    """
    pair = _open(data_set, path, labels)
    where = f"--data-path {path}" if path else f"--data-set {data_set}"
    test = without_shared(pair.test, pair.train, group_by, where)
    refuse_one_sided(test, f"{where} (test)")
    return pair._replace(test=test)


def _open(data_set: str, path: str, labels: str) -> Pair:
    if data_set == "fashion-mnist":
        return Pair(FashionMnist("train", path or None), FashionMnist("val"), False)
    if not path:
        raise UserError(f"--data-path: name the folder of {data_set}")
    if not Path(path).is_dir():
        raise UserError(f"--data-path {path}: there is no such folder")
    if data_set in ("cifar10", "cifar100"):
        return Pair(Cifar(data_set, path, "train"), Cifar(data_set, path, "test"), False)
    if data_set == "flowers":
        return Pair(*_flowers(Path(path)), True)
    if data_set == "pets":
        return Pair(*_pets(Path(path)), True)
    return Pair(*_folders(Path(path), labels), False)


def _folders(root: Path, labels: str) -> tuple[Source, Source]:
    if not apart(str(root)):
        missing = "val or test" if parts_of(str(root)) else "train"
        raise UserError(f"--data-path {root}: misses the folder {missing}, which holds a folder a class")
    train, test = open_source(str(root), "train"), open_source(str(root), "val")
    if labels:
        train, test = findings_of(labels, (train, test))
        return train, test
    for part, name in ((train, "train"), (test, "val")):
        if part.labels is None:
            raise UserError(f"--data-path {root}: {name} has no classes; give each image a class folder, or a label")
    if len(train.classes) < 2:
        raise UserError(f"--data-path {root}: train holds {len(train.classes)} class; two or more are needed")
    return with_labels(train), matched(train.classes, test, f"--data-path {root}")


# --- CIFAR (Krizhevsky 2009) --------------------------------------------------------------------------------

_CIFAR: dict[str, dict[str, Any]] = {
    "cifar10": {
        "folder": "cifar-10-batches-py",
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
        "labels": "labels",
        "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        "torchvision": "CIFAR10",
    },
    "cifar100": {
        "folder": "cifar-100-python",
        "train": ["train"],
        "test": ["test"],
        "labels": "fine_labels",
        "classes": [str(i) for i in range(100)],
        "torchvision": "CIFAR100",
    },
}


class Cifar:
    """CIFAR-10 or CIFAR-100 in the layout of its Python version, which torchvision keeps: 32×32 RGB."""

    def __init__(self, data_set: str, root: str, split: str) -> None:
        self.data_set, self.root, self.split = data_set, root, split
        about = _CIFAR[data_set]
        folder = Path(root) if Path(root).name == about["folder"] else Path(root) / about["folder"]
        parts = [_cifar_file(folder / name, about) for name in about[split]]
        self.images = np.concatenate([images for images, _ in parts])
        self.labels: np.ndarray | None = np.concatenate([labels for _, labels in parts])
        self.classes: list[str] = about["classes"]

    def __reduce__(self) -> tuple[Any, tuple[str, str, str]]:
        return Cifar, (self.data_set, self.root, self.split)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """sha256 of the pixels."""
        import hashlib

        return hashlib.sha256(self.images.data).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """uint8 pixels, (32, 32, 3)."""
        pixels: np.ndarray = self.images[index]
        return pixels

    def name(self, index: int) -> str:
        """The image's number in its split."""
        return f"{self.data_set}/{self.split}/{index}"


class _Arrays(pickle.Unpickler):
    """Only numpy arrays may be rebuilt: a file of CIFAR needs nothing else, and nothing in it can run."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which no file of CIFAR does")


def _cifar_file(path: Path, about: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        archive = next((a for a in path.parent.parent.glob("cifar-*.tar.gz")), None)
        cure = (
            f"unpack {archive.name}"
            if archive
            else f"torchvision.datasets.{about['torchvision']}(PATH, download=True) fetches it"
        )
        raise UserError(f"--data-path: {path} is missing; {cure}")
    try:
        with path.open("rb") as file:
            contents = _Arrays(file, encoding="latin1").load()
        images = np.asarray(contents["data"])
        labels = np.asarray(contents[about["labels"]], dtype=np.int32)
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or len(images) != len(labels):
            raise ValueError(f"data is {images.dtype} {images.shape} with {len(labels)} labels")
    except Exception as error:  # a damaged pickle can raise anything
        reason = printable(str(error))[:150]
        raise UserError(f"--data-path: {path} is damaged or no file of CIFAR ({reason}); fetch it again") from None
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(about["classes"]):
        raise UserError(f"--data-path: {path} holds labels beyond its {len(about['classes'])} classes")
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


# --- Oxford Flowers-102 (Nilsback & Zisserman 2008) -----------------------------------------------------------


def _flowers(path: Path) -> tuple[Source, Source]:
    root = _root(path, ("flowers", "flowers-102"), ("jpg", "setid.mat", "imagelabels.mat"))
    if find_spec("scipy") is None:
        raise UserError("--data-set flowers: its .mat files need scipy: pip install 'mocov3[flowers]'")
    splits = _mat(root / "setid.mat", ("trnid", "valid", "tstid"))
    (labels,) = _mat(root / "imagelabels.mat", ("labels",))
    _in_range(labels, 102, root / "imagelabels.mat", "labels")
    for ids in splits:
        _in_range(ids, len(labels), root / "setid.mat", "numbers of images")
    # as the reference: trained on the training and validation parts
    train, test = np.concatenate(splits[:2]), splits[2]
    classes = [str(i) for i in range(102)]

    def part(ids: np.ndarray) -> Folder:
        return _listed(root / "jpg", [f"image_{i:05d}.jpg" for i in ids], labels[ids - 1] - 1, classes)

    return part(train), part(test)


def _mat(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    from scipy.io import loadmat

    try:
        contents = loadmat(path)
        return [np.asarray(contents[name]).reshape(-1).astype(np.int64) for name in names]
    except KeyError as error:
        raise UserError(f"--data-path: {path} has no entry {error}; it is not the file of Flowers-102") from None
    except Exception as error:  # scipy raises many kinds for damaged files
        raise UserError(f"--data-path: {path} is damaged ({type(error).__name__}); fetch it again") from None


# --- Oxford-IIIT Pets (Parkhi et al. 2012) --------------------------------------------------------------------


def _pets(path: Path) -> tuple[Source, Source]:
    root = _root(path, ("pets", "oxford-iiit-pet"), ("images", "annotations"))
    lists = [_pets_list(root / "annotations" / name) for name in ("trainval.txt", "test.txt")]
    names: dict[int, str] = {}
    for images, labels in lists:
        for image, label in zip(images, labels.tolist(), strict=True):
            names.setdefault(label, image.rsplit("_", 1)[0])
    classes = [names.get(label, str(label)) for label in range(37)]
    train, test = (_listed(root / "images", [f"{p}.jpg" for p in images], labels, classes) for images, labels in lists)
    return train, test


def _pets_list(path: Path) -> tuple[list[str], np.ndarray]:
    if not path.is_file():
        raise UserError(f"--data-path: {path} is missing; it is in annotations.tar.gz of the Pets' homepage")
    try:
        rows = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
        images, labels = [row[0] for row in rows], np.array([int(row[1]) for row in rows], dtype=np.int64)
    except (ValueError, IndexError):
        raise UserError(f"--data-path: {path} is not a list 'NAME CLASS SPECIES BREED'; fetch it again") from None
    _in_range(labels, 37, path, "classes")
    return images, (labels - 1).astype(np.int32)


# --- what both have in common ----------------------------------------------------------------------------------


def _root(path: Path, names: tuple[str, ...], entries: tuple[str, ...]) -> Path:
    """The folder that holds ``entries``: ``path`` itself or one of ``names`` below it."""
    candidates = [path, *(path / name for name in names)]
    best = max(candidates, key=lambda place: sum((place / entry).exists() for entry in entries))
    missing = [entry for entry in entries if not (best / entry).exists()]
    if missing:
        raise UserError(f"--data-path {path}: {best / missing[0]} is missing; wanted there: {', '.join(entries)}")
    return best


def _in_range(values: np.ndarray, largest: int, path: Path, what: str) -> None:
    if not len(values) or values.min() < 1 or values.max() > largest:
        holds = f"{values.min()} to {values.max()}" if len(values) else "none"
        raise UserError(f"--data-path: {path} should hold {what} from 1 to {largest}, not {holds}")


def _listed(folder: Path, files: list[str], labels: np.ndarray, classes: list[str]) -> Folder:
    present = _names(folder)
    if missing := [file for file in files if file not in present]:
        raise UserError(f"--data-path: {len(missing)} listed images are missing, first {folder / missing[0]}")
    index = Index.build([file.encode() for file in files], labels.astype(np.int32))
    return Folder(str(folder), index, classes)


def _names(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir())
