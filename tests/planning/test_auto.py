"""Recipes auto and adapt: plans for machines not at hand, plans that run, starting weights, groups, freezing."""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import TINY
from doors import refused
from PIL import Image

from mocov3 import load_backbone, models, schedules
from mocov3.cli import main
from mocov3.config import PretrainConfig, read_yaml
from mocov3.config.archs import BUILT_IN_ARCHS, SMALL_RESNETS, SMALL_VITS
from mocov3.config.command_lines import read_pretrain
from mocov3.config.presets import PRESETS
from mocov3.config.recipes import RECIPES
from mocov3.config.schedule import parse_budget
from mocov3.data import FashionMnist
from mocov3.data.loading.order import Order
from mocov3.data.sources.survey import Survey, alikeness, near_pairs, propose, uprightness
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.models import build_backbone, sincos_position_embedding
from mocov3.optim import build_optimizer, set_learning_rate
from mocov3.planning import speed
from mocov3.planning.adapting import choices_of, row_of
from mocov3.planning.auto import GIB, Images, Machine, choose_settings
from mocov3.planning.choose import propose_settings
from mocov3.pretraining.assemble import build_model, count_memory
from mocov3.pretraining.groups import block_numbers, freeze_until, parameter_groups, scale_backbone
from mocov3.weights import checkpoint
from mocov3.weights.convert import BackboneWeights, load_into
from mocov3.weights.locate import guess_arch
from mocov3.weights.origin import origin_of
from mocov3.weights.start import load_start, starting_weights, views_of_start

MACHINES = {
    "cpu": Machine("cpu", 8 * GIB, 8),
    "8 GB": Machine("cuda", 8 * GIB, 8),
    "12 GB": Machine("cuda", 12 * GIB, 8),
    "80 GB": Machine("cuda", 80 * GIB, 16),
}


@functools.cache
def footprint_of(device, facts):
    return count_memory(PretrainConfig(**dict(facts)), sixteen_bits=device == "cuda")


def memory_on(device):
    """What a step takes, counted once for each network."""
    names = (
        "arch",
        "image_size",
        "patch_size",
        "moco_dim",
        "moco_mlp_dim",
        "small_stem",
        "stop_grad_conv1",
        "optimizer",
    )

    def memory(values, batch):
        try:
            return footprint_of(device, tuple((n, values[n]) for n in names if n in values)).peak(batch)
        except UserError:  # the network cannot take such images
            return 0.0

    return memory


def memory_by_pixels(arch):
    """Memory counted once, at 64 px, and taken to grow with the pixels: enough where a plan only has to be found."""
    counted = count_memory(PretrainConfig(arch=arch, image_size=64), sixteen_bits=True)
    return lambda values, batch: counted.peak(batch) * (values.get("image_size", 224) / 64) ** 2


def planned(count, machine, *, side=375, hours=None, given=None, seconds=0.0, before=(), memory=None, whole=0):
    images = Images(count, side, "photos", "because", "0.5,0.25", gray=False, whole=whole)
    given = given or {}
    memory = memory or memory_on(machine.device)
    choices = choose_settings(images, machine, hours, given, lambda values: (seconds, {}), memory, before)
    fields = {f.name for f in dataclasses.fields(PretrainConfig)}
    return PretrainConfig(data="x", recipe="auto", **given, **{c.name: c.value for c in choices if c.name in fields}), {
        c.name: c for c in choices
    }


@pytest.mark.parametrize("count", [50, 500, 5_000, 50_000, 1_281_167])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("side", [28, 64, 375, 3000])
def test_plans_are_runnable(count, machine, side):
    config, choices = planned(count, MACHINES[machine], side=side)
    config.check()
    assert Order(count - config.hold_out, config.batch_size).iterations >= 2
    assert config.image_size <= max(side, 32)
    need = memory_on(MACHINES[machine].device)(vars(config), config.batch_size)
    assert need <= 0.85 * MACHINES[machine].memory or config.batch_size == 2
    assert 100 <= config.epochs <= 800
    assert all(choice.reason for choice in choices.values())
    assert config.workers <= MACHINES[machine].cores
    if count >= 500:
        assert config.hold_out >= 20
        assert config.quality_every


@pytest.mark.parametrize(
    ("side", "schedule", "size", "local"), [(375, "", 32, "2:16"), (375, "48:0.5", 64, ""), (32, "12:0.5", 32, "")]
)
def test_cheap_parts_of_the_user_bound_what_is_chosen(side, schedule, size, local):
    """Full views are not smaller than those of the cheap part, and local views not larger."""
    given = {"image_size_schedule": schedule} if schedule else {}
    config, _ = planned(50_000, MACHINES["cpu"], side=side, given=given, hours=1, seconds=300)
    config.check()
    assert (config.image_size, config.local_views) == (size, local)


def test_a_budget_sets_epochs():
    cpu = MACHINES["cpu"]
    plan = planned(5_000, cpu, hours=1, seconds=60)[0]  # an epoch is of 4,500, 500 are held out
    assert (plan.epochs, plan.schedule) == (math.floor(0.95 * 3600 / 54), "wsd")
    for held in (0, 2_500):  # 5,000 are without those that the user keeps
        assert planned(5_000, cpu, hours=1, seconds=60, given={"hold_out": held})[0].epochs == math.floor(0.95 * 60)
    fraction = planned(5_000, cpu, hours=1, seconds=60, whole=50_000)[0]  # 2,000 of 50,000, hence of 5,000 each time
    assert (fraction.epochs, fraction.hold_out) == (math.floor(0.95 * 60 / 0.96), 2_000)
    small = planned(200, cpu, hours=1, seconds=60, whole=2_000, given={"batch_size": 190})[0]
    assert small.hold_out == 100  # an epoch of 190 is left
    for enough in (planned(5_000, cpu, hours=24, seconds=60)[0], planned(5_000, cpu, seconds=60)[0]):
        assert enough.schedule == "cosine"  # the time does not bind, or nobody named it
    assert planned(5_000, cpu, hours=1, seconds=60, given={"epochs": 20})[0].schedule == "cosine"
    assert planned(5_000, cpu, seconds=60)[0].epochs == math.floor(0.85 * 3600 / 54)  # an hour on a CPU unless told
    assert planned(5_000, MACHINES["8 GB"], seconds=60)[0].epochs > 400
    config, choices = planned(1_281_167, cpu, hours=2, seconds=90_000)
    assert (config.epochs, config.max_hours) == (1, 2.4)
    assert config.schedule == "wsd"
    assert "fewer images" in choices["epochs"].reason
    assert [parse_budget(t) for t in ("90s", "30m", "2h", "1.5d", "3")] == [0.025, 0.5, 2, 36, 3]
    for text in ("", "h", "-1h", "0", "inf", "nan", "soon"):
        with pytest.raises(ValueError, match=r"|soon"):
            parse_budget(text)


def cpu_plan(times, **more):
    """(arch, side) on a CPU where an epoch of each takes so many seconds, in an hour."""
    images = Images(more.pop("count", 50_000), more.pop("side", 375), "photos", "because", "0.5,0.25", gray=False)
    images = dataclasses.replace(images, detail=more.pop("detail", 1.0))
    asked = []

    def speed(values):
        asked.append((values["arch"], values["image_size"]))
        return times.get(asked[-1]) or times[values["arch"]], {}

    machine = dataclasses.replace(MACHINES["cpu"], bf16=more.pop("bf16", False))
    choices = choose_settings(images, machine, 1, more, speed, lambda values, batch: 0.0)
    chosen = {c.name: c.value for c in choices} | more
    assert asked[-1] == (chosen["arch"], chosen["image_size"])
    assert len(set(asked)) == len(asked), "something was measured twice"
    return chosen


SLOW = {"resnet10_w48": 600, "resnet10_w32": 800, "resnet10_w16": 400}
"""5, 3 and 7 epochs of 50,000 images in the hour."""


def test_a_cpu_takes_the_widest_that_sees_the_images_often_enough():
    assert (cpu_plan(dict.fromkeys(SLOW, 60))["arch"], cpu_plan(dict.fromkeys(SLOW, 60))["image_size"]) == (
        "resnet10_w48",
        64,
    )
    plan = cpu_plan({**SLOW, "resnet10_w32": 600})  # 5 epochs, 250,000 images
    assert (plan["arch"], plan["image_size"]) == ("resnet10_w32", 32)
    assert cpu_plan(SLOW)["arch"] == "resnet10_w16"
    assert cpu_plan(SLOW, side=32)["arch"] == "resnet10_w16"
    assert cpu_plan({"resnet10_w32": 600}, side=32)["arch"] == "resnet10_w32", "the widest is for larger images"
    # few images: as many epochs as a run without a limit has are enough
    assert cpu_plan(dict.fromkeys(SLOW, 3), side=32, count=300)["arch"] == "resnet10_w32"
    # what is given: few epochs that are wanted anyhow are no reason, and an arch stays
    assert cpu_plan(SLOW, epochs=5)["arch"] == "resnet10_w48"
    given = cpu_plan({"resnet18": 600}, arch="resnet18")
    assert given["image_size"] == 32


def test_larger_views_where_small_ones_lose_most_of_the_edges():
    fast, slow = ({**SLOW, "resnet10_w32": 600, ("resnet10_w16", 64): seconds} for seconds in (3000, 7000))
    plans = {
        (0.1, "fast"): cpu_plan(fast, detail=0.1),  # an epoch of 50,000
        (0.1, "slow"): cpu_plan(slow, detail=0.1),  # none
        (0.1, "few"): cpu_plan({**SLOW, "resnet10_w48": 100, ("resnet10_w16", 64): 60}, detail=0.1, count=2000),
        (0.25, "fast"): cpu_plan(fast, detail=0.25),
    }
    assert {what: (plan["arch"], plan["image_size"]) for what, plan in plans.items()} == {
        (0.1, "fast"): ("resnet10_w16", 64),
        (0.1, "slow"): ("resnet10_w32", 32),
        (0.1, "few"): ("resnet10_w16", 64),  # 51 epochs of 2,000
        (0.25, "fast"): ("resnet10_w32", 32),
    }
    # neither images that are small themselves nor a size or arch that is given ask for it
    assert cpu_plan(fast, detail=0.1, side=32)["image_size"] == 32
    assert cpu_plan(fast, detail=0.1, image_size=32)["arch"] == "resnet10_w32"
    assert cpu_plan({"resnet18": 600, ("resnet18", 64): 2000}, detail=0.1, arch="resnet18")["image_size"] == 64


def test_a_cpu_that_multiplies_16_bits_trains_in_them():
    times = {"vit_micro": 60, **SLOW}
    assert cpu_plan(times, arch="vit_micro", bf16=True)["precision"] == "bf16"
    assert cpu_plan(times, arch="vit_micro")["precision"] == "auto"
    assert cpu_plan(times, bf16=True)["precision"] == "bf16"


def test_one_process_loads_small_images_on_two_cores():
    cpu = MACHINES["cpu"]
    two, four = (dataclasses.replace(cpu, cores=cores) for cores in (2, 4))
    assert [planned(5_000, machine, side=32)[0].workers for machine in (two, four)] == [1, 4]
    assert planned(5_000, two, side=375)[0].workers == 2  # a large file would stop the steps


def test_what_planning_took_is_not_planned_again():
    cpu = MACHINES["cpu"]
    images = Images(5_000, 375, "photos", "because", "0.5,0.25", gray=False)
    plans = {}
    for spent in (0.0, 600.0, 1e6):
        choices = choose_settings(
            images, cpu, 1, {}, lambda values: (60, {}), memory_on("cpu"), spent=lambda spent=spent: spent
        )
        plans[spent] = {c.name: c.value for c in choices}["epochs"]
    assert plans == {0.0: 63, 600.0: 52, 1e6: 1}
    choices = choose_settings(images, cpu, None, {}, lambda values: (60, {}), memory_on("cpu"), spent=lambda: 600.0)
    assert {c.name: c.value for c in choices}["epochs"] == 56, "without a budget it does not count"


def test_judgements_are_two_minutes_apart():
    cpu = MACHINES["cpu"]
    assert planned(5_000, cpu, hours=1, seconds=60)[0].quality_every == 3
    assert planned(5_000, cpu, hours=1, seconds=500)[0].quality_every == 1
    assert planned(5_000, cpu, hours=100, seconds=1)[0].quality_every == 134


def test_local_views_where_they_were_measured():
    assert cpu_plan(SLOW, side=32)["local_views"] == "2:16"
    assert cpu_plan(SLOW, side=28)["local_views"] == "2:14"
    assert cpu_plan(SLOW, side=32, local_views="")["local_views"] == ""
    times = {"vit_conv_micro": 60, "resnet18": 60, **SLOW}
    others = [{"arch": "vit_conv_micro"}, {"arch": "resnet18"}, {"init": "weights.pth"}, {"view_preset": "gray"}]
    for other in (*others, {"image_size": 64, "arch": "resnet10_w48"}):
        assert "local_views" not in cpu_plan(times, **{"side": 32, **other}), other
    assert not planned(5_000, MACHINES["12 GB"], side=32)[0].local_views


def test_small_vits_take_what_was_measured_for_them():
    plan = cpu_plan({"vit_conv_micro": 60, **SLOW}, arch="vit_conv_micro")
    assert (plan["patch_size"], plan["image_size"], plan["batch_size"], plan["lr"]) == (8, 64, 256, 1e-3)
    assert (plan["moco_dim"], plan["moco_mlp_dim"]) == (128, 512)
    assert "stop_grad_conv1" not in plan, "there is no projection of patches"
    plain = cpu_plan({"vit_micro": 60, **SLOW}, arch="vit_micro")
    assert plain["stop_grad_conv1"]
    assert plain["patch_size"] == 4


def test_what_is_given_stays_and_decides_the_rest():
    config, choices = planned(5_000, MACHINES["12 GB"], given={"arch": "vit_small", "batch_size": 48, "hold_out": 0})
    assert (config.arch, config.batch_size, config.optimizer, config.quality_every) == ("vit_small", 48, "adamw", 0)
    assert config.stop_grad_conv1
    assert "arch" not in choices
    fitted = choose_settings(
        Images(9000, 375, "photos", "x", "0.5,0.2", False),
        MACHINES["8 GB"],
        None,
        {},
        lambda values: (1.0, {"batch_size": 8}),
        memory_on("cuda"),
    )
    assert [c.value for c in fitted if c.name == "batch_size"] == [8]


def test_auto_runs_saves_and_goes_on(tmp_path, capsys):
    rng = np.random.Generator(np.random.PCG64(0))
    data = tmp_path / "data"
    data.mkdir()
    for i in range(240):
        Image.fromarray(rng.integers(0, 256, (30, 36, 3), dtype=np.uint8)).save(data / f"{i}.png")
    run = tmp_path / "run"
    flags = ["--output-dir", str(run), "-j", "0", "--device", "cpu", "--seed", "3", "--moco-mlp-dim", "16"]
    assert main(["pretrain", str(data), *flags, "--budget", "12h", "--max-steps", "9"]) == 0
    out = capsys.readouterr().out
    for line in ("image-size", "28", "predicted time", "given by you", "Fewer than"):
        assert line in out
    config = PretrainConfig(**read_yaml(run / "config.yaml", PretrainConfig))
    assert (config.recipe, config.arch, config.image_size, config.hold_out) == ("auto", "resnet10_w32", 28, 24)
    # a resume chooses nothing anew, whatever the machine does now
    assert main(["pretrain", str(data), *flags, "--resume", "auto", "--max-steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "resumed at" in out
    assert "predicted" not in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["resumed"] == 1
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(run / "config.yaml"), "--output-dir", str(again), "--max-steps", "2"]) == 0
    assert PretrainConfig(**read_yaml(again / "config.yaml", PretrainConfig)).epochs == config.epochs


def test_auto_refuses(tmp_path, images):
    out = ["--output-dir", tmp_path / "out"]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    assert "none of 3 images" in refused("pretrain", tmp_path, *out)
    assert "--budget" in refused("pretrain", images, *out, "--budget", "soon")
    assert "--recipe auto plans" in refused("pretrain", images, *out, "--budget", "1h", "--recipe", "defaults")
    assert "give --init" in refused("pretrain", images, *out, "--recipe", "adapt")
    assert "no such file" in refused("pretrain", images, *out, "--recipe", "adapt", "--init", tmp_path / "none")
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (8, 8)).save(one / "1.png")
    assert "two or more" in refused("pretrain", one, *out)
    assert "--layer-decay" in refused("pretrain", images, *TINY, *out, "--layer-decay", "0")
    assert "layer4.0" in refused("pretrain", images, *TINY, *out, "--freeze-until", "layer9")
    assert "would be frozen" in refused("pretrain", images, *TINY, *out, "--freeze-until", "layer4")


# --- facts that plans rest on ------------------------------------------------------------------------------


def scenes(n, seed=0):
    rng = np.random.Generator(np.random.PCG64(seed))
    small = rng.normal(size=(n, 4, 4))
    return 128 + 40 * np.kron(small, np.ones((4, 4)))


def test_survey_tells_up_alike_and_near():
    flat = scenes(300)
    assert uprightness(flat) < 2  # nothing is up in noise
    sky = flat + 40 * np.linspace(1, -1, 16)[None, :, None]
    assert uprightness(sky) > 20
    assert abs(alikeness(flat)) < 0.05
    assert alikeness(flat[:1] + 0.2 * (flat - 128)) > 0.7
    pairs = near_pairs(np.concatenate([flat[:50], flat[7:9] + 1, 0 * flat[:2] + 100]))
    assert pairs == [(7, 50), (8, 51)]  # flat images have nothing to compare
    base = Survey(300, 300, alike=0.1, upright=30.0)
    assert propose(base)[0] == "photos"
    assert propose(dataclasses.replace(base, gray_share=1.0))[0] == "gray"
    assert propose(dataclasses.replace(base, upright=1.2))[0] == "aerial"
    assert propose(dataclasses.replace(base, upright=2.4))[0] == "photos"
    assert propose(dataclasses.replace(base, upright=1.2, examined=150))[0] == "photos", "too few to tell"
    assert propose(dataclasses.replace(base, alike=0.8))[0] == "inspection"


# --- starting weights --------------------------------------------------------------------------------------


def test_starting_weights_of_others(tmp_path, images):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "tv.pth")
    import safetensors.torch

    safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), tmp_path / "timm.safetensors")
    for name in ("tv.pth", "timm.safetensors"):
        assert guess_arch(starting_weights(str(tmp_path / name)).state) == "resnet18"
    model = models.build("resnet18", dim=16, mlp_dim=16)
    before = model.base_encoder.fc[0].weight.clone()
    load_start(str(tmp_path / "tv.pth"), [model.base_encoder, model.momentum_encoder], "resnet18")
    x = torch.randn(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    for encoder in (model.base_encoder, model.momentum_encoder):
        assert torch.equal(encoder.eval().features(x), theirs.eval()(x))
    assert torch.equal(model.base_encoder.fc[0].weight, before)  # heads stay fresh
    out = ["--output-dir", tmp_path / "out"]
    assert "-a resnet18 fits it" in refused("pretrain", images, *TINY, *out, "--init", tmp_path / "tv.pth")
    assert "no such model" in refused("pretrain", images, *TINY, *out, "--init", "timm/resnet18x")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    assert "safetensors" in refused("pretrain", images, *TINY, *out, "--init", tmp_path / "bad.safetensors")


def test_timm_weights_that_cannot_be_fetched(monkeypatch, images, tmp_path):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("timm.create_model", offline)
    line = refused("pretrain", images, *TINY, "--output-dir", tmp_path, "--init", "timm/resnet18")
    assert "could not be fetched" in line
    with models.shapes_only():
        other = timm.models.resnet.resnet18(), timm.models.vision_transformer.vit_tiny_patch16_224(num_classes=0)
    for name, model, arch in (
        ("timm/resnet18.a1_in1k", other[0], "resnet18"),
        ("timm/vit_tiny_patch16_224", other[1], "timm/vit_tiny_patch16_224"),
    ):
        monkeypatch.setattr("timm.create_model", lambda *args, model=model, **kwargs: model)
        assert starting_weights(name).arch == arch


@pytest.mark.parametrize("arch", ["resnet10_w48", "resnet34", "vit_tiny", "vit_conv_small", "wide_resnet50_2"])
def test_archs_are_recognised(arch):
    encoder = build_backbone(arch, image_size=32)
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith(("fc.", "head."))}
    assert guess_arch(state) == arch
    assert guess_arch({**state, "more": torch.ones(1)}) is None


def test_position_tables_of_another_grid():
    def table_after(table):
        encoder = build_backbone("vit_tiny", image_size=64)
        state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("head.")}
        load_into(encoder, BackboneWeights("backbone", None, {**state, "pos_embed": table}), "x")
        return encoder.pos_embed

    assert torch.equal(table_after(sincos_position_embedding(14, 14, 192)), sincos_position_embedding(4, 4, 192))
    learned = torch.randn(1, 1 + 14 * 14, 192)
    wanted = timm.layers.resample_abs_pos_embed(learned, [4, 4], [14, 14], num_prefix_tokens=1)
    assert torch.allclose(table_after(learned), wanted)
    with pytest.raises(UserError, match="does not fit"):
        table_after(torch.randn(1, 197, 96))


# --- groups, freezing, adapt -------------------------------------------------------------------------------


def test_groups_number_parameters_as_without():
    for arch in ("resnet18", "vit_tiny", "timm/convnext_atto"):
        model = models.build(arch, image_size=32, dim=8, mlp_dim=8)
        groups = parameter_groups(model, 0.5, staged=True)
        assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in model.parameters()]
        assert parameter_groups(model, 1.0, staged=False) == list(model.parameters())
        scales = [g["full_scale"] for g in groups if g["part"] == "backbone"]
        assert scales == sorted(scales)
        assert scales[-1] == 0.5
        numbers = block_numbers(model.base_encoder)
        assert max(numbers.values()) == {"resnet18": 8, "vit_tiny": 13}.get(arch, max(numbers.values()))
    assert len(set(numbers.values())) > 8


def test_held_backbones_and_frozen_blocks_stay():
    model = models.build("resnet10_w32", image_size=16, dim=8, mlp_dim=8).train()
    freeze_until(model.base_encoder, "layer2")
    optimizer = build_optimizer(parameter_groups(model, 0.5, staged=True), "adamw", weight_decay=0.1, momentum=0.9)

    def trained(held):
        before = {k: v.clone() for k, v in model.base_encoder.named_parameters()}
        scale_backbone(optimizer, 1.0 - held)
        set_learning_rate(optimizer, 0.1)
        optimizer.zero_grad()
        model(*torch.randn(2, 8, 3, 16, 16), 0.9).backward()
        optimizer.step()
        return {k.split(".")[0] for k, v in model.base_encoder.named_parameters() if not torch.equal(v, before[k])}

    assert trained(held=True) == {"fc"}
    assert trained(held=False) == {"layer3", "layer4", "fc"}
    vit = build_backbone("vit_tiny", image_size=32)
    freeze_until(vit, "blocks.3")
    assert not vit.blocks[3].mlp.fc1.weight.requires_grad
    assert vit.blocks[4].mlp.fc1.weight.requires_grad


def kind_of(arch):
    """(optimizer, highest base rate) that the kind of network is adapted with."""
    if arch in SMALL_VITS:
        return "adamw", 1e-3
    if arch.startswith(("vit", "timm/")):
        return "adamw", 1.5e-4  # arXiv 2104.02057, appendix
    return ("adamw", 8e-3) if arch in SMALL_RESNETS else ("lars", 0.3)


@pytest.mark.parametrize(
    ("given", "optimizer", "lr"),
    [
        ({}, "muon", 1.6e-2),
        ({"optimizer": "adamw"}, "adamw", 8e-3),
        ({"fsdp": True}, "adamw", 8e-3),
        ({"optimizer": "lars"}, "lars", 0.3),
        ({"arch": "resnet18"}, "lars", 0.3),
        ({"arch": "resnet18", "optimizer": "muon"}, "muon", 1e-3),
        ({"arch": "resnet50", "optimizer": "adamw"}, "adamw", 1e-3),
        ({"arch": "vit_micro", "optimizer": "lars"}, "lars", 0.3),
        ({"arch": "vit_micro", "optimizer": "muon"}, "muon", 1e-3),
    ],
)
def test_rates_are_those_of_the_optimizer_and_of_the_network(given, optimizer, lr):
    config, _ = planned(50_000, MACHINES["cpu"], side=32, given=given)
    config.check()
    assert (config.optimizer, config.lr) == (optimizer, lr)
    assert config.weight_decay == 1e-6 if optimizer == "lars" else config.weight_decay >= 0.05


@pytest.mark.parametrize(("side", "given", "blur"), [(32, {}, "0,0"), (375, {}, ""), (32, {"view_preset": "gray"}, "")])
def test_small_photographs_are_not_blurred(side, given, blur):
    """Up to 2 px, as views of 224 px are, would leave nothing to see; other presets have their own."""
    config, _ = planned(50_000, MACHINES["cpu"], side=side, given=given)
    assert config.blur_probability == blur
    assert config.preset.blur_probability == ((0.0, 0.0) if blur else PRESETS[config.view_preset].blur_probability)


def test_loading_takes_its_share_of_the_time():
    """Between the steps where no process does it; on a CPU half a core otherwise; beside them on a GPU."""
    assert speed.total_seconds(1.0, 0.5, "cpu", workers=0) == 1.5
    assert speed.total_seconds(1.0, 0.5, "cpu", workers=2) == 1.25
    assert speed.total_seconds(1.0, 0.5, "cuda", workers=2) == 1.0


@pytest.mark.parametrize(
    ("device", "flags", "share"),
    [
        ("cuda", {}, 0.72),
        ("cuda", {"compile": False}, 1),
        ("cuda", {"image_size": 32}, 1),
        ("cpu", {"compile": True}, 1),
    ],
)
def test_an_epoch_of_compiled_steps_is_planned_as_such(monkeypatch, device, flags, share):
    """Measured are eager ones: compiling takes up to a minute."""
    monkeypatch.setattr(speed, "pick_device", lambda *_: torch.device(device))
    monkeypatch.setattr(speed, "_step_times", lambda *_: [2.0, 3.0, 4.0])
    monkeypatch.setattr(speed, "image_seconds", lambda *_: 0.0)
    config = PretrainConfig(**{"batch_size": 512, **flags})
    training, _, batch = speed.epoch_seconds(config, FashionMnist("val"), 5_120)
    assert (training, batch) == (pytest.approx(10 * 3.0 * share), 512)


@pytest.mark.parametrize(("unseen", "held"), [(0, 24), (19, 24), (20, 0)])
def test_a_validation_part_judges_in_place_of_training_images(unseen, held, tmp_path, monkeypatch):
    for i in range(240 + unseen):
        place = tmp_path / ("train" if i < 240 else "val") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i % 256, 0, 0)).save(place / f"{i}.png")
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 0.1, config.batch_size))
    layers = read_pretrain([str(tmp_path), "--recipe", "auto", "--device", "cpu"], "x", None)
    config = propose_settings(layers).config
    config.check()
    assert (config.hold_out, config.quality_every > 0) == (held, True)


@pytest.mark.parametrize("arch", [*BUILT_IN_ARCHS, "timm/vit_small_patch16_224", "timm/convnext_atto"])
@pytest.mark.parametrize("pairs", [True, False])
def test_adapt_takes_the_row_of_the_kind_of_network(arch, pairs):
    given = {**RECIPES["adapt"].settings, "arch": arch, "init": "start.pth.tar"}
    optimizer, highest = kind_of(arch)
    paired = pairs and arch.startswith(("vit", "timm/vit"))
    small = paired and arch in SMALL_VITS
    before = choices_of(row_of(arch, 3000, pairs=pairs))
    same = {"given": given, "before": before, "memory": memory_by_pixels(arch)}
    for machine, side in itertools.product(MACHINES.values(), (28, 70, 375)):
        config, choices = planned(3000, machine, side=side, **same)
        config.check()
        assert ("not measured" in choices["lr"].reason) != (small or arch in SMALL_RESNETS)
        assert ("not measured" in choices["epochs"].reason) != small
        assert choices["preserve"].value == config.preserve == 4.0 * paired
        assert config.optimizer == optimizer
        assert 0 < config.lr <= highest * (4 if paired else 1)
        assert choices["lr"].reason
        assert (config.layer_decay, config.lora, config.freeze_epochs) == ((1, 8, 0) if paired else (0.75, 0, 1))
        assert config.warmup_epochs > 0
        assert config.freeze_epochs + config.warmup_epochs < config.epochs


def test_the_table_of_adapt_goes_before_the_rules_and_after_flags():
    cpu = next(machine for machine in MACHINES.values() if machine.device == "cpu")
    small, large = (row_of("resnet10_w48", count) for count in (4_000, 10_001))
    assert small.measured
    assert not large.measured
    given = {**RECIPES["adapt"].settings, "arch": "resnet10_w48"}
    config, choices = planned(4_000, cpu, given={**given, "lr": 0.5}, before=choices_of(small))
    assert (config.lr, config.epochs, config.freeze_epochs, config.warmup_epochs) == (0.5, small.epochs, 1, 1)
    assert config.image_size == 64, "few epochs are what is wanted, not what the time allows"
    assert "lr" not in choices
    assert choices["layer_decay"].reason.endswith("measured on 4,000 images (docs/own-images.md)")
    for hours, epochs in ((1.0, 4), (0.4, 1)):  # the time decides where it is short
        config, _ = planned(4_000, cpu, given=given, before=choices_of(small), seconds=700.0, hours=hours)
        config.check()
        assert config.epochs == epochs
    assert (config.freeze_epochs, config.warmup_epochs) == (0, 0)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], (3e-4, 1.0, 8, 4.0)),
        (["--lora", "0"], (1.5e-4, 0.75, 0, 0.0)),
        (["--freeze-until", "blocks.2"], (1.5e-4, 0.75, 0, 0.0)),
    ],
)
def test_adapt_on_a_vit_from_the_command_line(images, tmp_path, more, expected):
    start = tmp_path / "start.pth.tar"
    model = models.build("vit_tiny", image_size=32, dim=16, mlp_dim=32)
    checkpoint.write(
        start, {"arch": "vit_tiny", "epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    )
    out = tmp_path / "out"
    flags = [
        "--recipe",
        "adapt",
        "--init",
        start,
        "-j",
        "0",
        "--device",
        "cpu",
        "--image-size",
        "32",
        "-b",
        "16",
        "--max-steps",
        "1",
        "--patch-size",
        "16",
    ]
    assert main(["pretrain", str(images), *map(str, flags), *more, "--output-dir", str(out)]) == 0
    saved = read_yaml(out / "config.yaml", PretrainConfig)
    assert (saved["optimizer"], saved["warmup_epochs"]) == ("adamw", 1)
    assert (saved["lr"], saved["layer_decay"], saved["lora"], saved["preserve"]) == expected


@pytest.mark.parametrize(
    ("trained", "view_preset", "numbers"),
    [
        ({}, "photos", (*PRESETS["photos"].mean, *PRESETS["photos"].std)),
        ({"view_preset": "gray", "mean_std": "0.3,0.4"}, "gray", (0.3, 0.3, 0.3, 0.4, 0.4, 0.4)),
    ],
)
def test_adapting_reads_images_as_the_weights_know_them(trained, view_preset, numbers, tmp_path, monkeypatch):
    """Grey images, of which the measured normalisation and the whole of the image would be another network's input."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (28, 30), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    start = tmp_path / "start.pth.tar"
    model = models.build("vit_micro", image_size=32, patch_size=8, dim=16, mlp_dim=32)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    entry = {"mocov3": {"config": {"arch": "vit_micro", **trained}}} if trained else {}
    checkpoint.write(start, {"arch": "vit_micro", "epoch": 1, "state_dict": state, **entry})
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 0.1, config.batch_size))
    given = [str(tmp_path / "data"), "--recipe", "adapt", "--init", str(start), "--device", "cpu"]
    proposal = propose_settings(read_pretrain(given, "x", None))
    assert proposal.images.preset == "gray"
    assert proposal.config.view_preset == view_preset
    assert (*proposal.config.preset.mean, *proposal.config.preset.std) == pytest.approx(numbers)
    asked = propose_settings(read_pretrain([*given, "--mean-std", "0.5,0.5"], "x", None)).config
    assert asked.preset.mean == (0.5, 0.5, 0.5)


def test_rates_of_the_table_are_of_its_optimizer(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32), (i, 2 * i, 9)).save(tmp_path / "data" / f"{i}.png")
    start = tmp_path / "start.pth.tar"
    state = models.build("vit_micro", image_size=32, patch_size=8, dim=16, mlp_dim=32).state_dict()
    checkpoint.write(start, {"arch": "vit_micro", "state_dict": {f"module.{k}": v for k, v in state.items()}})
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 0.1, config.batch_size))
    given = [str(tmp_path / "data"), "--recipe", "adapt", "--init", str(start), "--device", "cpu"]
    ours, theirs = (
        propose_settings(read_pretrain([*given, *more], "x", None)).config for more in ([], ["--optimizer", "muon"])
    )
    assert (ours.optimizer, ours.lr, ours.lora) == ("adamw", 4e-3, 8)
    assert (theirs.optimizer, theirs.lr, theirs.lora) == ("muon", 1e-3, 8)


def test_a_fraction_of_a_folder_makes_epochs_shorter(tmp_path, monkeypatch):
    """And its time, its passes and its batches are planned so."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(400):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")

    def epoch_seconds(config, source, count):
        return 0.05 * count, 0.0, config.batch_size

    monkeypatch.setattr(speed, "epoch_seconds", epoch_seconds)
    given = ["--recipe", "auto", "--device", "cpu", "--budget", "5m"]
    whole, tenth = (
        propose_settings(read_pretrain([f"{tmp_path / 'data'}{part}", *given], "x", None)).config
        for part in ("", ":0.1")
    )
    assert 9 <= tenth.epochs / whole.epochs <= 13
    assert tenth.batch_size <= 40
    tenth.check()


def test_timms_weights_are_read_by_their_own_normalisation():
    name, views = views_of_start("timm/vit_small_patch16_224.augreg_in21k_ft_in1k")
    assert (name, views.mean, views.std) == ("photos", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_backbone_warms_up_when_it_thaws():
    def at(epoch, freeze=2, warmup=4):
        return schedules.thaw(epoch, freeze_epochs=freeze, warmup_epochs=warmup)

    assert [at(e) for e in (0, 1.99, 2, 3, 4.5, 6, 9)] == pytest.approx([0, 0, 0, 0.25, 0.625, 1, 1])
    assert [at(e, warmup=0) for e in (1.9, 2, 3)] == [0, 1, 1]
    assert at(0, freeze=0, warmup=0) == 1
    model = models.build("resnet18", dim=8, mlp_dim=8)
    optimizer = build_optimizer(parameter_groups(model, 0.5, staged=True), "lars", weight_decay=0, momentum=0.9)
    for factor in (0.0, 0.25, 1.0):
        scale_backbone(optimizer, factor)
        set_learning_rate(optimizer, 2.0)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(
                2 * group["full_scale"] * (factor if group["part"] == "backbone" else 1)
            )


def test_freezing_must_leave_epochs(images, tmp_path):
    flags = ("--epochs", "2", "--freeze-epochs", "2", "--output-dir", tmp_path / "out")
    assert "--freeze-epochs 2 leaves none" in refused("pretrain", images, *TINY, *flags)


def test_adapt_holds_then_trains_and_resumes(images, tmp_path):
    start = tmp_path / "start.pth.tar"
    torch.manual_seed(2)
    model = models.build("resnet10_w32", dim=16, mlp_dim=32)
    checkpoint.write(
        start,
        {
            "arch": "resnet10_w32",
            "epoch": 1,
            "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
            "mocov3": {"origin": "made by hand", "licence": "CC-BY-NC 4.0"},
        },
    )
    flags = [
        "--recipe",
        "adapt",
        "--init",
        str(start),
        "-j",
        "0",
        "--device",
        "cpu",
        "--seed",
        "1",
        "-b",
        "16",
        "--epochs",
        "3",
        "--freeze-epochs",
        "1",
        "--quality-every",
        "2",
        "--image-size",
        "32",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["pretrain", str(images), *flags, "--output-dir", str(whole), "--hold-out", "0"]) == 0
    saved = [torch.load(whole / f"checkpoint_000{e}.pth.tar", weights_only=True) for e in range(3)]
    key = "module.base_encoder.layer1.0.conv1.weight"
    assert torch.equal(saved[0]["state_dict"][key], model.state_dict()[key.removeprefix("module.")])
    assert not torch.equal(saved[1]["state_dict"][key], saved[0]["state_dict"][key])
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["skipped"] == 0 for line in lines)
    assert saved[0]["mocov3"]["licence"] == "CC-BY-NC 4.0"
    assert "made by hand" in origin_of(saved[0])["origin"]
    for steps in ("5", "12"):
        more = ["--resume", "auto"] if steps == "12" else []
        assert (
            main(
                [
                    "pretrain",
                    str(images),
                    *flags,
                    "--output-dir",
                    str(parts),
                    "--hold-out",
                    "0",
                    "--max-steps",
                    steps,
                    *more,
                ]
            )
            == 0
        )
    ended = torch.load(parts / "checkpoint_0002.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(v, ended[k]) for k, v in saved[2]["state_dict"].items())
    assert load_backbone(parts / "best_unlabelled.pth.tar")


@pytest.mark.parametrize(
    ("arch", "flags", "kept"),
    [
        ("vit_tiny", {"patch_size": 8}, {"patch_size": 8, "image_size": 32}),
        ("vit_tiny", {"patch_size": 16}, {"patch_size": 16, "image_size": 32}),
        ("resnet18", {}, {"small_stem": False, "image_size": 28}),
        ("resnet18", {"small_stem": True}, {"small_stem": True, "image_size": 28}),
    ],
)
def test_adapting_keeps_the_shapes_of_its_weights_on_small_images(arch, flags, kept, tmp_path, monkeypatch):
    """What is chosen for images of 28 px, of any network, are not the patches and the stem that weights came with."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (28, 30, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    start = tmp_path / "start.pth.tar"
    model = models.build(arch, image_size=32, dim=16, mlp_dim=32, **flags)
    checkpoint.write(
        start, {"arch": arch, "epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    )
    monkeypatch.setattr(speed, "epoch_seconds", lambda config, source, count: (1.0, 0.1, config.batch_size))
    layers = read_pretrain(
        [str(tmp_path / "data"), "--recipe", "adapt", "--init", str(start), "--device", "cpu"], "x", None
    )
    config = propose_settings(layers).config
    config.check()
    assert {name: getattr(config, name) for name in kept} == kept
    build_model(dataclasses.replace(config, moco_dim=8, moco_mlp_dim=8), World(0, 1, torch.device("cpu")))


def test_a_network_that_cannot_take_such_images_is_refused(tmp_path):
    for i in range(40):
        Image.new("RGB", (30, 30), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    message = refused("pretrain", tmp_path, "-a", "timm/convnext_atto", "--output-dir", tmp_path / "run")
    assert "--arch timm/convnext_atto: cannot take images of 28 px" in message
    assert "--image-size" in message
