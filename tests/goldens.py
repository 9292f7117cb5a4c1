"""The golden numbers, what they are filled with and fed, and how far a run may be from them.

Used by the tests of ``test_golden_*.py``, by processes of their own (``golden_child.py``) and by ``tools/goldens.py``:
so it needs neither pytest nor the checks of types that ``conftest.py`` installs.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
FIGURES = "GOLDEN_FIGURES"
"""Environment variable: a file that deviations are added to, a JSON line a check."""
WITHOUT_ONEDNN = "GOLDEN_WITHOUT_ONEDNN"
"""Environment variable: whether to do without oneDNN, which torch has no variable of its own for."""
RUNS = os.environ.get("GOLDEN_RUNS", "suite")
"""Which runs the golden tests make: ``suite`` (those that say most for their time), ``float32`` (all of float32) or
``all`` (all of both)."""

if os.environ.get(WITHOUT_ONEDNN):
    torch.backends.mkldnn.set_flags(False)


def _fill():
    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = sys.modules.setdefault("fill", _fill())


def golden(name):
    """A JSON file of golden numbers."""
    return json.loads((GOLDEN / name).read_text())


def fill_model(model, dtype=torch.float32):
    """Give every parameter and buffer its value by the fill rule."""
    state = model.state_dict()
    for key, value in state.items():
        new = fill.fill_value(key, tuple(value.shape))
        if new is not fill.KEEP:
            value.copy_(torch.from_numpy(np.asarray(new)))
    return model.to(dtype).train()


def moco_images(case, step, view, batch, size):
    return torch.from_numpy(fill.images(case, step, view, batch, size))


class Deviations:
    """How far a run is from recorded numbers: the largest deviation of every quantity, beside its bound.

    Args:
        of: the run, for messages and figures.
        bounds: largest deviation allowed, by quantity.
    """

    def __init__(self, of, bounds):
        self.of, self.bounds = of, bounds
        self.largest = {}

    def note(self, quantity, value, where="", scale=1.0):
        """Count a deviation; ``scale`` widens its bound. NaN counts as infinite."""
        value = abs(float(value)) / scale
        value = math.inf if math.isnan(value) else value
        if quantity not in self.largest or value > self.largest[quantity][0]:
            self.largest[quantity] = (value, where)

    def fingerprint(self, quantity, key, array, want, fields=("l2", "sum", "dot"), floor=0.0):
        """Count the deviations of a tensor's fingerprint, relative to its norm (at least ``floor``)."""
        got = fill.fingerprint(key, array)
        size = max(want["l2"], floor)
        for field in fields:
            if field in want:
                self.note(f"{quantity} {field}", (got[field] - want[field]) / size, key)
        if "samples" in want:
            values = np.asarray(array).ravel()[fill.sample_indices(key, np.size(array))]
            self.note(f"{quantity} samples", np.abs(values - want["samples"]).max() / size, key)

    def check(self):
        """Write the figures down where asked for; fail where a bound is crossed."""
        assert sorted(self.largest) == sorted(self.bounds), (self.of, sorted(self.largest), sorted(self.bounds))
        if path := os.environ.get(FIGURES):
            rows = {q: [value, self.bounds[q]] for q, (value, _) in self.largest.items()}
            with open(path, "a") as file:
                file.write(json.dumps({"of": self.of, "deviations": rows}) + "\n")
        over = {
            q: (value, self.bounds[q], where)
            for q, (value, where) in self.largest.items()
            if not value <= self.bounds[q]
        }
        assert not over, f"{self.of}: deviation, bound, where: {over}"
