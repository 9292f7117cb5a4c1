"""Golden C: one step of the reference at 224 px: loss, features, gradients, momentum encoder, batch statistics.

World size 2 runs in two real gloo processes, with plain batch norm, as recorded.
"""

import multiprocessing

import numpy as np
import pytest
import torch
from conftest import GOLDEN, fill, fill_model, golden, moco_images

from mocov3 import models
from mocov3.distributed import free_loopback_address, launch

CASES = golden("c_step.json")["cases"]
FEATURES = dict(np.load(GOLDEN / "c_features.npz"))
LOSS = {1: 3e-5, 2: 6e-5}
GRADIENT = {"vit": (3e-4, 3e-3), "resnet18": (5e-3, 5e-2), "resnet50": (2e-2, 0.15)}


def run_cases(cases, world=None):
    """One step through the model's own calls for cases that differ in temperature only, on one rank."""
    torch.set_num_threads(1)
    first = cases[0]
    rank = world.rank if world else 0
    model = models.build(
        first["arch"],
        image_size=first["image_size"],
        dim=first["dim"],
        mlp_dim=first["mlp_dim"],
        stop_grad_conv1=first["stop_grad_conv1"],
    )
    fill_model(model)
    part = first["global_batch"] // first["world"]
    x1, x2 = (
        moco_images("c_step", 0, view, first["global_batch"], first["image_size"])[rank * part : (rank + 1) * part]
        for view in (1, 2)
    )
    queries = [model.queries(model.features(x)) for x in (x1, x2)]
    model.update_momentum_encoder(first["m"])
    keys = [model.keys(model.key_features(x)) for x in (x1, x2)]
    for case in cases:
        model.temperature = case["T"]
        model.zero_grad()
        loss, _ = model.loss(queries, keys)
        loss.backward(retain_graph=True)
        for p in model.parameters() if world else ():
            if p.grad is not None:  # averaged, as DistributedDataParallel does
                p.grad = world.sum(p.grad) / world.size
        yield {
            "loss": loss.item(),
            "features": {
                n: v.detach().numpy() for n, v in zip(("q1", "q2", "k1", "k2"), (*queries, *keys), strict=True)
            },
            "grad": {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None},
            "no_grad": [n for n, p in model.named_parameters() if p.grad is None],
            "momentum": {f"momentum_encoder.{n}": p.numpy() for n, p in model.momentum_encoder.named_parameters()},
            "buffers": {n: b.numpy() for n, b in model.named_buffers()},
        }


def check_rank(name, case, rank, got):
    want = case["ranks"][rank]
    assert abs(got["loss"] - want["loss"]) <= LOSS[case["world"]]
    for feature, value in got["features"].items():
        assert np.abs(value - FEATURES[f"{name}/rank{rank}/{feature}"]).max() <= 1e-3, feature
    assert sorted(got["no_grad"]) == sorted(want["no_grad_keys"])
    if rank == 0:  # recorded once: averaged gradients and momentum encoders are equal on all ranks
        check_gradients(case["arch"], want["grad"], got["grad"])
        check_momentum(want["momentum_params"], got["momentum"])
    for key, value in got["buffers"].items():
        recorded = want["buffers"][key]
        if key.endswith("num_batches_tracked"):
            assert int(value) == recorded, key
        elif key != "predictor.1.running_mean":
            finger = fill.fingerprint(key, value)
            assert abs(finger["l2"] - recorded["l2"]) <= 1e-5 * recorded["l2"], key
            assert abs(finger["dot"] - recorded["dot"]) <= 4e-5 * recorded["l2"], key


def check_gradients(arch, recorded, got):
    assert sorted(got) == sorted(recorded)
    l2_bound, dot_bound = GRADIENT["vit" if arch.startswith("vit") else arch]
    for key, value in got.items():
        if not key.endswith("encoder.norm.bias"):  # zero in exact arithmetic
            finger, want = fill.fingerprint(key, value), recorded[key]
            assert abs(finger["l2"] - want["l2"]) <= l2_bound * want["l2"], key
            assert abs(finger["dot"] - want["dot"]) <= dot_bound * want["l2"], key


def check_momentum(recorded, got):
    if "same_as" in recorded:
        recorded = CASES[recorded["same_as"]]["ranks"][0]["momentum_params"]
    assert sorted(got) == sorted(recorded)
    for key, value in got.items():
        assert fill.compare_fingerprint(fill.fingerprint(key, value), recorded[key], 1.2e-7), key


def group(world):
    """Names of the cases of a world size, together where one forward pass serves several temperatures."""
    groups = {}
    for name, case in CASES.items():
        if case["world"] == world:
            groups.setdefault((case["arch"], case["stop_grad_conv1"]), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("names", group(1), ids="+".join)
def test_one_process(names):
    for name, got in zip(names, run_cases([CASES[n] for n in names]), strict=True):
        check_rank(name, CASES[name], 0, got)


def _rank_task(world, queue):
    for names in group(2):
        for name, got in zip(names, run_cases([CASES[n] for n in names], world), strict=True):
            check_rank(name, CASES[name], world.rank, got)
            queue.put((name, world.rank))
    return 0


def test_two_processes():
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    code = launch(_rank_task, queue, device="cpu", processes=2, address=free_loopback_address())
    assert code == 0
    done = set()
    while not queue.empty():
        done.add(queue.get())
    assert done == {(name, rank) for names in group(2) for name in names for rank in (0, 1)}


def test_every_case_is_checked():
    assert sorted(n for world in (1, 2) for names in group(world) for n in names) == sorted(CASES)
