"""Golden D: twenty steps of four recipes through the training step itself; E: LARS; F: schedules and defaults."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN, fill_model, golden, moco_images

from mocov3 import models, schedules
from mocov3.cli import parse_script
from mocov3.config import LinclsConfig, PretrainConfig
from mocov3.distributed import World
from mocov3.models import products
from mocov3.optim import LARS, build_optimizer
from mocov3.recipes import RECIPES
from mocov3.step import Precision, Step

D = golden("d_traj.json")["recipes"]
F = golden("f_sched.json")
# (first step, bound on the loss from there on), and on the medians of moved_l2 and final_param_l2
LOSSES = {
    "resnet18_lars": [(0, 3e-5), (4, 2e-4), (6, 1e-3), (9, 6e-3)],
    "vit_tiny_adamw_mid": [(0, 5e-6), (6, 1e-4), (9, 6e-3)],
    "vit_tiny_adamw_readme_lr": [(0, 5e-6), (5, 1.5e-3)],
    "vit_tiny_adamw": [(0, 1e-5), (3, 6e-2)],
}
MEDIANS = {"resnet18_lars": (8e-3, 5e-6), "vit_tiny_adamw_mid": (2e-3, 3e-6)}
NO_GRADIENT = ("encoder.norm.bias", "qkv.bias")  # in exact arithmetic, wholly or in part


# also in micro-batches (of 5 and 6, of 8), where the backbone has no batch norm; tokens multiplied as the reference
# multiplied them, and (as on AMD's processors) by convolutions. Not the "mid" run: at its step 0 one unit before a
# ReLU is at 1.8e-6, float32 of either kind is good to 1.5e-5 there, and AdamW makes 2e-4 of its sign by step 3.
CASES = [(name, 0, False) for name in D] + [("vit_tiny_adamw_mid", 6, False), ("vit_tiny_adamw", 8, False)]
CASES += [("vit_tiny_adamw_readme_lr", 0, True), ("vit_tiny_adamw", 0, True)]


@pytest.mark.parametrize(("name", "micro_batch", "by_convolution"), CASES)
def test_trajectory(monkeypatch, name, micro_batch, by_convolution):
    monkeypatch.setattr(products, "mkl_is_half_wide", lambda: by_convolution)
    monkeypatch.setattr(products, "ENOUGH", 0)
    c, want = D[name]["config"], D[name]["float32"]
    vit = c["arch"].startswith("vit")
    dims = {"embed_dim": 192, "depth": 4, "num_heads": 3} if vit else {}
    model = models.build(
        "vit_small" if vit else c["arch"],
        image_size=c["size"],
        dim=c["dim"],
        mlp_dim=c["mlp_dim"],
        temperature=c["T"],
        stop_grad_conv1=c["stop_grad"],
        **dims,
    )
    fill_model(model)
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = build_optimizer(
        model.parameters(), c["optimizer"], weight_decay=c["wd"], momentum=c["optimizer_momentum"]
    )
    device = torch.device("cpu")
    step = Step(model, optimizer, world=World(0, 1, device), precision=Precision("fp32", device),
                micro_batch=micro_batch)  # fmt: skip
    peak = c["base_lr"] * c["batch"] / 256
    for s in range(20):
        epoch = s / c["iters_per_epoch"]
        lr = schedules.learning_rate(epoch, peak=peak, warmup_epochs=c["warmup_epochs"], epochs=c["epochs"])
        m = schedules.momentum(epoch, start=c["moco_m"], epochs=c["epochs"], cosine=c["moco_m_cos"])
        assert lr == pytest.approx(want["lr"][s], rel=1e-12, abs=1e-12)
        assert m == pytest.approx(want["moco_m"][s], rel=1e-12)
        x1, x2 = (moco_images(f"d_traj/{name}", s, view, c["batch"], c["size"]) for view in (1, 2))
        outcome = step(x1, x2, lr=lr, m=m)
        bound = [b for first, b in LOSSES[name] if s >= first][-1]
        assert abs(outcome.loss.item() - want["loss"][s]) <= bound, s
    final = dict(model.named_parameters())
    assert list(final) == list(want["final_param_l2"])
    moved, size = [], []
    for key, p in final.items():
        if not p.requires_grad or (c["optimizer"] == "adamw" and key.endswith(NO_GRADIENT)):
            continue
        size.append(abs(p.double().norm().item() / want["final_param_l2"][key] - 1))
        moved.append(abs((p - start[key]).double().norm().item() / want["moved_l2"][key] - 1))
    if name in MEDIANS:
        assert np.median(moved) <= MEDIANS[name][0]
        assert np.median(size) <= MEDIANS[name][1]
    for key, p in final.items():
        if not p.requires_grad and key.startswith("base_encoder"):
            assert torch.equal(p, start[key]), key
    state = optimizer.state_dict()
    assert len(state["state"]) == want["optimizer_states"]
    assert len(state["param_groups"][0]["params"]) == want["optimizer_params"]
    assert sorted(next(iter(state["state"].values()))) == sorted(want["optimizer_state_keys"])
    for key, buffer in model.named_buffers():
        if key.endswith("num_batches_tracked"):
            assert int(buffer) == 40
        elif key != "predictor.1.running_mean":
            assert buffer.double().norm().item() == pytest.approx(want["final_buffer_l2"][key], rel=2e-2), key


def test_adamw_decays_every_trainable_parameter():
    model = models.build("vit_small", image_size=32, embed_dim=48, depth=1, num_heads=3, dim=8, mlp_dim=8,
                         stop_grad_conv1=True)  # fmt: skip
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
            recorded["lr"], recorded["batch"], recorded["epochs"], recorded["warmup_epochs"], recorded["moco_m"],
        )  # fmt: skip
