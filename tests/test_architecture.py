"""The house: imports go down only, tasks don't import each other, light rooms stay light, the documented loop runs."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from conftest import ROOT
from jaxtyping import TypeCheckError

from mocov3 import losses, schedules
from mocov3.moved import MOVED

# a room may import those after it, inside functions too; the order of docs/architecture.md
ROOMS = [
    "cli",
    "demo",
    "pack",
    "tiles",
    "report",
    "planning",
    "export",
    "pretraining",
    "finetuning",
    "evaluation.linear",
    "evaluation",
    "running",
    "weights",
    "models",
    "distributed",
    "output",
    "data.device",
    "data",
    "data.loading",
    "data.sources",
    "data.views",
    "config",
    "metrics",
    "losses",
    "schedules",
    "optim",
    "errors",
    "version",
    "moved",
]
# doors, and what they start with: nothing of it loads torch
LIGHT = [
    "mocov3.cli",
    "mocov3.config.command_lines",
    "mocov3.data",
    "mocov3.data.loading.supervised",
    "mocov3.data.sources.transfer",
    "mocov3.evaluation.embed",
    "mocov3.evaluation.knn",
    "mocov3.evaluation.linear.task",
    "mocov3.export.task",
    "mocov3.finetuning.task",
    "mocov3.output.log",
    "mocov3.pretraining.task",
    "mocov3.report.command",
]


def modules():
    """Dotted names of the package's modules → their files; a folder's ``__init__`` has the folder's name."""
    for path in sorted((ROOT / "mocov3").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "mocov3").with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name not in ("", "__main__"):
            yield name, path


MODULES = dict(modules())


def room(module):
    """The longest of ROOMS that a module lies in."""
    return max((r for r in ROOMS if module == r or module.startswith(f"{r}.")), key=len)


def imported(path):
    """Modules of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mocov3":
            base = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("mocov3."))


def test_every_room_is_in_the_plan():
    assert {room(name) for name in MODULES} == set(ROOMS)


def test_imports_go_down_only():
    for name, path in MODULES.items():
        up = [m for m in imported(path) if m and ROOMS.index(room(m)) < ROOMS.index(room(name))]
        assert not up, f"{name} imports from rooms above its own: {up}"


def test_no_circles():
    graph = graphlib.TopologicalSorter({n: set(imported(p)) - {"", n} for n, p in MODULES.items()})
    graph.prepare()  # raises CycleError, which names one


def test_resnets_train_without_timm():
    code = "import sys, mocov3.pretraining.loop, mocov3.evaluation.linear.loop; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("module", LIGHT)
def test_light_rooms_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_machine_is_named():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in tracked:
        if file.endswith((".py", ".md", ".toml", ".txt", ".cff")) and "golden" not in file and "test_arch" not in file:
            text = (ROOT / file).read_text()
            assert not re.search(r"/work/|/root/|/home/\w|index-url|find-links", text), file


def test_the_documented_loop_runs():
    text = (ROOT / "docs" / "architecture.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    assert scope["loss"].isfinite()


DOCUMENTED = {
    "mocov3.step": ("normalise", "Step", "Precision"),
    "mocov3.neighbours": ("nearest", "knn_accuracy"),
    "mocov3.convert": ("load_into", "load_backbone"),
    "mocov3.checkpoint": ("read",),
    "mocov3.data.decode": ("Picture", "DecodeError"),
    "mocov3.recipes": ("RECIPES",),
}
"""What documents and messages of version 0.1 named, by its former path."""


@pytest.mark.parametrize("path", MOVED)
def test_former_paths_work_and_warn(path):
    module = importlib.import_module(path)
    for name in DOCUMENTED.get(path, ()):
        with pytest.warns(DeprecationWarning, match=rf"{path}.{name} is now mocov3\."):
            found = getattr(module, name)
        here = importlib.import_module(found.__module__) if callable(found) else importlib.import_module(MOVED[path])
        assert found is getattr(here, found.__name__ if callable(found) else name)
    with pytest.raises(AttributeError):
        _ = module.never_there


def test_what_is_documented_is_where_the_documents_say():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    named = {m for t in texts for m in re.findall(r"from (mocov3[\w.]*) import ([\w, ]+)", t.read_text())}
    assert len(named) > 8
    for module, names in named:
        exec(f"from {module} import {names}", {})  # a folder is no attribute of its package until it is imported


def test_the_tests_check_shapes_and_types():
    """Of every function: by jaxtyping where there are shapes, by beartype alone where there are none."""
    scores = torch.zeros(4, 8)
    losses.retrieved(scores, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="batch"):
        losses.retrieved(scores, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeCheckError):
        losses.retrieved(scores, torch.zeros(4))
    with pytest.raises(BeartypeCallHintViolation):
        schedules.learning_rate("1", peak=0.3, warmup_epochs=1, epochs=2)
