"""The documents: pages made from code are not stale, code in them runs, the notebook runs."""

import importlib.util
import json

import pytest
from conftest import ROOT

from mocov3.metrics import MetricsLine

API = ROOT / "docs" / "api.md"


def code_of(page):
    return [part.split("```")[0] for part in page.read_text(encoding="utf-8").split("```python\n")[1:]]


def test_the_page_of_flags_is_made_from_the_configuration():
    spec = importlib.util.spec_from_file_location("flags", ROOT / "tools" / "flags.py")
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    page = flags.page()
    assert "| `--moco-t` | temperature τ of the loss (above 0) | `1.0` | ● |" in page
    assert "`--quiet` / `--no-quiet`" in page
    assert flags.PAGE.read_text(encoding="utf-8") == page, "stale: run python tools/flags.py"


def test_features_in_ten_lines(images):
    code = code_of(API)[0]
    assert len(code.strip().splitlines()) <= 12  # two are not code
    scope = {"CHECKPOINT": "resnet10_w32", "IMAGES": str(images)}
    exec(code, scope)
    assert scope["features"].shape == (16, 256)


def test_a_loop_in_forty_lines(capsys):
    code = code_of(API)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    scope = {}
    exec(code.replace("1, 128, 2048, 0", "1, 128, 1024, 0"), scope)
    assert scope["optimizer"].param_groups[0]["lr"] > 0
    accuracy = float(capsys.readouterr().out.split("k-NN ")[1].split(" %")[0])
    assert accuracy > 50  # ten classes; a loop that breaks the weights falls far below


def test_the_notebook_runs(tmp_path):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "docs" / "first-run.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    done = nbclient.NotebookClient(
        notebook,
        timeout=240,
        startup_timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "torch.Size([256, 128])" in json.dumps(outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_metric_is_explained():
    text = (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")
    plain = {"step", "epoch", "iteration", "version", "loss_start", "loss_floor"}
    missing = [name for name in MetricsLine.__dataclass_fields__ if name not in plain and f"`{name}`" not in text]
    assert not missing
