"""The golden numbers hold in float32 on other processors too: the instructions that the libraries may use are cut down.

Libraries read most settings when they are loaded, so these need a process each. ``make golden`` runs everything under
such settings and prints the deviations.
"""

import os
import subprocess
import sys
from pathlib import Path

import golden_child
import pytest
import torch
from conftest import ROOT
from goldens import RUNS
from processors import SETTINGS

HERE = Path(__file__).parent


@pytest.mark.skipif(RUNS != "suite", reason="make golden runs everything under these settings")
def test_with_other_instructions():
    children = {}
    for name in ("AVX2", "SSE4.2"):
        environment = {**os.environ, **SETTINGS[name], "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
        command = [sys.executable, str(HERE / "golden_child.py")]
        children[name] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            golden_child.main()
        for name, child in children.items():
            _, error = child.communicate(timeout=300)
            assert child.returncode == 0, f"{name}: {error}"
    finally:
        for child in children.values():
            child.kill()
