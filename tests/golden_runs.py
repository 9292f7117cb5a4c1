"""What the golden tests run: one step (C), trajectories (D), linear evaluation (L) and fine-tuning (M).

Each goes through the code that the programs run. Every function says how far it came from the recorded numbers.

float64 decides: the recorded run and ours agree there to rounding, so its bounds are tight. float32 differs by the
processor's order of summation, so it is judged by norms of whole tensors, at ten times or more of what was measured
(``golden/README.md``, "Tolerances", and ``make golden`` on an Intel Xeon).
"""

import contextlib
import io
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm.data.mixup
import torch
from goldens import GOLDEN, Deviations, fill, fill_model, golden, moco_images
from torch import nn

from mocov3 import models, schedules
from mocov3.config import FinetuneConfig, LinclsConfig
from mocov3.data import Batch, Work
from mocov3.data.sources.transfer import Pair
from mocov3.distributed import World
from mocov3.evaluation import features
from mocov3.evaluation.linear import loop as linear
from mocov3.evaluation.linear import scores
from mocov3.finetuning import loop, setup
from mocov3.finetuning.evaluate import evaluate
from mocov3.models import products
from mocov3.models.backbones import build_backbone
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.step import Step
from mocov3.running import run as runs
from mocov3.running.job import Job

C = golden("c_step.json")["cases"]
D = golden("d_traj.json")["recipes"]
L = golden("l_lincls.json")["cases"]
M = golden("m_deit.json")["cases"]
HERE = World(0, 1, torch.device("cpu"))
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def recorded_table():
    """The reference's own position table of 224 px at width 384, to the last bit; ours is up to 7e-7 from it."""
    return torch.from_numpy(np.load(GOLDEN / "b_pos_embed.npz")["vit_small_224"])[None]


# --- C: one step ------------------------------------------------------------------------------------------------------

ZERO = ("encoder.norm.bias",)
"""Gradients that are zero in exact arithmetic: a constant before a bias-free layer and batch norm."""
STEP64 = {
    "loss": 1e-12,
    "features": 1e-3,
    "gradient l2": 1e-10,
    "gradient dot": 1e-10,
    "gradient samples": 1e-10,
    "zero gradient": 1e-11,
    "momentum encoder": 1.2e-7,
    "buffer l2": 1e-5,
    "buffer dot": 4e-5,
    "zero buffer": 1e-11,
}
STEP32 = {"loss": 1e-4, "features": 1.5e-3, "momentum encoder": 1.2e-7, "buffer l2": 1e-5, "buffer dot": 1.5e-4}
# of the convolutional stem and ResNets a ReLU is enough that falls to its other side
GRADIENT32 = {"vit_small": 1e-3, "vit_conv_small": 3e-2, "resnet18": 1.5e-2, "resnet50": 6e-2}


def step_groups(world):
    """Names of the cases of a world size, together where one forward pass serves several temperatures."""
    groups = {}
    for name, case in C.items():
        if case["world"] == world:
            groups.setdefault((case["arch"], case["stop_grad_conv1"]), []).append(name)
    return list(groups.values())


def one_step(names, dtype, world=HERE, whole=False):
    """One step of cases that differ in temperature only, on one rank.

    Args:
        names: of the cases.
        dtype: ``float64`` or ``float32``.
        world: this rank.
        whole: all gradients of every case; else those of the backbone, which take longest, of the last one only (the
            gradient that reaches the backbone is the same function of the others' checked ones).
    """
    torch.set_num_threads(1)
    first = C[names[0]]
    model = models.build(
        first["arch"],
        image_size=first["image_size"],
        dim=first["dim"],
        mlp_dim=first["mlp_dim"],
        stop_grad_conv1=first["stop_grad_conv1"],
    )
    fill_model(model, DTYPES[dtype])
    for encoder in (model.base_encoder, model.momentum_encoder):
        if hasattr(encoder, "pos_embed"):
            encoder.pos_embed.data.copy_(recorded_table())
    part = first["global_batch"] // first["world"]
    x1, x2 = (
        moco_images("c_step", 0, view, first["global_batch"], first["image_size"])[
            world.rank * part : (world.rank + 1) * part
        ].to(DTYPES[dtype])
        for view in (1, 2)
    )
    queries = [model.queries(model.features(x)) for x in (x1, x2)]
    model.update_momentum_encoder(first["m"])
    keys = [model.keys(model.key_features(x)) for x in (x1, x2)]
    outputs = dict(zip(("q1", "q2", "k1", "k2"), (*queries, *keys), strict=True))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    heads = [n for n in trained if n.startswith((f"base_encoder.{model.base_encoder.projector_name}.", "predictor."))]
    for name in names:
        wanted = trained if whole or name == names[-1] else {n: trained[n] for n in heads}
        model.temperature = C[name]["T"]
        loss, _ = model.loss(queries, keys)
        found = torch.autograd.grad(loss, list(wanted.values()), retain_graph=name != names[-1], allow_unused=True)
        grads = {n: world.sum(g) / world.size for n, g in zip(wanted, found, strict=True) if g is not None}
        assert len(grads) == len(wanted)
        yield name, _step_deviations(name, dtype, world.rank, model, loss.item(), outputs, grads)


def _step_deviations(name, dtype, rank, model, loss, outputs, grads):
    recorded, exact = C[name]["ranks"][rank], C[name]["float64"][rank]
    bounds = STEP64 if dtype == "float64" else {**STEP32, "gradient l2": GRADIENT32[C[name]["arch"]]}
    got = Deviations(f"C {name} rank {rank} {dtype}", bounds)
    got.note("loss", (loss - exact["loss"]) / exact["loss"])
    stored = np.load(GOLDEN / "c_features.npz")
    for feature, value in outputs.items():
        want = stored[f"{name}/rank{rank}/{feature}"]
        got.note("features", np.linalg.norm(value.detach().numpy() - want) / np.linalg.norm(want), feature)
    without = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert sorted(without) == sorted(recorded["no_grad_keys"])
    if rank == 0:  # recorded once: averaged gradients and momentum encoders are equal on all ranks
        assert set(grads) <= set(exact["grad_l2"])
        total = np.linalg.norm(list(exact["grad_l2"].values()))
        for key, value in grads.items():
            want = {"l2": exact["grad_l2"][key], "dot": exact["grad_dot"][key], "samples": exact["grad_samples"][key]}
            if key.endswith(ZERO):
                if dtype == "float64":
                    got.note("zero gradient", value.norm() / total, key)
            elif dtype == "float64":
                got.fingerprint("gradient", key, value.numpy(), want, fields=("l2", "dot"))
            else:
                got.note("gradient l2", value.double().norm() / want["l2"] - 1, key)
        want = recorded["momentum_params"]
        want = C[want["same_as"]]["ranks"][0]["momentum_params"] if "same_as" in want else want
        momentum = {f"momentum_encoder.{n}": p for n, p in model.momentum_encoder.named_parameters()}
        assert sorted(momentum) == sorted(want)
        for key, p in momentum.items():  # scaled as fill.compare_fingerprint does
            finger, w = fill.fingerprint(key, p.numpy()), want[key]
            l2 = max(w["l2"], 1e-30)
            got.note("momentum encoder", (finger["l2"] - w["l2"]) / l2, key)
            got.note("momentum encoder", (finger["dot"] - w["dot"]) / (4 * l2), key)
            got.note("momentum encoder", (finger["sum"] - w["sum"]) / max(abs(w["sum"]), 4 * l2), key)
    buffers = dict(model.named_buffers())
    assert sorted(buffers) == sorted(recorded["buffers"])
    for key, value in buffers.items():
        want = recorded["buffers"][key]
        if key.endswith("num_batches_tracked"):
            assert int(value) == want, key
        elif key != "predictor.1.running_mean":
            got.fingerprint("buffer", key, value.numpy(), want, fields=("l2", "dot"))
        elif dtype == "float64":  # zero in exact arithmetic: what is averaged has no mean
            left = fill.fill_value(key, tuple(value.shape)).astype(np.float64) * 0.9**2
            got.note("zero buffer", np.linalg.norm(value.numpy() - left), key)
    if "zero buffer" in got.bounds and "predictor.1.running_mean" not in buffers:
        got.note("zero buffer", 0.0)
    if "zero gradient" in got.bounds and "zero gradient" not in got.largest:
        got.note("zero gradient", 0.0)
    for quantity in ("gradient l2", "gradient dot", "gradient samples", "momentum encoder"):
        if rank and quantity in got.bounds:
            got.note(quantity, 0.0)
    return got


# --- D: twenty steps of pre-training ----------------------------------------------------------------------------------

# A ResNet agrees to rounding; a ViT to what its position table, rounded to float32 from another formula, leaves
TRAJECTORY64 = {
    "resnet18_lars": {"loss": 1e-12, "weights l2": 1e-11, "weights dot": 1e-11, "moved": 1e-11, "buffers": 5e-3},
    "vit": {"loss": 6e-8, "weights l2": 3e-8, "weights dot": 1e-7, "moved": 1e-7, "buffers": 8e-2},
}
# (first step, bound on the loss from there on)
LOSSES32 = {
    "resnet18_lars": [(0, 2.5e-4), (4, 1.2e-3), (6, 6e-3), (9, 5e-2)],
    "vit_tiny_adamw_mid": [(0, 1e-5), (6, 2e-4), (9, 2e-2)],
    "vit_tiny_adamw_readme_lr": [(0, 1e-5), (5, 4e-3)],
    "vit_tiny_adamw": [(0, 2e-5), (3, 0.3)],
}
TRAJECTORY32 = {"loss": 1.0, "weights l2, median": 3e-5, "moved, median": 2.5e-2, "buffers": 0.15}
WILD = {"vit_tiny_adamw": 20.0}
"""How much wider the medians' bounds are where a high learning rate makes most of rounding."""


def trajectory(name, dtype, *, steps=20, micro_batch=0, by_convolution=False):
    """Steps of a recipe through the training step itself; after all twenty, weights and buffers too.

    Args:
        name: of the recipe.
        dtype: ``float64`` or ``float32``.
        steps: how many, at most 20.
        micro_batch: of the step.
        by_convolution: multiply tokens by convolutions, as on AMD's processors (there, in float32 alone).
    """
    taken = []
    really = products._worth_it

    def worth_it(x, weight):
        on_amd = x.dtype == torch.float64 and x.ndim in (3, 4) and x.shape[1] >= 8
        taken.append(by_convolution and (on_amd or really(x, weight)))
        return taken[-1]

    with (
        patch.object(products, "mkl_is_half_wide", lambda: by_convolution),
        patch.object(products, "ENOUGH", 0),
        patch.object(products, "_worth_it", worth_it),
    ):
        got = _trajectory(name, dtype, steps, micro_batch)
    got.of += " by convolution" if by_convolution else f" in micro-batches of {micro_batch}" if micro_batch else ""
    assert any(taken) == by_convolution
    return got


def _trajectory(name, dtype, steps, micro_batch):
    c, recorded, exact = D[name]["config"], D[name]["float32"], D[name]["float64"]
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
    fill_model(model, DTYPES[dtype])
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = build_optimizer(
        model.parameters(), c["optimizer"], weight_decay=c["wd"], momentum=c["optimizer_momentum"]
    )
    step = Step(model, optimizer, world=HERE, precision=Precision("fp32", HERE.device), micro_batch=micro_batch)
    peak = c["base_lr"] * c["batch"] / 256
    bounds = dict(TRAJECTORY64["vit" if vit else name] if dtype == "float64" else TRAJECTORY32)
    if steps < 20:
        bounds = {"loss": bounds["loss"]}
    got = Deviations(f"D {name} {dtype}, {steps} steps", bounds)
    for s in range(steps):
        epoch = s / c["iters_per_epoch"]
        lr = schedules.learning_rate(epoch, peak=peak, warmup_epochs=c["warmup_epochs"], epochs=c["epochs"])
        m = schedules.momentum(epoch, start=c["moco_m"], epochs=c["epochs"], cosine=c["moco_m_cos"])
        np.testing.assert_allclose([lr, m], [recorded["lr"][s], recorded["moco_m"][s]], rtol=1e-12, atol=1e-12)
        x1, x2 = (moco_images(f"d_traj/{name}", s, v, c["batch"], c["size"]).to(DTYPES[dtype]) for v in (1, 2))
        loss = step(x1, x2, lr=lr, m=m).loss.item()
        scale = 1.0 if dtype == "float64" else [b for first, b in LOSSES32[name] if s >= first][-1]
        got.note("loss", (loss - exact["loss"][s]) / scale, f"step {s}")
    final = dict(model.named_parameters())
    for key, p in final.items():
        if not p.requires_grad and key.startswith("base_encoder"):
            assert torch.equal(p, start[key]), key
    state = optimizer.state_dict()
    assert len(state["state"]) == recorded["optimizer_states"]
    assert len(state["param_groups"][0]["params"]) == recorded["optimizer_params"]
    assert sorted(next(iter(state["state"].values()))) == sorted(recorded["optimizer_state_keys"])
    if steps == 20:
        assert list(final) == list(exact["final_param_l2"])
        if dtype == "float64":
            _exact_weights(got, final, start, exact, c["optimizer"])
        else:
            _rough_weights(got, final, start, exact, c["optimizer"], WILD.get(name, 1.0))
        for key, buffer in model.named_buffers():
            if key.endswith("num_batches_tracked"):
                assert int(buffer) == 40
            elif key != "predictor.1.running_mean":
                got.note("buffers", buffer.double().norm() / recorded["final_buffer_l2"][key] - 1, key)
    return got


def _exact_weights(got, final, start, exact, optimizer):
    """Every parameter of both encoders; what rounding alone moves is left out of ``moved`` (zero gradients, which
    AdamW makes steps of, and frozen tables whose copies are averaged with themselves)."""
    for key, p in final.items():
        want = {"l2": exact["final_param_l2"][key], "dot": exact["final_param_dot"][key]}
        got.fingerprint("weights", key, p.detach().numpy(), want, fields=("l2", "dot"))
        moved = (p.detach() - start[key]).norm()
        if p.requires_grad and not (optimizer == "adamw" and key.endswith(ZERO)):
            got.note("moved", moved / exact["moved_l2"][key] - 1, key)


def _rough_weights(got, final, start, exact, optimizer, wild):
    size, moved = [], []
    for key, p in final.items():
        if p.requires_grad and not (optimizer == "adamw" and key.endswith((*ZERO, "qkv.bias"))):
            size.append(abs(p.detach().double().norm().item() / exact["final_param_l2"][key] - 1))
            moved.append(abs((p.detach() - start[key]).double().norm().item() / exact["moved_l2"][key] - 1))
    got.note("weights l2, median", np.median(size), scale=wild)
    got.note("moved, median", np.median(moved), scale=wild)


# --- what L and M are fed ---------------------------------------------------------------------------------------------


class Images:
    """A source whose images are the recorded batches: as many as an epoch has, with labels for all epochs.

    Args:
        batches: (images, labels) of every step.
        length: of an epoch.
        classes: how many.
    """

    digest = "golden"

    def __init__(self, batches, length, classes):
        self.batches, self.length = batches, length
        self.labels = np.concatenate([labels for _, labels in batches]).astype(np.int32)
        self.classes = [str(i) for i in range(classes)]
        self.starts = np.cumsum([0, *(len(labels) for _, labels in batches)])
        self.iterations = next(i for i, first in enumerate(self.starts) if first == length)

    def __len__(self):
        return self.length

    def read(self, index):
        raise AssertionError("images come from the recorded batches")

    def name(self, index):
        return str(index)


class Fed:
    """In place of a ``Loader``: the recorded batch of every step, in its recorded order."""

    def __init__(self, source, transform, **_):
        self.source = getattr(source, "source", source)  # within Repeated
        self.memory = np.empty(0, np.uint8)

    def run(self, works):
        for work in works:
            step = work.epoch * self.source.iterations + work.iteration
            indices = np.arange(self.source.starts[step], self.source.starts[step + 1])
            yield Batch(Work(work.epoch, work.iteration, indices), self.source.batches[step][0][None], [])

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _as_it_is(pixels, device, mean, std, parameters=None):
    return torch.from_numpy(pixels).to(torch.get_default_dtype())


@contextlib.contextmanager
def _default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batch(case, step, batch, size, classes, family, labels=None):
    if labels is None:
        labels = fill.stream(f"{family}/{case}/step{step}/labels").integers(0, classes, batch)
    return fill.images(f"{family}/{case}", step, 1, batch, size), np.asarray(labels)


# --- L: linear evaluation ---------------------------------------------------------------------------------------------

LINEAR64 = {"lr": 1e-14, "loss": 1e-12, "weights": 1e-11, "samples": 1e-11, "momentum": 1e-11, "validation loss": 1e-12}
LINEAR32 = {"lr": 1e-14, "loss": 2e-5, "weights": 1e-5, "momentum": 1e-4, "validation loss": 2e-5}


def linear_evaluation(name, dtype, epochs=0):
    """A case of L through ``mocov3.evaluation.linear.loop``, as ``main_lincls.py`` runs it, and the accuracy it prints.

    Args:
        name: of the case.
        dtype: ``float64`` or ``float32``.
        epochs: stop after so many (0: all), before there are final weights to compare.
    """
    c, exact = L[name]["config"], L[name]["float64"]
    bounds = dict(LINEAR64 if dtype == "float64" else LINEAR32)
    if epochs:
        bounds = {q: bounds[q] for q in ("lr", "loss")}
    got = Deviations(f"L {name} {dtype}" + (f", {epochs} epochs" if epochs else ""), bounds)
    sizes = (c["size"], c["classes"], "l_lincls")
    steps = c["iters_per_epoch"] * (epochs or c["epochs"])
    train = Images(
        [_batch(name, s, c["batch"], *sizes) for s in range(c["iters_per_epoch"] * c["epochs"])][:steps],
        c["batch"] * c["iters_per_epoch"],
        c["classes"],
    )
    held = [
        _batch(name, s, len(t), *sizes, labels=t)
        for s, t in zip(("val0", "val1", "last"), exact["val_targets"], strict=True)
    ]
    val = Images(held, sum(len(t) for _, t in held), c["classes"])
    seen = {"loss": [], "lr": [], "validation": []}
    rates = scores.rates

    class Watched(linear.Evaluation):
        def __init__(self, world, job, owner):
            super().__init__(world, job, owner)
            weight = 0.5 * fill.fill_value("linear.weight", (c["classes"], self.frozen.width))
            self.heads.set(0, torch.from_numpy(weight), torch.zeros(c["classes"]))
            seen["run"] = self

        def step(self, work, batch):
            before = self.counts.clone()
            super().step(work, batch)
            loss, _, _, n = (self.counts - before)[0].tolist()
            seen["loss"].append(loss / n)
            seen["lr"].append(self.heads.optimizer.param_groups[0]["lr"])

        def evaluate(self):
            means = []  # after every batch, as they are printed, then of all

            def watched(row):
                means.append(rates(row)[0])
                return rates(row)

            with patch.object(scores, "rates", watched):
                result = super().evaluate()
            seen["validation"] = means[:-1]
            return result

        def must_stop(self):
            return super().must_stop() or len(seen["loss"]) == steps

    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(_default(dtype))
        for place, attribute, value in (
            (linear, "Evaluation", Watched),
            (linear, "open_labelled", lambda *_: (train, val)),
            (runs, "Loader", Fed),
            (linear, "normalise", _as_it_is),
            (features, "Loader", Fed),
            (features, "normalise", _as_it_is),
            (scores, "grid", lambda *_: np.split(np.arange(len(val)), val.starts[1:-1])),
        ):
            stack.enter_context(patch.object(place, attribute, value))
        pretrained = Path(folder) / "pretrained.pth.tar"
        torch.save({"arch": c["arch"], "state_dict": _backbone_state(c["arch"], c["size"])}, pretrained)
        config = LinclsConfig(
            data="golden",
            arch=c["arch"],
            pretrained=str(pretrained),
            image_size=c["size"],
            epochs=c["epochs"],
            batch_size=c["batch"],
            lr=c["lr"],
            momentum=c["momentum"],
            weight_decay=c["wd"],
            print_freq=1,
            output_dir=folder,
            workers=0,
            seed=0,
            device="cpu",
        )
        stack.enter_context(contextlib.redirect_stdout(printed))
        assert linear.train(HERE, Job(config, script_door=True)) == 0
    run = seen["run"]
    for s, (loss, lr) in enumerate(zip(seen["loss"], seen["lr"], strict=True)):
        got.note("loss", loss - exact["loss"][s], f"step {s}")
        got.note("lr", lr / exact["lr"][s // c["iters_per_epoch"]] - 1, f"step {s}")
    assert len(seen["loss"]) == steps
    if epochs:
        return got
    w, b = run.heads.weights[0], run.heads.biases[0]
    for kind, key, value in (
        ("weights", "weight", w),
        ("weights", "bias", b),
        ("momentum", "momentum_weight", w),
        ("momentum", "momentum_bias", b),
    ):
        value = run.heads.optimizer.state[value]["momentum_buffer"] if kind == "momentum" else value
        _head_deviations(got, kind, f"linear.{key.split('_')[-1]}", value.detach().numpy(), exact[key], dtype)
    counts = np.diff(val.starts)
    by_batch = np.diff([0.0, *(np.array(seen["validation"]) * val.starts[1:])]) / counts
    for i, (loss, want) in enumerate(zip(by_batch, exact["val_loss"], strict=True)):
        got.note("validation loss", loss - want, f"batch {i}")
    lines = [line.strip() for line in printed.getvalue().splitlines() if line.startswith(" * Acc@1")]
    assert len(lines) == c["epochs"]
    assert lines[-1] == exact["val_line"]
    _fine_tuning_agrees(got, run, val, exact)
    return got


def _head_deviations(got, kind, key, value, want, dtype):
    if dtype == "float32":
        return got.note(kind, np.linalg.norm(value.astype(np.float64)) / want["l2"] - 1, key)
    finger = fill.fingerprint(key, value)
    for field in ("l2", "sum", "dot"):
        got.note(kind, (finger[field] - want[field]) / want["l2"], f"{key} {field}")
    values = value.ravel()[fill.sample_indices(key, value.size)]
    return got.note("samples", np.abs(values - want["samples"]).max() / want["l2"], f"{kind} of {key}")


def _fine_tuning_agrees(got, run, val, exact):
    """The evaluation of fine-tuning finds the same accuracy of the same classifier."""
    network = run.frozen.network
    head = nn.Linear(run.frozen.width, run.heads.classes, dtype=run.heads.weights[0].dtype)
    with torch.no_grad():
        head.weight.copy_(run.heads.weights[0])
        head.bias.copy_(run.heads.biases[0])
    setattr(network, run.frozen.head, head)
    with (
        patch.object(features, "Loader", Fed),
        patch.object(features, "normalise", lambda *args: _as_it_is(*args).to(run.heads.weights[0].dtype)),
    ):
        found = evaluate(
            features.Extractor(network, network, run.frozen.view, (0.0,), (1.0,)),
            val,
            world=HERE,
            precision=run.precision,
            batch_size=int(val.starts[1]),
            workers=0,
        )
    assert f"* Acc@1 {found.acc1:.3f} Acc@5 {found.acc5:.3f}" == exact["val_line"]
    mean = np.dot(exact["val_loss"], np.diff(val.starts)) / len(val)
    got.note("validation loss", found.loss - mean, "of fine-tuning's evaluation")


def _backbone_state(arch, size):
    with _default("float32"):
        state = build_backbone(arch, image_size=size).state_dict()
    head = ("fc.", "head.", "projector.")
    kept = {k: v for k, v in state.items() if not k.startswith(head)}
    for key, value in kept.items():
        new = fill.fill_value(f"base_encoder.{key}", tuple(value.shape))
        kept[key] = recorded_table() if new is fill.KEEP else torch.from_numpy(np.asarray(new))
    return {f"module.base_encoder.{key}": value for key, value in kept.items()}


# --- M: fine-tuning ---------------------------------------------------------------------------------------------------

TUNING64 = {"lr": 1e-14, "loss": 1e-12, "weights": 1e-10, "average": 1e-10}
TUNING32 = {"lr": 1e-14, "loss": 1e-5, "weights": 1e-5, "average": 5e-5}


def fine_tuning(name, dtype):
    """A case of M through ``mocov3.finetuning.loop.tune``, as ``transfer/main.py`` runs it, with the recorded mixes."""
    c, exact = M[name]["config"], M[name]["float64"]
    got = Deviations(f"M {name} {dtype}", TUNING64 if dtype == "float64" else TUNING32)
    steps = c["iters_per_epoch"] * c["epochs"]
    batches = [_batch(name, s, c["batch"], c["size"], c["classes"], "m_deit") for s in range(steps)]
    train = Images(batches, c["batch"] * c["iters_per_epoch"], c["classes"])
    test = Images(batches[:1], c["batch"], c["classes"])
    mixes = iter(exact["mixes"])
    seen = {"loss": [], "lr": []}
    build_classifier, drawn = setup.build_classifier, []

    def recorded_classifier(*args, **settings):
        model = build_classifier(*args, **settings)
        model.blocks = model.blocks[:4]
        model.to(DTYPES[dtype])
        state = model.state_dict()
        for key, value in state.items():
            new = fill.fill_value(f"base_encoder.{key}", tuple(value.shape))
            if new is fill.KEEP:
                new = 0.02 * fill.stream("m_deit/pos_embed").standard_normal(tuple(value.shape))
            value.copy_(torch.from_numpy(np.asarray(new, dtype=np.float32)))
        return model

    def drawn_lambda():
        drawn[:] = next(mixes)
        return drawn[0], drawn[1]

    def drawn_box(shape, lam, **_):
        (top, bottom, left, right), share = drawn[2:]
        assert share == 1 - (bottom - top) * (right - left) / (shape[-1] * shape[-2])
        return tuple(drawn[2]), share

    def recorded_mix(mixer, *args, **place):
        with _default("float32"):  # soft targets are float32 in the original's float64 run too
            return mixer(*args, **place)

    class Watched(loop.Tuning):
        def __init__(self, world, job, owner):
            super().__init__(world, job, owner)
            self.labels = train.labels.astype(np.int64)  # of all epochs
            if self.parts.mixer is not None:
                self.parts.mixer.mixup._params_per_batch = drawn_lambda
                self.parts.mixer = partial(recorded_mix, self.parts.mixer)
            seen["run"] = self

        def advance(self, batch, outcome, lr):
            super().advance(batch, outcome, lr)
            seen["loss"].append(float(outcome.loss))
            seen["lr"].append(lr)
            assert {g["lr"] for g in self.parts.optimizer.param_groups} == {lr}

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(_default(dtype))
        for place, attribute, value in (
            (loop, "Tuning", Watched),
            (loop, "open_pair", lambda *_: Pair(train, test, False)),
            (runs, "Loader", Fed),
            (loop, "normalise", _as_it_is),
            (features, "Loader", Fed),
            (features, "normalise", _as_it_is),
            (setup, "build_classifier", recorded_classifier),
            (timm.data.mixup, "cutmix_bbox_and_lam", drawn_box),
        ):
            stack.enter_context(patch.object(place, attribute, value))
        mixing = {name: c[name] for name in ("mixup", "cutmix")} if c["mix"] else {"mixup": 0.0, "cutmix": 0.0}
        config = FinetuneConfig(
            data_set="folder",
            data_path="golden",
            arch="vit_tiny",
            image_size=c["size"],
            batch_size=c["batch"],
            epochs=c["epochs"],
            lr=c["lr"] * 512 / c["batch"],
            warmup_lr=c["warmup_lr"],
            min_lr=c["min_lr"],
            warmup_epochs=c["warmup_epochs"],
            weight_decay=c["wd"],
            model_ema_decay=c["ema_decay"],
            smoothing=c["smoothing"],
            drop_path=0.0,
            reprob=0.0,
            aa="none",
            repeated_aug=False,
            eval_freq=c["epochs"],
            output_dir=folder,
            workers=0,
            logger="none",
            quiet=True,
            device="cpu",
            **mixing,
        )
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        assert loop.tune(HERE, Job(config, script_door=True)) == 0
    parts = seen["run"].parts
    for s, (loss, lr) in enumerate(zip(seen["loss"], seen["lr"], strict=True)):
        got.note("loss", loss - exact["loss"][s], f"step {s}")
        got.note("lr", lr / exact["lr"][s // c["iters_per_epoch"]] - 1, f"step {s}")
    assert len(seen["loss"]) == steps
    assert next(mixes, None) is None
    groups = [{"weight_decay": g["weight_decay"], "tensors": len(g["params"])} for g in parts.optimizer.param_groups]
    assert groups == exact["groups"]
    for kind, network, want in (
        ("weights", parts.model, exact["weights"]),
        ("average", parts.ema.module, exact["ema"]),
    ):
        weights = dict(network.named_parameters())
        assert sorted(weights) == sorted(want)
        for key, p in weights.items():
            finger, w = fill.fingerprint(key, p.detach().numpy()), want[key]
            if dtype == "float64":
                for field in ("l2", "sum", "dot"):
                    got.note(kind, (finger[field] - w[field]) / w["l2"], f"{key} {field}")
            elif not key.endswith("qkv.bias"):  # a third is rounding, which AdamW makes steps of
                got.note(kind, finger["l2"] / w["l2"] - 1, key)
    return got
