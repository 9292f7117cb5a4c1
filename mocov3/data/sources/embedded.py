"""The embedded images, and torchvision's files of the whole Fashion-MNIST."""

import gzip
import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from mocov3.errors import UserError

BUILT_IN = "fashion-mnist"
_EMBEDDED = Path(__file__).parent.parent / "fashion_mnist"
_PRETRAINING = 8000  # images 0–7,999 are for training, the rest is the test split


class FashionMnist:
    """The embedded 10,000 test images of Fashion-MNIST (Zalando SE, MIT): 28×28 grey, 10 classes.

    ``train`` holds images 0–7,999, ``val`` 8,000–9,999. With ``root``, a folder in torchvision's layout, the
    60,000 training images come first in ``train``.
    """

    classes: list[str] = [  # noqa: RUF012 (never changed)
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ]

    def __init__(self, split: str = "train", root: str | None = None) -> None:
        self.split, self.root = split, root
        images = _idx(_EMBEDDED / "t10k-images-idx3-ubyte.gz")
        labels = _idx(_EMBEDDED / "t10k-labels-idx1-ubyte.gz")
        part = slice(0, _PRETRAINING) if split == "train" else slice(_PRETRAINING, None)
        images, labels = images[part], labels[part]
        if root is not None and split == "train":
            raw = Path(root) / "FashionMNIST" / "raw"
            more = (_idx(_either(raw / "train-images-idx3-ubyte")), _idx(_either(raw / "train-labels-idx1-ubyte")))
            if more[0].shape[1:] != images.shape[1:] or len(more[0]) != len(more[1]):
                raise UserError(f"data {raw}: the files do not hold 28×28 images with as many labels")
            images, labels = np.concatenate([more[0], images]), np.concatenate([more[1], labels])
        self.images = images
        self.labels: np.ndarray | None = labels.astype(np.int32)

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return FashionMnist, (self.split, self.root)

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """uint8 pixels, (28, 28)."""
        pixels: np.ndarray = self.images[index]
        return pixels

    def name(self, index: int) -> str:
        """The image's number in its split."""
        return f"fashion-mnist/{self.split}/{index}"


def _either(path: Path) -> Path:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.exists():
            return candidate
    raise UserError(f"data {path}: is missing (and so is its .gz); torchvision's FashionMNIST writes it")


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
