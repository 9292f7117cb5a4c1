"""Golden D: twenty steps of four recipes through the training step itself; E: LARS; F: schedules and defaults."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, fill_model, golden
from golden_runs import trajectory
from goldens import RUNS

from mocov3 import models, schedules
from mocov3.cli import parse_script
from mocov3.config import LinclsConfig, PretrainConfig
from mocov3.config.recipes import RECIPES
from mocov3.optim import LARS, build_optimizer

F = golden("f_sched.json")

# Beside the plain way of a step: tokens multiplied by convolutions (as on AMD's processors), and micro-batches (of 5
# and 6, of 8), where the backbone has no batch norm.
WAYS = {
    "resnet18_lars": {},
    "vit_tiny_adamw_mid": {"micro_batch": 6},
    "vit_tiny_adamw": {"micro_batch": 8},
    "vit_tiny_adamw_readme_lr": {"by_convolution": True},
}
PLAIN = [(name, dtype, {}) for dtype in ("float32", "float64") for name in WAYS]
# float32 by convolution: not the "mid" run. At its step 0 one unit before a ReLU is at 1.8e-6, float32 of either kind
# is good to 1.5e-5 there, and AdamW makes 2e-4 of its sign by step 3.
OTHER = [(name, "float64", way) for name, way in WAYS.items() if way]
OTHER += [
    ("vit_tiny_adamw_readme_lr", "float32", {"by_convolution": True}),
    ("vit_tiny_adamw", "float32", {"by_convolution": True}),
]
CASES = {
    # the first steps of a ResNet in float64 tell every known error of LARS (tests/golden/sensitivity.json); all twenty
    # take minutes
    "suite": [
        ("resnet18_lars", "float64", {"steps": 4}),
        ("resnet18_lars", "float32", {}),
        ("vit_tiny_adamw_mid", "float64", {}),
        ("vit_tiny_adamw_mid", "float64", {"micro_batch": 6, "steps": 6}),
        ("vit_tiny_adamw", "float64", {"micro_batch": 8, "steps": 7}),
        ("vit_tiny_adamw_readme_lr", "float64", {"by_convolution": True, "steps": 7}),
        ("vit_tiny_adamw_readme_lr", "float32", {"by_convolution": True}),
    ],
    "float32": [case for case in PLAIN + OTHER if case[1] == "float32"],
    "all": PLAIN + OTHER,
}[RUNS]


@pytest.mark.parametrize(("name", "dtype", "way"), CASES, ids=str)
def test_trajectory(name, dtype, way):
    trajectory(name, dtype, **way).check()


def test_adamw_decays_every_trainable_parameter():
    model = models.build(
        "vit_small", image_size=32, embed_dim=48, depth=1, num_heads=3, dim=8, mlp_dim=8, stop_grad_conv1=True
    )
    fill_model(model)
    optimizer = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    for key, p in model.named_parameters():
        expected = before[key] * 0.99 if p.requires_grad else before[key]
        assert torch.allclose(p, expected, rtol=1e-6, atol=0), key


@pytest.mark.parametrize("masked", [False, True])
def test_lars(masked):
    meta = golden("e_lars.json")
    z = np.load(GOLDEN / "e_lars.npz")
    assert dict(LARS([torch.nn.Parameter(torch.zeros(1))]).defaults) == meta["defaults"]
    for group, options in meta["groups"].items():
        params = {n: torch.nn.Parameter(torch.from_numpy(z[f"start/{n}"].copy())) for n in meta["shapes"]}
        optimizer = LARS(params.values(), **options)
        if masked:  # the path of GPUs, told that all is finite
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
        for s, lr in enumerate(meta["lr_per_step"]):
            for n, p in params.items():
                p.grad = None if n in meta["no_state_for"] else torch.from_numpy(z[f"grad/step{s}/{n}"].copy())
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            for n, p in params.items():
                want = z[f"{group}/step{s}/{n}"]
                scale = max(float(np.abs(want).max()), 1e-30)
                assert np.abs(p.detach().numpy() - want).max() <= 1e-6 * scale, (group, s, n)
                if n in meta["no_state_for"]:
                    assert p not in optimizer.state
                else:
                    mu = z[f"{group}/step{s}/{n}/mu"]
                    got = optimizer.state[p][meta["state_key"]].numpy()
                    assert np.abs(got - mu).max() <= 1e-6 * max(float(np.abs(mu).max()), 1e-30), (group, s, n)


def test_lars_told_of_infinities_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p], lr=1.0)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    before, mu = p.detach().clone(), optimizer.state[p]["mu"].clone()
    p.grad = torch.full((2, 2), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["mu"], mu)


@pytest.mark.parametrize("name", F["pretrain"])
def test_pretraining_schedule(name):
    c = F["pretrain"][name]["config"]
    peak = PretrainConfig(lr=c["lr"], batch_size=c["batch"]).peak_lr
    assert peak == pytest.approx(F["pretrain"][name]["scaled_lr"], rel=1e-12)
    for epoch, iteration, fraction, lr, m in F["pretrain"][name]["rows"]:
        x = epoch + iteration / F["pretrain"][name]["iters_per_epoch"]
        assert x == pytest.approx(fraction, rel=1e-12)
        got = schedules.learning_rate(x, peak=peak, warmup_epochs=c["warmup_epochs"], epochs=c["epochs"])
        assert got == pytest.approx(lr, rel=1e-12, abs=1e-12 * peak)
        assert schedules.momentum(x, start=c["moco_m"], epochs=c["epochs"], cosine=True) == pytest.approx(m, rel=1e-12)
        assert schedules.momentum(x, start=c["moco_m"], epochs=c["epochs"], cosine=False) == c["moco_m"]


@pytest.mark.parametrize("name", F["linear_eval"])
def test_linear_evaluation_schedule(name):
    r = F["linear_eval"][name]
    initial = LinclsConfig(lr=r["base_lr"], batch_size=r["batch"]).initial_lr
    assert initial == r["init_lr"]
    for epoch, lr in enumerate(r["lr_per_epoch"]):
        got = schedules.epoch_cosine(epoch, initial=initial, epochs=r["epochs"])
        assert got == pytest.approx(lr, rel=1e-12, abs=1e-12 * initial)


@pytest.mark.parametrize(
    ("script", "defaults"), [("main_moco.py", "main_moco_defaults"), ("main_lincls.py", "main_lincls_defaults")]
)
def test_defaults_of_the_reference(script, defaults):
    config = parse_script(script, [])
    for name, value in F[defaults].items():
        assert getattr(config, name) == (value if name != "data" else ""), name


def test_recipes_are_the_recorded_ones():
    for name, r in F["pretrain"].items():
        if name not in RECIPES and name != "vit_base_300ep_b4096":
            continue
        c = parse_script("main_moco.py", ["--recipe", name.removesuffix("_b4096"), "DIR"])
        recorded = r["config"]
        assert (c.lr, c.batch_size, c.epochs, c.warmup_epochs, c.moco_m) == (
            recorded["lr"],
            recorded["batch"],
            recorded["epochs"],
            recorded["warmup_epochs"],
            recorded["moco_m"],
        )
