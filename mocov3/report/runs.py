"""What a run's folder holds, read for a report: metrics as columns, judgements without labels, settings, machine."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.config.fields import read_yaml
from mocov3.errors import UserError
from mocov3.metrics import QUALITY, JsonLine, MetricsLine
from mocov3.output.log import CORRUPT, METRICS, SKIPPED
from mocov3.output.machine import MACHINE

_NUMBERS = tuple(f.name for f in dataclasses.fields(MetricsLine) if f.name not in ("knn", "version"))
_NEEDED = ("step", "epoch", "loss")


@dataclasses.dataclass(frozen=True)
class Run:
    """A pre-training run as its folder tells it."""

    folder: Path
    name: str
    """What the page calls it."""
    columns: dict[str, np.ndarray]
    """A field of ``MetricsLine`` → its values by print step, float64, NaN where there is none."""
    knn: np.ndarray
    """(evaluations, 3): step, epochs done, accuracy in %."""
    quality: list[JsonLine]
    """Lines of ``quality.jsonl``."""
    skipped: list[JsonLine]
    """Lines of ``skipped.jsonl``."""
    corrupt: list[JsonLine]
    """Lines of ``corrupt.jsonl``."""
    machines: list[JsonLine]
    """Lines of ``machine.jsonl``: one a start."""
    config: PretrainConfig | None
    """Of ``config.yaml``, if that can be read."""
    remarks: list[str]
    """What could not be read."""

    def __len__(self) -> int:
        """Print steps."""
        return len(self.columns["step"])

    @property
    def epochs_done(self) -> float:
        """Epochs up to the last line, with fractions."""
        return float(self.columns["epoch_done"][-1])


def read_run(folder: Path, name: str = "") -> Run:
    """The run in ``folder``.

    Raises:
        UserError: if there is none, or it has written no metrics yet.
    """
    path = folder / METRICS
    if not path.is_file():
        what = "there is no such folder" if not folder.is_dir() else f"holds no {METRICS}"
        raise UserError(f"{folder}: {what}; name the --output-dir of a pre-training run")
    remarks: list[str] = []
    lines = [line for line in _lines(path, remarks) if all(_is_number(line.get(k)) for k in ("step", "epoch"))]
    steps = [line for line in lines if line.get("knn") is None]
    if not steps:
        raise UserError(f"{path}: holds no line of metrics yet; the first is written after the first steps")
    columns = {name: _column(steps, name) for name in _NUMBERS}
    columns["epoch_done"] = _epochs(columns)
    scored = [line for line in lines if _is_number(line.get("knn"))]
    knn = np.array([(line["step"], line["epoch"] + 1, line["knn"]) for line in scored], float).reshape(-1, 3)
    extra = {name: list(_lines(folder / name, remarks)) for name in (QUALITY, SKIPPED, CORRUPT, MACHINE)}
    quality = [_judged(line) for line in extra[QUALITY] if all(_is_number(line.get(k)) for k in ("retrieval", "epoch"))]
    skipped = [line for line in extra[SKIPPED] if _is_number(line.get("step"))]
    return Run(
        folder,
        name or folder.resolve().name or str(folder),
        columns,
        knn,
        quality,
        skipped,
        extra[CORRUPT],
        extra[MACHINE],
        _config(folder / "config.yaml", remarks),
        remarks,
    )


def _lines(path: Path, remarks: list[str]) -> Iterator[JsonLine]:
    bad = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):  # cut short by a kill, or being written
                    bad += 1
                    continue
                if isinstance(line, dict):
                    yield line
                else:
                    bad += 1
    except FileNotFoundError:
        return
    except OSError as error:
        remarks.append(f"{path.name} could not be read ({error.strerror or error})")
    if bad:
        remarks.append(f"{bad} lines of {path.name} could not be read")


def _judged(line: JsonLine) -> JsonLine:
    """A line of ``quality.jsonl`` with numbers where numbers belong, NaN for others."""
    return {k: v if _is_number(v) else math.nan for k, v in line.items() if k != "name"} | {
        "name": str(line.get("name"))
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _column(lines: list[JsonLine], name: str) -> np.ndarray:
    return np.array([v if _is_number(v := line.get(name)) else math.nan for line in lines], np.float64)


def _epochs(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Epochs done before each line: what is left of a step count after whole epochs tells their length."""
    epoch, iteration, step = columns["epoch"], columns["iteration"], columns["step"]
    later = (epoch > 0) & (step > iteration)
    if later.any():
        length = float(np.median((step - iteration)[later] / epoch[later]))
    else:
        length = float(np.nanmax(iteration)) + 1 if np.isfinite(iteration).any() else 1.0
    return epoch + np.minimum(np.nan_to_num(iteration) / max(length, 1.0), 1.0)


def _config(path: Path, remarks: list[str]) -> PretrainConfig | None:
    try:
        return PretrainConfig(**read_yaml(path, PretrainConfig))
    except UserError as error:
        remarks.append(str(error))
        return None
