"""Damaged and forged files of every kind are read, or refused in a line: in time, in little memory, without a crash."""

import json
import os
import sys
from pathlib import Path

import fuzzing
import pytest
import starting
from trials import PATIENCE, record, trials

ROOT = Path(__file__).parent.parent
AT_ONCE = 2000  # files a process
SAID_BY_LIBRARIES = ("libpng ", "mocov3: ")
"""How lines begin that may be printed: of compressed pixels that are damaged under right checksums; our own remarks."""
PROMISES = {
    "images": "images (24 formats)",
    "archives": "tar archives",
    "tables": "Parquet tables",
    "lists": "lists of images",
    "slides": "slides (TIFF pyramids by tifffile)",
    "dicom": "DICOM files (15 transfer syntaxes and layouts)",
    "weights": "weights in wrappers, safetensors, pickles with other names and calls",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted in other units")
@pytest.mark.parametrize("kind", PROMISES)
def test_damaged_files(kind, tmp_path):
    if kind == "tables":
        pytest.importorskip("pyarrow")
    if kind == "dicom":
        pytest.importorskip("pydicom")
        pytest.importorskip("openjpeg")
    count, refused = trials(150, 10_000), 0
    for first in range(0, count, AT_ONCE):
        number = min(AT_ONCE, count - first)
        command = [sys.executable, str(Path(fuzzing.__file__)), kind, str(first), str(number), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = starting.run(command, cwd=tmp_path, env=environment, timeout=100 + PATIENCE * number)
        place = (tmp_path / "number").read_text() if (tmp_path / "number").exists() else "none"
        assert done.returncode == 0, f"{kind}, file number {place}:\n{done.stdout[-1000:]}{done.stderr[-5000:]}"
        said = [line for line in done.stderr.splitlines() if not line.startswith(SAID_BY_LIBRARIES)]
        assert not said, f"{kind}: {said[:5]}"
        refused += json.loads(done.stdout)["refused"]
    assert count // 20 < refused < count - count // 20  # some pass, some do not: the changes are neither mild nor wild
    bound = fuzzing.KINDS[kind].mebibytes
    outcome = (
        f"{count - refused} read, {refused} refused in one line; no crash, no hang, less than {bound} MB of memory"
    )
    record(f"damaged and forged {PROMISES[kind]}", count, outcome)
