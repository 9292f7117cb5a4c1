"""``make gpu`` without a GPU: every part is skipped with its reason; parts that are quick run at toy size."""

import os
import subprocess
import sys

from conftest import ROOT
from starting import run

PROGRAM = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


def test_without_a_gpu_everything_is_skipped_and_said(tmp_path):
    out = tmp_path / "gpu.md"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    subprocess.run([*PROGRAM, "--output", str(out)], check=True, env=env, capture_output=True, timeout=300)
    sections = out.read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) == 7
    for section in sections:
        title, _, body = section.partition("\n")
        assert body.strip() == "Skipped: torch finds no CUDA device here.", title
    # what is committed was written by this program
    committed = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert [s.partition("\n")[0] for s in committed] == [s.partition("\n")[0] for s in sections]


def test_parts_run():
    """Two parts at sizes whose numbers mean nothing (``--rehearse`` alone runs all): none skipped or failed."""
    parts = ["Kernel launches of the update", "Batch 4096 in 12 GB"]
    argv = [*PROGRAM, "--rehearse", "--parts", *parts]
    done = run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped" not in done.stdout
    assert "| resnet10_w32 | lars |" in done.stdout
    assert "images/s" in done.stdout
