"""Small data sets in the formats of their homepages: CIFAR's pickles, Flowers' .mat, Pets' lists."""

import io
import pickle
import struct
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat


class Python2(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, with which CIFAR's files were made."""

    def save_str(self, obj):
        data = obj.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)  # BINSTRING

    def save_bytes(self, obj):
        self.save_str(obj.decode("latin1"))

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_str, bytes: save_bytes}


def dumped(contents):
    file = io.BytesIO()
    Python2(file, protocol=2).dump(contents)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(root, data_set, n=6):
    """CIFAR's Python version, as on its homepage: Python 2's pickles of dicts, rows of 3,072 planar bytes."""
    rng = np.random.default_rng(3)
    folder = root / ("cifar-10-batches-py" if data_set == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if data_set == "cifar10" else ["train", "test"]
    classes = 10 if data_set == "cifar10" else 100
    pixels = {}
    for name in names:
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = rng.integers(0, classes, n).tolist()
        contents = {"data": data, "filenames": ["x.png"] * n}
        contents |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": [0] * n}
        (folder / name).write_bytes(dumped(contents))
        pixels[name] = data, labels
    return folder, pixels


def write_flowers(root, counts=(3, 2, 4)):
    """Oxford Flowers-102: ``jpg/image_%05d.jpg``, ``imagelabels.mat`` (1 × N), ``setid.mat`` (1-based numbers)."""
    (root / "jpg").mkdir(parents=True)
    n = sum(counts)
    labels = np.arange(1, n + 1)[::-1] * 11 % 102 + 1
    for i in range(1, n + 1):
        Image.new("RGB", (40, 30), (i * 20 % 256, 0, 0)).save(root / "jpg" / f"image_{i:05d}.jpg")
    ids = np.random.default_rng(0).permutation(n) + 1
    a, b = counts[0], counts[0] + counts[1]
    savemat(root / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    savemat(root / "setid.mat", {"trnid": ids[None, :a], "valid": ids[None, a:b], "tstid": ids[None, b:]})
    return labels, ids, a, b


def write_pets(root):
    """Oxford-IIIT Pets: ``images/Breed_N.jpg``, ``annotations/{trainval,test}.txt`` of NAME CLASS SPECIES BREED."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = []
        for label, breed in ((1, "Abyssinian"), (2, "american_bulldog"), (37, "yorkshire_terrier")):
            for number in numbers:
                lines.append(f"{breed}_{number} {label} 1 1")
                Image.new("RGB", (30, 40), (label, number, 0)).save(root / "images" / f"{breed}_{number}.jpg")
        (root / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
