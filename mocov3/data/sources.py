"""Where pictures come from: folders on disk, or the embedded Fashion-MNIST. Reading is by index.

A folder's index (relative paths and labels) is one array; large ones are written to the cache folder and memory-
mapped, so that loader processes share them.
"""

import gzip
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mocov3.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
BUILT_IN = "fashion-mnist"
_SHARE_FROM = 8 << 20  # bytes of index from which processes share one memory-mapped file
_EMBEDDED = Path(__file__).parent / "fashion_mnist"
_PRETRAINING = 8000  # pictures 0–7,999 are for training, the rest is the test split


@runtime_checkable
class Source(Protocol):
    """Pictures by index. Sent to loader processes, so it must pickle to something small."""

    @property
    def labels(self) -> np.ndarray | None:
        """int32 class of every picture, or ``None``."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""

    @property
    def digest(self) -> str:
        """sha256 over names and labels: tells whether a resumed run sees the same pictures."""

    def __len__(self) -> int:
        """Number of pictures."""

    def read(self, index: int) -> bytes | np.ndarray:
        """File bytes or uint8 pixels of a picture. Raises OSError if the file is gone."""

    def name(self, index: int) -> str:
        """What to call the picture in messages."""


def open_source(data: str, split: str = "train") -> Source:
    """The pictures named by ``data``: a folder, archives or tables (of ``mocov3.data.shards`` and ``parquet``), or the
    built-in ``fashion-mnist[:ROOT]``.

    For a folder, ``train`` is DIR/train where it exists, else DIR itself; ``val`` is DIR/val.

    Raises:
        UserError: if there is no such folder or no picture in it.
    """
    name, _, root = data.partition(":")
    if name == BUILT_IN and not Path(data).exists():
        return FashionMnist(split, root or None)
    from mocov3.data.packed import open_packed

    folder = Path(data)
    if packed := open_packed(data, split):
        return packed
    if not data:
        raise UserError("no data: name a folder of pictures, or fashion-mnist")
    if not folder.exists():
        raise UserError(f"data {data}: there is no such folder; name a folder of pictures, or fashion-mnist")
    if not folder.is_dir():
        raise UserError(f"data {data}: is not a folder; name the folder that holds the pictures")
    if split == "val" or (folder / split).is_dir():
        folder = folder / split
    return scan(folder)


def scan(folder: Path) -> "Folder":
    """Index of every picture below ``folder``, sorted by path; its subfolders are the classes.

    Raises:
        UserError: if the folder is missing, unreadable, or holds no picture.
    """
    if not folder.is_dir():
        raise UserError(f"data {folder}: there is no such folder")
    failures: list[OSError] = []
    paths: list[bytes] = []
    root = os.fsencode(folder)
    extensions = tuple(e.encode() for e in EXTENSIONS)
    for place, folders, files in os.walk(root, followlinks=True, onerror=failures.append):
        folders.sort()
        relative = os.path.relpath(place, root)
        prefix = b"" if relative == b"." else relative + b"/"
        paths += [prefix + f for f in files if f.lower().endswith(extensions)]
    if failures and not paths:
        raise UserError(f"data {folder}: cannot be read ({failures[0].strerror})")
    if not paths:
        raise UserError(f"data {folder}: holds no picture ({', '.join(EXTENSIONS)})")
    paths.sort()
    heads = [p.split(b"/", 1)[0] if b"/" in p else b"" for p in paths]
    classes = sorted(set(heads))
    labels = None
    if b"" not in classes:
        number = {c: i for i, c in enumerate(classes)}
        labels = np.array([number[h] for h in heads], dtype=np.int32)
    names = [os.fsdecode(c) for c in classes] if labels is not None else []
    return Folder(os.fsdecode(root), Index.build(paths, labels), names)


@dataclass
class Index:
    """Paths and labels in one uint8 array: count, offsets (int64), labels (int32, −1 for none), path bytes."""

    array: np.ndarray
    file: str | None = None

    @classmethod
    def build(cls, paths: list[bytes], labels: np.ndarray | None) -> "Index":
        """Pack ``paths``; above a size the array is a memory-mapped file of the cache folder."""
        offsets = np.zeros(len(paths) + 1, dtype=np.int64)
        np.cumsum([len(p) for p in paths], out=offsets[1:])
        numbers = np.full(len(paths), -1, dtype=np.int32) if labels is None else labels
        parts = [
            np.array([len(paths)], dtype=np.int64),
            offsets,
            numbers,
            np.frombuffer(b"".join(paths), np.uint8),
        ]
        array = np.concatenate([p.view(np.uint8) for p in parts])
        index = cls(array)
        return index.shared() if array.nbytes >= _SHARE_FROM else index

    def shared(self) -> "Index":
        """The same index as a memory-mapped file, which pickles to its name."""
        file = cache_folder() / f"index-{self.digest[:32]}.npy"
        if not file.exists():
            partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
            with partial.open("wb") as f:
                np.save(f, self.array)
            os.replace(partial, file)
        return Index(np.load(file, mmap_mode="r"), str(file))

    def __getstate__(self) -> dict[str, object]:
        return {"array": None if self.file else self.array, "file": self.file}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.file = state["file"]  # type: ignore[assignment]
        self.array = np.load(self.file, mmap_mode="r") if self.file else state["array"]  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self.array[:8].view(np.int64)[0])

    def path(self, index: int) -> bytes:
        """Relative path of a picture."""
        n = len(self)
        start, end = self.array[8 : 16 + 8 * n].view(np.int64)[index : index + 2].tolist()
        base = 16 + 12 * n
        return self.array[base + start : base + end].tobytes()

    @property
    def labels(self) -> np.ndarray | None:
        """int32 classes, or ``None`` where there are none."""
        n = len(self)
        labels = self.array[16 + 8 * n : 16 + 12 * n].view(np.int32)
        return None if n and labels[0] < 0 else labels

    @property
    def digest(self) -> str:
        """sha256 of the whole index."""
        return hashlib.sha256(np.ascontiguousarray(self.array).data).hexdigest()


@dataclass
class Folder:
    """Pictures below a folder."""

    root: str
    index: Index
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every picture, or ``None``."""
        return self.index.labels

    @property
    def digest(self) -> str:
        """sha256 over names and labels."""
        return self.index.digest

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        with open(os.path.join(os.fsencode(self.root), self.index.path(index)), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        """The path below the folder."""
        return os.fsdecode(self.index.path(index))


class FashionMnist:
    """The embedded 10,000 test pictures of Fashion-MNIST (Zalando SE, MIT): 28×28 grey, 10 classes.

    ``train`` holds pictures 0–7,999, ``val`` 8,000–9,999. With ``root``, a folder in torchvision's layout, the
    60,000 training pictures come first in ``train``.
    """

    classes: list[str] = [  # noqa: RUF012 (never changed)
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ]  # fmt: skip

    def __init__(self, split: str = "train", root: str | None = None) -> None:
        self.split, self.root = split, root
        images = _idx(_EMBEDDED / "t10k-images-idx3-ubyte.gz")
        labels = _idx(_EMBEDDED / "t10k-labels-idx1-ubyte.gz")
        part = slice(0, _PRETRAINING) if split == "train" else slice(_PRETRAINING, None)
        images, labels = images[part], labels[part]
        if root is not None and split == "train":
            raw = Path(root) / "FashionMNIST" / "raw"
            more = (
                _idx(_either(raw / "train-images-idx3-ubyte")),
                _idx(_either(raw / "train-labels-idx1-ubyte")),
            )
            if more[0].shape[1:] != images.shape[1:] or len(more[0]) != len(more[1]):
                raise UserError(f"data {raw}: the files do not hold 28×28 pictures with as many labels")
            images, labels = np.concatenate([more[0], images]), np.concatenate([more[1], labels])
        self.images = images
        self.labels: np.ndarray | None = labels.astype(np.int32)

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return FashionMnist, (self.split, self.root)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """uint8 pixels, (28, 28)."""
        return self.images[index]

    def name(self, index: int) -> str:
        """The picture's number in its split."""
        return f"fashion-mnist/{self.split}/{index}"


def _either(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.exists():
            return candidate
    raise UserError(f"data {path}: is missing (nor is it there as .gz); torchvision's FashionMNIST writes it")


def _idx(path: Path) -> np.ndarray:
    """An array of LeCun's IDX format, gzipped or not: 0 0 type dims, big-endian sizes, bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError
        shape = np.frombuffer(data, ">i4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError):
        raise UserError(f"data {path}: is not an IDX file of bytes (damaged or truncated); fetch it again") from None


def cache_folder() -> Path:
    """The user's cache folder of this program, made if missing; a temporary one where that cannot be written."""
    import tempfile

    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    for place in (Path(base), Path(tempfile.gettempdir())):
        folder = place / "mocov3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"neither {base} nor {tempfile.gettempdir()} can be written; set XDG_CACHE_HOME")
