"""``make gpu`` without a GPU: nothing measured is lost; parts that are quick run at toy size."""

import os
import subprocess
import sys

import jaxtyping
import torch
from conftest import ROOT
from starting import run

from benchmarks import gpu, step

PROGRAM = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


def test_without_a_gpu_nothing_is_measured_and_nothing_lost(tmp_path):
    out = tmp_path / "gpu.md"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    gpu.write(out, {"Small images": "A card, 2026-11-26.\n\n| a | b |"})
    done = subprocess.run([*PROGRAM, "--output", str(out)], check=True, env=env, capture_output=True, timeout=300)
    assert b"no CUDA device" in done.stdout
    found = gpu.sections(out.read_text(encoding="utf-8"))
    assert list(found) == [title for title, _ in gpu.PARTS.values()]
    assert found.pop("Small images") == "A card, 2026-11-26.\n\n| a | b |"
    assert set(found.values()) == {gpu.NOTHING}


def test_the_committed_page_has_the_parts_of_the_program():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert list(gpu.sections(page)) == [title for title, _ in gpu.PARTS.values()]
    assert page.startswith(gpu.HEAD)


def test_what_is_not_measured_comes_first_then_the_oldest():
    titles = {name: title for name, (title, _) in gpu.PARTS.items()}
    found = {titles[name]: "A card, torch 2, 2026-11-26." for name in gpu.PARTS}
    found[titles["small"]] = "A card, torch 2, 2026-11-25."
    del found[titles["resume"]]
    assert gpu.due(found)[:2] == ["resume", "small"]


def test_parts_run():
    """Two parts at sizes whose numbers mean nothing (``--rehearse`` alone runs all): none failed."""
    argv = [*PROGRAM, "--rehearse", "--parts", "launches", "large"]
    done = run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| resnet10_w32 | lars |" in done.stdout
    assert "images/s" in done.stdout


def test_gradients_of_16_bits_are_as_near_as_those_of_the_eager_step(tmp_path, monkeypatch):
    """To float64, of a freshly initialised network; as the GPU's part "right" judges them, but for its float16."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes are not compiled
    eager, *ours = gpu._errors("vit_tiny", gpu.Machine(torch.device("cpu"), True, tmp_path))
    assert 1e-3 < eager < 0.5
    assert max(ours) <= 1.5 * eager


def test_the_eager_step_scales_its_losses_at_every_step():
    """As on a GPU, where its loss scaler is on: it refuses a second step without an update of the scale."""
    cpu = torch.device("cpu")
    case = {**step.CASES["vit_small"], "dim": 8, "mlp_dim": 8}
    side = step.Eager(step.build("vit_tiny", case, 32, cpu), case, cpu)
    side.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(2, 4, 3, 32, 32)
    for _ in range(2):
        side(x[0], x[1], 0.99)
