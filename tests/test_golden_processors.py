"""The golden numbers hold in float32 on other processors too: the instructions that the libraries may use are cut down.

Every setting needs a process of its own: the libraries read it when they are loaded. ``make golden`` runs everything
under such settings and prints the deviations.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from goldens import FIGURES, RUNS
from processors import SETTINGS

HERE = Path(__file__).parent


@pytest.mark.skipif(RUNS != "suite", reason="make golden runs everything under these settings")
def test_with_other_instructions(tmp_path):
    children = {}
    for i, name in enumerate(("AVX2", "SSE4.2", "without oneDNN")):
        figures = tmp_path / str(i)
        environment = {**os.environ, **SETTINGS[name], "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", FIGURES: str(figures)}
        command = [sys.executable, str(HERE / "golden_child.py")]
        children[name] = figures, subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for name, (figures, child) in children.items():
        _, error = child.communicate(timeout=300)
        assert child.returncode == 0, f"{name}: {error}"
        assert len([json.loads(line) for line in figures.read_text().splitlines()]) == 4
