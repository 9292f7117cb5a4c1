"""Fine-tuning's parts against timm's and torch's own: groups, schedule, order, mixing, depth, transforms, a step."""

import dataclasses
import random

import numpy as np
import pytest
import timm
import torch
import tuning_tasks
from PIL import Image
from starting import launch_ranks
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch.utils.data import DistributedSampler
from torchvision.transforms.functional import InterpolationMode, resized_crop

from mocov3.data import FashionMnist
from mocov3.data.loading.labelled import _PLAIN, CropView
from mocov3.data.loading.supervised import TRANSFER_CROP, DeitAugment, Repeated, key, seeded, stratified
from mocov3.data.views.draws import draw, permutation
from mocov3.distributed import World
from mocov3.finetuning.batches import batches, group_order, iterations
from mocov3.finetuning.evaluate import Accuracy, count
from mocov3.finetuning.mixing import Depth, Mixer, erase
from mocov3.finetuning.model import (
    build_classifier,
    build_criterion,
    build_optimizer,
    build_schedule,
    parameter_groups,
    set_epoch,
)
from mocov3.finetuning.step import TuneStep
from mocov3.models.precision import Precision

WORLD = World(0, 1, torch.device("cpu"))


def classifier(arch="vit_tiny", classes=5, size=32, drop_path=0.1):
    return build_classifier(arch, classes, image_size=size, patch_size=16, small_stem=False, drop_path=drop_path)


def by_name(groups, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_parameter_groups_are_timms(layer_decay):
    ours = classifier()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    made = create_optimizer_v2(
        theirs, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay if layer_decay < 1 else None
    )
    got = by_name(parameter_groups(ours, weight_decay=0.05, layer_decay=layer_decay), ours)
    assert got == by_name(made.param_groups, theirs)
    assert set(got) == {n for n, _ in ours.named_parameters()}  # all trained, the position table too
    assert got["pos_embed"][0] == got["cls_token"][0] == got["blocks.0.norm1.weight"][0] == got["head.bias"][0] == 0
    assert got["blocks.0.mlp.fc1.weight"][0] == 0.05
    optimizer = build_optimizer(parameter_groups(ours, weight_decay=0.05, layer_decay=layer_decay), lr=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet10t"])
def test_layer_decay_reaches_resnets(arch):
    model = classifier(arch)
    got = by_name(parameter_groups(model, weight_decay=0.05, layer_decay=0.5), model)
    assert set(got) == {n for n, _ in model.named_parameters()}
    prefix, head = ("backbone.", "projector") if "/" in arch else ("", "fc")
    assert got[f"{head}.weight"] == (0.05, 1.0)
    assert got[f"{head}.bias"] == (0.0, 1.0)
    scales = [got[f"{prefix}layer{i}.0.conv1.weight"][1] for i in (1, 2, 3, 4)]
    assert scales == sorted(scales)
    assert scales[-1] < 1
    assert len(set(scales)) == 4


def test_the_head_and_depth():
    model = classifier(classes=1000, drop_path=0.2)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.head.bias.detach().abs().max()) == 0
    assert all(p.requires_grad for p in model.parameters())
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12).tolist())
    assert [b.attn.num_heads for b in classifier("vit_small").blocks] == [12] * 12


def test_networks_without_branches_are_tuned_without_depth():
    assert Depth(classifier("timm/resnet10t"), 0).layers
    plain = classifier("timm/dla46_c", classes=3)
    assert not Depth(plain, 0).layers
    assert plain.projector.out_features == 3


def test_the_schedule_is_deits():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([{"params": [model.weight], "lr_scale": 0.5}, {"params": [model.bias]}], lr=1e-3)
    ours = build_schedule(optimizer, epochs=30, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
    other = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=1e-3)
    theirs = CosineLRScheduler(
        other, t_initial=30, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1, t_in_epochs=True
    )
    table = []
    for epoch in range(30):  # as DeiT: train the epoch, then step by its number
        table.append(other.param_groups[0]["lr"])
        theirs.step(epoch)
    for epoch in (7, 0, 29, 1, *range(30)):  # in any order: a resume goes straight to its epoch
        assert set_epoch(ours, epoch) == pytest.approx(table[epoch], rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(table[epoch] / 2, rel=1e-12)
    assert table[0] == table[1] == 1e-6
    assert max(table) <= 1e-3
    closed = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * 14 / 30))
    assert table[15] == pytest.approx(closed)


@pytest.mark.parametrize(("n", "groups", "repeats"), [(600, 4, 3), (1000, 8, 3), (50, 2, 3), (101, 4, 1)])
def test_the_order_is_deits(n, groups, repeats):
    for group in range(groups):
        if repeats == 3:  # older timm deals none where fewer
            theirs = RepeatAugSampler(range(n), groups, group, shuffle=False, selected_round=256 if n >= 256 else 0)
        else:
            theirs = DistributedSampler(range(n), groups, group, shuffle=False)
        got = group_order(n, repeats=repeats, groups=groups, group=group)
        assert (got // repeats).tolist() == list(theirs)
    dealt = [group_order(n, repeats=repeats, groups=groups, group=g) for g in range(groups)]
    if n >= 256 and repeats == 3:  # a third of the images, each three times, on different ranks
        together = np.concatenate(dealt)
        assert len(together) == len(set(together.tolist())) == n // 256 * 256
        counts = np.bincount(together // 3, minlength=n)
        assert np.bincount(counts)[3] >= n // 256 * 256 // 3 - 1


def test_ranks_and_accumulated_batches_share_one_order():
    args = {"seed": 5, "repeats": 3, "batch_size": 8, "start": (0, 0), "epochs": 2}
    one = list(batches(300, accumulate=4, rank=0, ranks=1, **args))
    two = [list(batches(300, accumulate=2, rank=r, ranks=2, **args)) for r in (0, 1)]
    four = [list(batches(300, accumulate=1, rank=r, ranks=4, **args)) for r in range(4)]
    steps = iterations(300, repeats=3, groups=4, batch_size=8)
    assert len(one) == 2 * 4 * steps
    for s in range(2 * steps):
        sets = [one[4 * s + g].indices.tolist() for g in range(4)]
        assert [two[g % 2][2 * s + g // 2].indices.tolist() for g in range(4)] == sets
        assert [four[g][s].indices.tolist() for g in range(4)] == sets
    later = list(batches(300, accumulate=4, rank=0, ranks=1, **{**args, "start": (1, 3)}))
    assert [w.indices.tolist() for w in later] == [w.indices.tolist() for w in one[4 * (steps + 3) :]]
    assert {i // 3 for w in one[: 4 * steps] for i in w.indices} <= set(permutation(5, 0, 300).tolist())


def test_mixing_is_timms():
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "label_smoothing": 0.1}
    theirs = Mixup(**settings, num_classes=7)
    ours = Mixer(mixup=0.8, cutmix=1.0, probability=1.0, switch_probability=0.5, smoothing=0.1, classes=7, seed=3)
    seen = set()
    for index in range(12):
        x, y = torch.randn(6, 3, 16, 16), torch.randint(7, (6,))
        before = np.random.get_state()[1].copy()
        got = ours(x.clone(), y, epoch=2, index=index)
        assert np.array_equal(np.random.get_state()[1], before)  # the global generator is as it was
        np.random.seed(key(3, 10, 2, index) % 2**32)
        want = theirs(x.clone(), y)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert torch.allclose(got[1].sum(1), torch.ones(6))
        seen.add(bool((got[0] == x).any()))  # cutmix leaves pixels as they were, mixup does not
        again = ours(x.clone(), y, epoch=2, index=index)
        assert torch.equal(got[0], again[0])
    assert seen == {True, False}


def test_erasing_is_timms_and_belongs_to_the_image():
    x = torch.randn(40, 3, 20, 20)
    a, b = x.clone(), x.flip(0).clone()
    erase(a, np.arange(40), probability=0.5, seed=1, epoch=0)
    erase(b, np.arange(40)[::-1].copy(), probability=0.5, seed=1, epoch=0)
    assert torch.equal(a, b.flip(0))  # not of its place in the batch
    touched = (a != x).flatten(1).any(1)
    assert 10 < touched.sum() < 30
    random.seed(value := key(1, 9, 0, 3))
    torch.manual_seed(value)
    want = RandomErasing(0.5, mode="pixel", device="cpu")(x[3].clone())
    assert torch.equal(a[3], want)
    share = (a != x).any(1).float().mean((1, 2))[touched]
    assert share.min() > 0.02 * 0.7
    assert share.max() < 0.4


def test_depth_belongs_to_the_image_and_keeps_the_mean():
    model = classifier(drop_path=0.5).train()
    keys = list(model.state_dict())
    depth = Depth(model, seed=4)
    assert list(model.state_dict()) == keys
    assert len(depth.layers) == 2 * 11  # the first block drops nothing
    x, indices = torch.randn(6, 3, 32, 32), np.array([5, 1, 9, 200, 3, 77])
    depth(indices, epoch=1, device=x.device)
    whole = model(x)
    depth(indices[3:], epoch=1, device=x.device)
    assert torch.allclose(model(x[3:]), whole[3:], atol=1e-6)
    depth(indices, epoch=2, device=x.device)
    assert not torch.allclose(model(x), whole, atol=1e-3)
    layer = depth.layers[-1]
    depth(np.arange(4000), epoch=0, device=x.device)
    kept = layer(torch.ones(4000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0}  # scaled by 1 / (1 − .5)
    assert kept[:, 0, 0].mean() == pytest.approx(1, abs=0.08)
    model.eval()
    assert torch.equal(layer(x), x)


def test_deit_augment_is_timms_and_seeded():
    rng = np.random.default_rng(0)
    loaded = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    ours = DeitAugment(64)
    (a,) = ours(loaded, seed=2, epoch=1, index=7)
    torch.manual_seed(5)  # global generators are given back as they were (Python's is also drawn from by beartype)
    state = torch.get_rng_state()
    (b,) = ours(loaded, seed=2, epoch=1, index=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(a, b)
    assert (a.shape, a.dtype) == ((64, 64, 3), np.uint8)
    assert not np.array_equal(a, ours(loaded, seed=2, epoch=1, index=8)[0])
    theirs = create_transform(
        64,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    # DeiT's pipeline up to its tensor, drawn from the same generators
    with seeded(key(2, 8, 1, 7)):
        image = Image.fromarray(loaded)
        for step in theirs.transforms[:3]:
            image = step(image)
    assert np.array_equal(a, np.asarray(image))
    small = DeitAugment(28, auto_augment="", color_jitter=0.0)
    views = [small(np.arange(784, dtype=np.uint8).reshape(28, 28), seed=0, epoch=0, index=i)[0] for i in range(30)]
    assert any((v[:2] == 0).all() for v in views)  # cut out of a border of 4


def test_transfer_crop_is_torchvisions():
    image = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    areas, flips = [], 0
    for index in range(200):
        choice = draw(_PLAIN, TRANSFER_CROP, 80, 60, seed=1, epoch=0, index=index, view=0)
        assert choice.jitter is None
        assert [choice.gray, choice.solarize, choice.blur_sigma] == [False, False, None]
        areas.append(choice.height * choice.width / 4800)
        flips += choice.flip
        if index < 5:
            (got,) = CropView(32, TRANSFER_CROP)(image, seed=1, epoch=0, index=index)
            want = resized_crop(
                Image.fromarray(image),
                choice.top,
                choice.left,
                choice.height,
                choice.width,
                [32, 32],
                InterpolationMode.BILINEAR,
            )
            want = np.asarray(want)[:, ::-1] if choice.flip else np.asarray(want)
            assert np.abs(got.astype(int) - want).max() <= 1  # the compiled resize rounds its own way
    assert min(areas) < 0.1
    assert 70 < flips < 130


def test_fractions_are_fixed_and_stratified():
    source = FashionMnist("train")
    small, large = stratified(source, 0.01), stratified(source, 0.1)
    counts = np.bincount(source.labels)
    assert np.bincount(small.labels).tolist() == [round(0.01 * c) for c in counts]
    assert set(small.indices) < set(large.indices)
    assert stratified(source, 1.0) is source
    assert np.array_equal(stratified(source, 0.01).indices, small.indices)
    assert np.array_equal(small.read(3), source.read(int(small.indices[3])))
    assert small.labels[3] == source.labels[small.indices[3]]
    assert set(stratified(source, 1e-6).labels.tolist()) == set(range(10))  # one of each at least
    thrice = Repeated(small, 3)
    assert len(thrice) == 3 * len(small)
    assert np.array_equal(thrice.read(7), small.read(2))
    assert thrice.labels[7] == small.labels[2]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_one_step_is_plain_torch(clip):
    torch.manual_seed(7)
    model = classifier("resnet10_w32", drop_path=0.0).double().train()
    other = classifier("resnet10_w32", drop_path=0.0).double().train()
    other.load_state_dict(model.state_dict())
    ours = build_optimizer(parameter_groups(model, weight_decay=0.05, layer_decay=1.0), lr=1e-3)
    decayed = [p for n, p in other.named_parameters() if p.ndim > 1]
    plain = [p for n, p in other.named_parameters() if p.ndim <= 1]
    theirs = torch.optim.AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=1e-3, weight_decay=0.05
    )
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    average = {k: v.clone() for k, v in other.state_dict().items()}
    step = TuneStep(
        model,
        ours,
        build_criterion(mixes=True, smoothing=0.1),
        world=WORLD,
        precision=Precision("fp32", WORLD.device),
        clip=clip,
        ema=ema,
    )
    for _ in range(3):
        x, y = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.rand(8, 5, dtype=torch.float64).softmax(1)
        outcome = step([(x, y, lambda: None)])
        loss = -(y * other(x).log_softmax(1)).sum(1).mean()
        theirs.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in other.parameters()))
        if clip:
            for p in other.parameters():
                p.grad *= min(1.0, clip / (float(norm) + 1e-6))
        theirs.step()
        average = {
            k: (0.9 * v + 0.1 * other.state_dict()[k] if v.is_floating_point() else v) for k, v in average.items()
        }
        assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-9)
        assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-9)
        assert outcome.ok
    for k, v in other.state_dict().items():
        assert torch.allclose(model.state_dict()[k], v, rtol=1e-9, atol=1e-11), k
        if v.is_floating_point():
            assert torch.allclose(ema.module.state_dict()[k], average[k], rtol=1e-9, atol=1e-11), k
    # what is not finite changes nothing
    before = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    outcome = step([(torch.full_like(x, float("nan")), y, lambda: None)])
    assert not outcome.ok
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert isinstance(step.criterion, SoftTargetCrossEntropy)


def test_criteria():
    scores, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    plain = torch.nn.functional.cross_entropy(scores, y)
    smooth = torch.nn.functional.cross_entropy(scores, y, label_smoothing=0.1)
    assert torch.allclose(build_criterion(mixes=False, smoothing=0.0)(scores, y), plain)
    assert torch.allclose(build_criterion(mixes=False, smoothing=0.1)(scores, y), smooth)


def test_counts():
    scores = torch.eye(7)[[0, 1, 2, 2]] * 4 + torch.arange(7) * 0.1
    target = torch.tensor([0, 1, 2, 6])
    made = count(scores, target, 7).tolist()
    assert made[:7] == [1, 1, 1, 0, 0, 0, 0]
    assert made[7:14] == [1, 1, 1, 0, 0, 0, 1]
    assert made[14] == 4  # class 6 is second
    assert made[15] == pytest.approx(torch.nn.functional.cross_entropy(scores, target, reduction="sum").item())
    accuracy = Accuracy(np.array([1, 0, 3]), 5, np.array([1, 0, 6]), 7.0)
    assert accuracy.acc1 == pytest.approx(400 / 7)
    assert accuracy.mean_class_acc1 == pytest.approx(75)  # over the two classes that have images
    assert dataclasses.asdict(accuracy)["hits5"] == 5


def test_two_processes_are_one_that_accumulates(tmp_path):
    # mixing, erasing, stochastic depth and repeated augmentation on, in float64
    payload = {"steps": 4, "batch_size": 4, "path": tmp_path}
    assert launch_ranks(tuning_tasks.tune_steps, payload, 2) == 0
    tuning_tasks.tune_steps(WORLD, payload)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-9)
    # keys' biases have no gradient in exact arithmetic; Adam scales what rounding leaves of it
    for k, v in one["state"].items():
        if not k.endswith("qkv.bias"):
            assert (two["state"][k] - v).norm() <= 1e-9 * v.norm().clamp_min(1e-30), k


def test_posterize_reaches_no_bits():
    # magnitude 10 keeps 4 − 4 bits: black, as in DeiT's runs, where today's Pillow raises
    augment = DeitAugment(16, auto_augment="rand-m10-n20-inc1-mstd0.5")
    image = np.full((20, 20, 3), 200, dtype=np.uint8)
    for index in range(30):
        augment(image, seed=0, epoch=0, index=index)
