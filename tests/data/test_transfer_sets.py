"""Data sets in their true formats on disk: CIFAR's pickles, Flowers' .mat, Pets' lists, class folders; and damage."""

import pickle

import numpy as np
import pytest
import torchvision
from doors import refused
from PIL import Image
from scipy.io import savemat
from transfer_files import write_cifar, write_flowers, write_pets

from mocov3.data import Loader, Work
from mocov3.data.loading.labelled import CropView
from mocov3.data.sources.transfer import Cifar, open_pair
from mocov3.data.views.decode import decode
from mocov3.errors import UserError


@pytest.mark.parametrize("data_set", ["cifar10", "cifar100"])
def test_cifar(data_set, tmp_path, monkeypatch):
    folder, pixels = write_cifar(tmp_path, data_set)
    train, test, per_class = open_pair(data_set, str(tmp_path))
    assert not per_class
    assert len(train.classes) == (10 if data_set == "cifar10" else 100)
    kind = torchvision.datasets.CIFAR10 if data_set == "cifar10" else torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)  # our images have other check sums
    if data_set == "cifar10":  # its meta file only names classes
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    else:
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    for ours, theirs in ((train, kind(tmp_path, train=True)), (test, kind(tmp_path, train=False))):
        assert len(ours) == len(theirs) > 0
        assert ours.labels.tolist() == theirs.targets
        assert np.array_equal(ours.images, theirs.data)
    assert len(open_pair(data_set, str(folder))[0]) == len(train)  # the inner folder may be named
    again = pickle.loads(pickle.dumps(train))
    assert again.digest == train.digest
    assert len(pickle.dumps(train)) < 500  # loader processes read it from disk
    assert pixels


def test_flowers(tmp_path):
    labels, ids, _, b = write_flowers(tmp_path / "flowers")
    for place in (tmp_path, tmp_path / "flowers"):
        train, test, per_class = open_pair("flowers", str(place))
        assert per_class
        assert (len(train), len(test), len(train.classes)) == (5, 4, 102)  # training and validation parts together
        assert train.labels.tolist() == (labels[ids[:b] - 1] - 1).tolist()
        assert test.labels.tolist() == (labels[ids[b:] - 1] - 1).tolist()
        for i, number in enumerate(ids[:b]):
            assert train.name(i) == f"image_{number:05d}.jpg"
            red = np.asarray(decode(train.read(i)))[0, 0, 0]
            assert abs(int(red) - number * 20 % 256) < 8
    # torchvision's layout is the same below another name
    (tmp_path / "flowers").rename(tmp_path / "flowers-102")
    assert len(open_pair("flowers", str(tmp_path))[0]) == 5


def test_pets(tmp_path):
    write_pets(tmp_path / "pets")
    train, test, per_class = open_pair("pets", str(tmp_path))
    assert per_class
    assert (len(train), len(test), len(train.classes)) == (6, 3, 37)
    assert train.labels.tolist() == [0, 0, 1, 1, 36, 36]
    assert test.labels.tolist() == [0, 1, 36]
    assert (train.classes[1], train.classes[36]) == ("american_bulldog", "yorkshire_terrier")
    assert test.name(2) == "yorkshire_terrier_3.jpg"
    (tmp_path / "pets").rename(tmp_path / "oxford-iiit-pet")
    theirs = torchvision.datasets.OxfordIIITPet(tmp_path, split="trainval")
    ours = open_pair("pets", str(tmp_path))[0]
    assert [label for _, label in theirs] == ours.labels.tolist()[: len(theirs)]


def test_folders(images):
    train, test, _ = open_pair("folder", str(images))
    assert (len(train), len(test), train.classes) == (64, 16, [f"class{i}" for i in range(4)])


def test_loader_processes_read_them(tmp_path):
    write_cifar(tmp_path, "cifar10")
    source = Cifar("cifar10", str(tmp_path), "train")
    batches = []
    for workers in (0, 1):
        with Loader(source, CropView(32, 0.05), batch_size=4, seed=1, workers=workers) as loader:
            work = Work(0, 0, np.array([3, 1, 7, 29]))
            batches.append(next(batch.pixels.copy() for batch in loader.run([work])))
    assert np.array_equal(*batches)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_damage_is_named(tmp_path, images):
    def fails(data_set, root, *words):
        with pytest.raises(UserError) as error:
            open_pair(data_set, str(root))
        assert all(word in str(error.value) for word in words), str(error.value)

    fails("cifar10", tmp_path / "none", "there is no such folder")
    fails("cifar10", "", "name the folder")
    fails("cifar10", tmp_path, "data_batch_1 is missing", "torchvision.datasets.CIFAR10")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    fails("cifar10", tmp_path, "unpack cifar-10-python.tar.gz")
    folder, _ = write_cifar(tmp_path, "cifar10")
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[:9000])
    fails("cifar10", tmp_path, "data_batch_2", "damaged")
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    fails("cifar10", tmp_path, "data_batch_2", "which no file of CIFAR does")
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, 2))
    fails("cifar10", tmp_path, "data_batch_2", "beyond its 10 classes")
    (folder / "test_batch").unlink()
    (folder / "data_batch_2").write_bytes(whole)
    fails("cifar10", tmp_path, "test_batch is missing")

    write_flowers(tmp_path / "f")
    (tmp_path / "f" / "setid.mat").rename(tmp_path / "setid.mat")
    fails("flowers", tmp_path / "f", "setid.mat is missing", "jpg, setid.mat, imagelabels.mat")
    (tmp_path / "f" / "setid.mat").write_bytes((tmp_path / "setid.mat").read_bytes()[:200])
    fails("flowers", tmp_path / "f", "setid.mat is damaged")
    savemat(tmp_path / "f" / "setid.mat", {"trnid": [1]})
    fails("flowers", tmp_path / "f", "no entry 'valid'")
    savemat(tmp_path / "f" / "setid.mat", {"trnid": [1], "valid": [2], "tstid": [99]})
    fails("flowers", tmp_path / "f", "from 1 to 9, not 99 to 99")
    (tmp_path / "setid.mat").rename(tmp_path / "f" / "setid.mat")
    (tmp_path / "f" / "jpg" / "image_00004.jpg").unlink()
    fails("flowers", tmp_path / "f", "1 listed images are missing", "image_00004.jpg")

    write_pets(tmp_path / "p")
    (tmp_path / "p" / "annotations" / "test.txt").rename(tmp_path / "test.txt")
    fails("pets", tmp_path / "p", "test.txt is missing")
    (tmp_path / "p" / "annotations" / "test.txt").write_text("Abyssinian_3\n")
    fails("pets", tmp_path / "p", "test.txt is not a list")
    (tmp_path / "p" / "annotations" / "test.txt").write_text("Abyssinian_3 38 1 1\n")
    fails("pets", tmp_path / "p", "from 1 to 37")
    fails("pets", tmp_path / "f", "images is missing")

    fails("folder", images / "train", "misses the folder train")
    (tmp_path / "d" / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "d" / "train" / "a" / "1.png")
    fails("folder", tmp_path / "d", "misses the folder val or test")
    (tmp_path / "d" / "val" / "b").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "d" / "val" / "b" / "1.png")
    fails("folder", tmp_path / "d", "holds 1 class")
    (tmp_path / "d" / "train" / "b").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "d" / "train" / "b" / "1.png")
    (tmp_path / "d" / "val" / "b").rename(tmp_path / "d" / "val" / "c")
    fails("folder", tmp_path / "d", "of classes that training lacks, first 'c'")
    assert "misses the folder" in refused("finetune", "--data-path", tmp_path, "--output_dir", tmp_path / "out")
