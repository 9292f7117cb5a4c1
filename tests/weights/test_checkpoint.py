"""Files of tensors: layout for the reference and torch, atomic writes, damaged and hostile files, retention."""

import json
import os
import pickle

import pytest
import torch
from conftest import fill_model, golden

from mocov3 import models
from mocov3.errors import UserError
from mocov3.optim import LARS, build_optimizer
from mocov3.weights import checkpoint
from mocov3.weights.checkpoint import Position


def tiny(arch="resnet10_w32", optimizer="lars"):
    torch.manual_seed(0)
    model = models.build(arch, dim=8, mlp_dim=16)
    made = build_optimizer(model.parameters(), optimizer, weight_decay=1e-6, momentum=0.9)
    x = torch.randn(4, 3, 32, 32)
    model.train()(x, x.flip(0), 0.9).backward()
    made.param_groups[0]["lr"] = 0.1
    made.step()
    return model, made


def packed(model, optimizer, arch="resnet10_w32", **extra):
    return checkpoint.pack(
        arch=arch,
        model=model,
        optimizer=optimizer,
        scaler={},
        position=Position(1, 0, 5),
        extra={"seed": 1, "config": {"arch": arch}, **extra},
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.write(path, packed(*tiny()))
    return path


def scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def restore(path, model, optimizer, arch="resnet10_w32"):
    return checkpoint.restore(
        path, checkpoint.read(path), arch=arch, model=model, optimizer=optimizer, scaler=scaler(), iterations=5
    )


@pytest.mark.parametrize("arch", ["resnet18", "vit_small"])
def test_layout_is_the_references(arch, tmp_path):
    model = models.build(arch)
    optimizer = build_optimizer(model.parameters(), "lars", weight_decay=0.0, momentum=0.9)
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.write(path, packed(model, optimizer, arch))
    contents = torch.load(path, weights_only=True)
    assert list(contents) == ["epoch", "arch", "state_dict", "optimizer", "scaler", "mocov3"]
    recorded = golden("a_state_dicts.json")["models"][arch]["state_dict"]
    assert [[k, list(v.shape)] for k, v in contents["state_dict"].items()] == [row[:2] for row in recorded]
    assert type(contents["epoch"]) is int
    assert contents["mocov3"]["format"] == 1


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_torchs_own_classes_take_the_entries(optimizer, tmp_path):
    model, made = tiny(optimizer=optimizer)
    path = tmp_path / "c.pth.tar"
    checkpoint.write(path, packed(model, made))
    contents = torch.load(path, weights_only=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0)
    theirs.load_state_dict(contents["scaler"])
    theirs.scale(torch.ones(1))  # the scale is set lazily
    assert theirs.state_dict() == contents["scaler"]
    assert theirs.get_scale() == 65536.0
    other, _ = tiny()
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    taken = kind(other.parameters(), lr=1.0)
    taken.load_state_dict(contents["optimizer"])
    assert len(taken.state) == sum(p.requires_grad for p in model.parameters())
    assert len(contents["optimizer"]["param_groups"][0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "muon"])
def test_round_trip(optimizer, tmp_path):
    model, made = tiny(optimizer=optimizer)
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.write(path, packed(model, made))
    torch.manual_seed(9)
    other = models.build("resnet10_w32", dim=8, mlp_dim=16)
    fresh = build_optimizer(other.parameters(), optimizer, weight_decay=0.5, momentum=0.5)
    assert restore(path, other, fresh) == Position(1, 0, 5)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    for a, b in zip(made.state.values(), fresh.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert fresh.param_groups[0]["weight_decay"] == 0.5  # the command line's


def test_a_checkpoint_of_the_reference_resumes(tmp_path):
    # made from the fill rule in the reference's layout, without our entry and without a prefix of ours
    model = fill_model(models.build("resnet18", dim=256, mlp_dim=512))
    numbered = list(model.parameters())
    state = {i: {"mu": torch.full_like(p, 0.5)} for i, p in enumerate(numbered) if p.requires_grad}
    group = {
        "lr": 0.1,
        "weight_decay": 1e-6,
        "momentum": 0.9,
        "trust_coefficient": 0.001,
        "params": list(range(len(numbered))),
    }
    path = tmp_path / "checkpoint_0002.pth.tar"
    torch.save(
        {
            "epoch": 3,
            "arch": "resnet18",
            "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
            "optimizer": {"state": state, "param_groups": [group]},
            "scaler": {
                "scale": 1024.0,
                "growth_factor": 2.0,
                "backoff_factor": 0.5,
                "growth_interval": 2000,
                "_growth_tracker": 7,
            },
        },
        path,
    )
    other = models.build("resnet18", dim=256, mlp_dim=512)
    optimizer = build_optimizer(other.parameters(), "lars", weight_decay=1e-6, momentum=0.9)
    assert restore(path, other, optimizer, "resnet18") == Position(3, 0, 15)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert len(optimizer.state) == len(state)
    assert all((s["mu"] == 0.5).all() for s in optimizer.state.values())


def in_layout(contents, layout):
    """An optimizer entry whose tensors of four dimensions lie in another memory order."""
    state = {
        number: {k: v.contiguous(memory_format=layout) if getattr(v, "ndim", 0) == 4 else v for k, v in entry.items()}
        for number, entry in contents["state"].items()
    }
    return {**contents, "state": state}


@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("optimizer", "on_device"), [("adamw", False), ("lars", False), ("lars", True)])
def test_states_in_another_memory_order_resume_bit_equal(optimizer, on_device, weights, tmp_path):
    def update(model, made, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(
                memory_format=weights if p.ndim == 4 else torch.contiguous_format
            )
            p.grad = p.grad if p.requires_grad else None
        if on_device:  # the path of GPUs
            made.found_inf, made.grad_scale = torch.zeros(()), None
        made.param_groups[0]["lr"] = 0.1
        made.step()

    def build():
        model = models.build("resnet10_w32", dim=8, mlp_dim=16).to(memory_format=weights)
        return model, build_optimizer(model.parameters(), optimizer, weight_decay=1e-2, momentum=0.9)

    model, made = build()
    update(model, made, 1)
    path = tmp_path / "checkpoint_0000.pth.tar"
    other = torch.contiguous_format if weights is torch.channels_last else torch.channels_last
    contents = packed(model, made)
    checkpoint.write(path, {**contents, "optimizer": in_layout(contents["optimizer"], other)})
    update(model, made, 2)
    resumed, fresh = build()
    restore(path, resumed, fresh)
    for p, state in fresh.state.items():
        assert all(v.stride() == p.stride() for v in state.values() if v.shape == p.shape)
    update(resumed, fresh, 2)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in model.state_dict().items())


def test_lars_takes_states_of_another_memory_order_from_torchs_own_loading():
    # the public class in a plain loop: nothing of ours restores it
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    kept, loaded = (torch.nn.Parameter(weight.clone()) for _ in "12")
    one, two = LARS([kept], lr=0.1), LARS([loaded], lr=0.1)
    mu = torch.randn(8, 4, 3, 3)
    one.load_state_dict(
        {
            "state": {0: {"mu": mu.to(memory_format=torch.channels_last)}},
            "param_groups": one.state_dict()["param_groups"],
        }
    )
    two.load_state_dict({"state": {0: {"mu": mu}}, "param_groups": one.state_dict()["param_groups"]})
    for made, p in ((one, kept), (two, loaded)):
        for _ in "12":
            p.grad = torch.ones_like(p)
            made.found_inf, made.grad_scale = torch.zeros(()), None
            made.step()
    assert torch.equal(kept, loaded)
    assert torch.equal(one.state[kept]["mu"], two.state[loaded]["mu"])


class Evil:
    def __reduce__(self):
        return print, ("this code must never run",)


def test_no_file_runs_code(tmp_path, capsys):
    for name, protocol in (("zip", None), ("bare", 2)):
        path = tmp_path / name
        if protocol is None:
            torch.save({"epoch": 1, "state_dict": Evil()}, path)
        else:
            path.write_bytes(pickle.dumps(Evil(), protocol=protocol))
        with pytest.raises(UserError) as error:
            checkpoint.read(path)
        assert "\n" not in str(error.value)
    assert "must never run" not in capsys.readouterr().out
    with pytest.raises(UserError, match="could run code"):
        checkpoint.read(tmp_path / "zip")


def test_damaged_files_are_refused_in_one_line(file, tmp_path):
    whole = file.read_bytes()
    for share in (0, 1, 0.1, 0.5, 0.9, 0.999):
        cut = tmp_path / "cut.pth.tar"
        cut.write_bytes(whole[: int(len(whole) * share)])
        if share == 1:
            continue
        with pytest.raises(UserError, match=r"cut.pth.tar"):
            checkpoint.read(cut)
    for contents in ([1, 2], {"epoch": 1}, {"epoch": "x", "arch": 1, "state_dict": {}, "optimizer": {}}):
        torch.save(contents, tmp_path / "odd")
        model, made = tiny()
        with pytest.raises(UserError, match="odd"):
            restore(tmp_path / "odd", model, made)


def test_what_does_not_fit_is_refused_and_nothing_is_loaded(file):
    cases = [
        (models.build("resnet10_w48", dim=8, mlp_dim=16), "lars", "resnet10_w48", "is of arch resnet10_w32"),
        (models.build("resnet10_w32", dim=8, mlp_dim=24), "lars", "resnet10_w32", "give the flags"),
        (models.build("resnet10_w32", dim=8, mlp_dim=16), "adamw", "resnet10_w32", "--optimizer lars"),
    ]
    for model, optimizer, arch, message in cases:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        made = build_optimizer(model.parameters(), optimizer, weight_decay=0.0, momentum=0.9)
        with pytest.raises(UserError, match=message):
            restore(file, model, made, arch)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0000.pth.tar"
    checkpoint.write(path, {"epoch": 1})
    before = path.read_bytes()

    def full(contents, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, {"epoch": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_newest_valid(tmp_path, file):
    assert checkpoint.newest(tmp_path)[0] == file
    later = tmp_path / checkpoint.step_name(1, 9)
    later.write_bytes(file.read_bytes())
    latest = tmp_path / checkpoint.epoch_name(1)
    latest.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "checkpoint_notes.txt").write_text("not ours")
    path, _, passed = checkpoint.newest(tmp_path)
    assert path == later
    assert len(passed) == 1
    assert latest.name in passed[0]
    file.unlink()
    later.unlink()
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.newest(tmp_path)
    latest.unlink()
    assert checkpoint.newest(tmp_path) is None


def test_retention(tmp_path):
    names = [checkpoint.epoch_name(0), *(checkpoint.step_name(1, s) for s in (7, 8, 9, 10))]
    left_by_kills = [f".{name}.1234567890.partial" for name in (names[-1], "stable.pth.tar", "best_unlabelled.pth.tar")]
    being_written = f".best_unlabelled.pth.tar.{os.getpid()}.partial"
    for name in (*names, *left_by_kills, being_written):
        (tmp_path / name).touch()
    checkpoint.prune(tmp_path, epoch_complete=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names[0], *names[-2:], being_written])
    (tmp_path / being_written).unlink()
    checkpoint.prune(tmp_path, epoch_complete=1)
    assert [p.name for p in tmp_path.iterdir()] == [names[0]]


def test_contents_are_plain(file):
    contents = checkpoint.read(file)
    contents.pop("state_dict")
    contents.pop("optimizer")
    json.dumps(contents)
