"""Golden C: one step of the reference at 224 px: loss, features, gradients, momentum encoder, batch statistics.

World size 2 runs in two real gloo processes, with plain batch norm, as recorded. float64 at 224 px takes long: the
suite leaves out, and ``make golden`` does not, ResNet-50 in float64; ResNet-18, the convolutional stem and two ranks
in float32.
"""

import pytest
from golden_runs import C, one_step, step_groups
from goldens import RUNS
from starting import launch_ranks

WHOLE = RUNS != "suite"
EVERY = [(names, dtype) for dtype in ("float32", "float64") for names in step_groups(1)]
SLOW64 = ("resnet50", "vit_small_t0.2_sg")
SAID64 = ("resnet18", "vit_small_t1.0", "vit_conv_small")  # ViT-Small in float32: with a frozen patch projection
CASES = {
    "suite": [(n, d) for n, d in EVERY if not n[0].startswith(SLOW64 if d == "float64" else SAID64)],
    "float32": [(n, d) for n, d in EVERY if d == "float32"],
    "all": EVERY,
}[RUNS]
DTYPES_OF_TWO = {"suite": ["float64"], "float32": ["float32"], "all": ["float32", "float64"]}[RUNS]


@pytest.mark.parametrize(("names", "dtype"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_one_process(names, dtype):
    checked = [name for name, found in one_step(names, dtype, whole=WHOLE) if found.check() is None]
    assert checked == names


def _rank_task(world, payload):
    folder, dtype = payload
    for names in step_groups(2):
        for name, found in one_step(names, dtype, world, whole=WHOLE):
            found.check()
            (folder / f"{name} {world.rank}").touch()
    return 0


@pytest.mark.parametrize("dtype", DTYPES_OF_TWO)
def test_two_processes(dtype, tmp_path):
    assert launch_ranks(_rank_task, (tmp_path, dtype), 2) == 0
    done = {path.name for path in tmp_path.iterdir()}
    assert done == {f"{name} {rank}" for names in step_groups(2) for name in names for rank in (0, 1)}


def test_every_case_is_checked():
    assert sorted(n for world in (1, 2) for names in step_groups(world) for n in names) == sorted(C)
    assert {n for names, _ in CASES for n in names} == {n for n, case in C.items() if case["world"] == 1}
