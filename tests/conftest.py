"""Shared by all tests: shape and type checks of the whole package, thread counts, golden numbers, tiny images."""

import gc
import os
import sys
from pathlib import Path

gc.disable()  # until all is imported, nearly all of which stays
os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process a test starts, so that ranks don't fight
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # nor does each of them compile the package anew

import starting
import typecheck

starting.load_libraries()  # what the checked package imports first, its hook compiles anew at every start
typecheck.install()  # before the package is imported

import pytest

pytest.register_assert_rewrite("goldens", "golden_runs")

import numpy as np
import torch
from goldens import GOLDEN, fill, fill_model, golden, moco_images  # noqa: F401  # for the tests
from PIL import Image
from trials import passed

from mocov3.data.views import native

ROOT = Path(__file__).parent.parent

BACKENDS = [
    "pillow",
    "library",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native.available(), reason="the kernel is not built: no compiler")
    ),
]
"""Ways to make views; ``fast`` is ``native`` where the kernel was built, else ``library``."""


LONG = (
    "test_killing",
    "test_golden_step",
    "test_auto",
    "test_ranks",
    "test_export",
    "test_runs",
    "test_lincls",
    "test_finetune",
    "test_faults",
    "test_golden_training",
    "test_report",
    "test_many_machines",
    "test_every_task",
    "test_golden_processors",
    "test_golden_views",
    "test_golden_evaluation",
    "test_knn",
    "test_attention_heads",
    "test_micro_batch",
    "test_guard",
    "test_preserve",
    "test_quality",
    "test_report_browser",
    "test_cheap",
    "test_every_command",
    "test_bands",
    "test_gpu_program",
    "test_data",
    "test_golden_convert",
    "test_tiles",
    "test_dicom",
)
"""Files that take 15 core-seconds or more, longest first: so none is left alone at the end."""


SLOW = set((Path(__file__).parent / "recorded" / "slow.txt").read_text().split())
"""Tests that ``make test-fast`` leaves out; made by tools/slow_tests.py."""


def pytest_configure(config):
    """Name our marker."""
    config.addinivalue_line("markers", "slow: left out by make test-fast")


def pytest_collection_modifyitems(items):
    """Leave out what a soak that was stopped has done already, mark what is slow, and order files."""
    done = passed()
    for item in items:
        if item.nodeid.split("[", 1)[0] in SLOW:
            item.add_marker("slow")
    items[:] = [item for item in items if item.nodeid not in done]
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish():
    """From here on only what tests leave is looked through."""
    gc.freeze()
    gc.enable()


def tree(root, *names):
    """Files of these names below a folder."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def documented(title):
    """Commands of the program below a title of docs/formats.md, without what is said behind them."""
    section = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8").split(f"\n{title}\n")[1].split("\n## ")[0]
    lines = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith("mocov3 ")]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 64 training and 16 validation images of 4 classes, of several sizes, modes and formats."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.Generator(np.random.PCG64(0))
    modes = [("RGB", ".jpg"), ("L", ".png"), ("RGBA", ".png"), ("RGB", ".webp")]
    for split, count in (("train", 16), ("val", 4)):
        for label in range(4):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = int(rng.integers(36, 60)), int(rng.integers(36, 60))
                coarse = rng.integers(0, 256, (4, 4, 3)) // 4 + 48 * np.eye(4, 3)[label].astype(int) * 3
                image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height))
                mode, extension = modes[i % 4]
                image.convert(mode).save(folder / f"{i:02d}{extension}")
    return root


@pytest.fixture
def run_program():
    """Run a program of the repository in a process of its own: (arguments, folder) → completed process."""

    def run(*args, cwd, timeout=120, env=None, script=None, check=True):
        command = [sys.executable, *([str(ROOT / script)] if script else ["-m", "mocov3"]), *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        done = starting.run(command, cwd=cwd, timeout=timeout, env=environment)
        if check:
            assert done.returncode == 0, done.stderr + done.stdout
        return done

    return run


TINY = [
    "--recipe",
    "defaults",
    "-a",
    "resnet10_w16",
    "--image-size",
    "32",
    "-b",
    "16",
    "--epochs",
    "2",
    "--warmup-epochs",
    "1",
    "--moco-mlp-dim",
    "32",
    "--moco-dim",
    "16",
    "-j",
    "0",
    "-p",
    "1",
    "--seed",
    "3",
    "--device",
    "cpu",
    "--logger",
    "none",
]
"""Flags of a pre-training run that takes half a second; ``--logger tensorboard`` is the program's own."""
