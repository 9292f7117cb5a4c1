"""Golden L and M: the reference's linear evaluation and DeiT's fine-tuning, through the loops that the programs run.

What the suite leaves out for time, and ``make golden`` does not: of ViT-Small, whose backbone C holds, all but the
first epoch in float32.
"""

import pytest
from golden_runs import L, M, fine_tuning, linear_evaluation
from goldens import RUNS

EVERY = [(name, dtype) for dtype in ("float32", "float64") for name in L]
LINEAR = {
    "suite": [("resnet18", "float32"), ("vit_small", "float32"), ("resnet18_wd", "float64")],
    "float32": [case for case in EVERY if case[1] == "float32"],
    "all": EVERY,
}[RUNS]
TUNING = {
    "suite": [("smoothing", "float64"), ("soft_targets", "float64"), ("soft_targets", "float32")],
    "float32": [(name, "float32") for name in M],
    "all": [(name, dtype) for dtype in ("float32", "float64") for name in M],
}[RUNS]


@pytest.mark.parametrize(("name", "dtype"), LINEAR)
def test_linear_evaluation(name, dtype):
    short = RUNS == "suite" and name == "vit_small"
    linear_evaluation(name, dtype, epochs=1 if short else 0).check()


@pytest.mark.parametrize(("name", "dtype"), TUNING)
def test_fine_tuning(name, dtype):
    fine_tuning(name, dtype).check()


def test_every_case_is_checked():
    assert {name for name, _ in LINEAR} == set(L)
    assert {name for name, _ in TUNING} == set(M)
