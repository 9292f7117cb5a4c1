"""The house: imports go down only, tasks don't import each other, light rooms stay light, the documented loop runs."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# a module may import those after it; the order of docs/architecture.md
ORDER = [
    "cli", "commands", "demo", "pack", "check", "plan", "inspect", "choose", "speed", "auto",
    "exporting", "export", "model_card", "formats", "formats.hub", "formats.weights", "formats.graphs", "formats.base",
    "foreign",
    "tuning.loop", "tuning.setup", "tuning.files", "tuning.recorder", "tuning.log", "tuning.evaluate", "tuning.step",
    "tuning.mixing", "tuning.model", "tuning.plan", "finetune", "tuning",
    "linear", "linear_scores", "linear_setup", "linear_files", "lincls", "knn", "embed", "embeddings",
    "logistic", "heads", "evaluation_log",
    "report.command", "report.page", "report.sections", "report.panels", "report.html_parts", "report.charts",
    "report.diagnosis", "report.curves", "report.learned", "report.runs", "report.geometry", "report.images", "report",
    "run", "agreement", "pages", "online", "sheet", "resume", "saver", "recorder", "watch", "pretrain",
    "compare", "judge",
    "verdict", "assemble", "footprint", "sharded", "groups",
    "frozen", "features", "strips", "step", "gradients", "depth", "precision", "augment", "origin", "start", "convert",
    "attention",
    "models", "models.moco", "models.backbones", "models.vit", "models.patches", "models.positions",
    "models.small_maps", "models.products", "models.shapes", "schedules", "losses",
    "neighbours",
    "quality", "intervals", "stop", "writer", "checkpoint", "tensorfiles", "vetting", "optim",
    "distributed", "distributed.launch", "distributed.batch_norm", "distributed.sharding", "distributed.world",
    "distributed.meeting", "distributed.heartbeat",
    "machine", "log", "terminal", "loggers", "metrics",
    "data", "data.labels", "data.survey", "data.facts", "data.transfer", "data.supervised",
    "data.labelled", "data.loader", "data.slots", "data.probes", "data.views", "data.operations", "data.native",
    "data.order", "data.draws", "data.decode", "data.bands", "data.packed", "data.shards", "data.members",
    "data.parquet", "data.sources", "data.embedded", "data.lists", "data.splits", "data.contents", "data.scan",
    "data.index",
    "config", "config.pretrain", "config.scale", "config.own", "config.lincls", "config.evaluation", "config.finetune",
    "config.views", "config.presets", "config.loggers", "config.cheap", "config.fields", "config.archs",
    "recipes", "errors", "version",
]  # fmt: skip
# started from above, by name: the doors call a task, a task its loop; sources by what they are named
LAZY = {
    ("pretrain", "run"), ("demo", "cli"), ("data.sources", "data.packed"), ("export", "exporting"),
    ("finetune", "tuning.loop"), ("lincls", "linear"), ("lincls", "linear_scores"),
}  # fmt: skip
LIGHT = [
    "mocov3.cli", "mocov3.recipes", "mocov3.config", "mocov3.data", "mocov3.pretrain", "mocov3.log", "mocov3.stop",
    "mocov3.finetune", "mocov3.export", "mocov3.data.supervised", "mocov3.data.transfer",
    "mocov3.lincls", "mocov3.knn", "mocov3.embed", "mocov3.report.command",
]  # fmt: skip


def modules():
    for path in sorted((ROOT / "mocov3").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "mocov3").with_suffix("").parts).removesuffix(".__init__")
        if name not in ("__init__", "__main__"):
            yield name, path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mocov3"):
            base = node.module.removeprefix("mocov3").lstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                yield whole if whole in ORDER else base


def test_every_module_has_its_place():
    assert sorted(name for name, _ in modules()) == sorted(ORDER)


def test_imports_go_down():
    for name, path in modules():
        for other in imported(path):
            if (name, other) in LAZY or other == name:
                continue
            if other and not name.startswith(other + "."):
                assert ORDER.index(other) > ORDER.index(name) or other.startswith(name + "."), f"{name} imports {other}"


def test_resnets_train_without_timm():
    code = "import sys, mocov3.run, mocov3.linear; sys.exit('timm' in sys.modules)"
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
