"""Disks that are full: one line, nothing half-written, or a run that does without. A limit on files stands for them."""

import os

import numpy as np
import pytest
import torch
from doors import no_file_above, refused
from PIL import Image

from mocov3 import models
from mocov3.data import CentreView, Loader, open_source
from mocov3.data.sources.index import Index
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation.embeddings import Spool

pytest.importorskip("resource")
BACKBONE = "resnet10_w16"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a file of weights."""
    root = tmp_path_factory.mktemp("full")
    rng = np.random.Generator(np.random.PCG64(0))
    for i in range(24):
        (root / f"d/c{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"d/c{i % 2}/{i}.png")
    torch.save(models.build_backbone(BACKBONE).state_dict(), root / "w.pth")
    return root


@pytest.mark.parametrize(
    "command",
    [
        "embed --model W -a A --image-size 32 --device cpu -o O/x.npy D",
        "embed --model W -a A --image-size 32 --device cpu -o O/x.parquet D",
        "pack D --out O/x",
    ],
)
def test_one_line_and_nothing_half_written(place, tmp_path, command):
    words = {"W": place / "w.pth", "A": BACKBONE, "D": place / "d"}
    argv = [str(words.get(word, word)).replace("O/", f"{tmp_path}/") for word in command.split()]
    with no_file_above(8000):
        said = refused(*argv)
    assert "cannot be written (File too large)" in said
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_features_have_their_space_before_they_come(tmp_path):
    spool = Spool(tmp_path / "x.npy", {}, images=1000, shape=(100,), batch=10, world=World(0, 1, torch.device("cpu")))
    file = tmp_path / ".x.npy.spool.npy"
    assert file.stat().st_blocks * 512 >= file.stat().st_size >= 400_000  # written through memory: SIGBUS otherwise
    spool.remove()
    assert not list(tmp_path.glob(".x*"))


@pytest.mark.parametrize("kind", ["full", "no folder"])
def test_a_large_index_without_a_cache(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kind == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    paths = [os.fsencode(f"{'folder' * 20}/{i}.jpg") for i in range(10_000)]
    with no_file_above(100_000):
        index = Index.build(paths, np.arange(10_000) % 7)
    assert index.file is None
    assert [index.path(i) for i in range(0, 10_000, 999)] == paths[::999]
    assert index.labels.tolist() == [i % 7 for i in range(10_000)]
    assert not list(tmp_path.rglob("*.partial"))


def test_no_memory_to_share(place):
    source = open_source(str(place / "d"))
    with no_file_above(1000), pytest.raises(UserError, match=r"--workers: no \d+ MB .* give --workers 0"):
        Loader(source, CentreView(32), batch_size=4096, seed=0, workers=1)  # above what multiprocessing has kept
    Loader(source, CentreView(32), batch_size=4, seed=0, workers=0).close()
