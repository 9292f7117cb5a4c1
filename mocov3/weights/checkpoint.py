"""Checkpoints: what is in them, what they are called, which are kept, and how a run is restored from one.

Layout of a pre-training checkpoint: the reference's ``epoch, arch, state_dict, optimizer, scaler`` and one entry
more, ``mocov3``. Keys of ``state_dict`` begin with ``module.``, in the reference's order.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mocov3.distributed.sharding import is_shard, like, whole
from mocov3.errors import UserError
from mocov3.optim import in_memory_order, name_by_state, name_of
from mocov3.weights import Contents, our_entry
from mocov3.weights.tensorfiles import read, write

__all__ = ["Position", "check_state", "newest", "pack", "prune", "read", "restore", "restore_optimizer", "write"]

FORMAT_VERSION = 1
PREFIX = "module."
_NAME = re.compile(r"checkpoint_(\d{4,})(?:_step(\d{9,}))?\.pth\.tar")
_SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
_MID_EPOCH_KEPT = 2
_OWN = {"config": dict, "format": int, "iteration": int, "step": int, "skipped": int, "resumed": int, "corrupt": list}
"""What a resume needs of the entry ``mocov3``, where it is there."""


@dataclass(frozen=True)
class Position:
    """Where in training a checkpoint stands: epochs completed, iterations of the running one, steps in all."""

    epoch: int
    iteration: int
    step: int


def pack(
    *,
    arch: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Contents,
    position: Position,
    extra: Contents,
    keep: bool = True,
) -> Contents:
    """Contents of a checkpoint; ``extra`` is what ``mocov3`` holds besides format version and position.

    Of weights that ranks share (``--fsdp``) it holds the whole; all ranks call it then, and one has ``keep``.
    """
    return {
        "epoch": position.epoch,
        "arch": arch,
        "state_dict": {PREFIX + key: value for key, value in whole(model.state_dict(), keep=keep).items()},
        "optimizer": whole(optimizer.state_dict(), keep=keep),
        "scaler": {**_SCALER, **scaler},
        "mocov3": {"format": FORMAT_VERSION, "iteration": position.iteration, "step": position.step, **extra},
    }


def epoch_name(epoch: int) -> str:
    """File of the end of ``epoch``, counted from 0."""
    return f"checkpoint_{epoch:04d}.pth.tar"


def step_name(epoch: int, step: int) -> str:
    """File within the running ``epoch`` after ``step`` steps in all."""
    return f"checkpoint_{epoch:04d}_step{step:09d}.pth.tar"


def listed(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first."""
    checkpoints = []
    for path in folder.glob("checkpoint_*.pth.tar"):
        if match := _NAME.fullmatch(path.name):
            epoch, step = int(match[1]), match[2]
            # the file of epoch e stands at the beginning of epoch e + 1
            checkpoints.append(((epoch + 1, 0) if step is None else (epoch, int(step)), path))
    return [path for _, path in sorted(checkpoints, reverse=True)]


def newest(folder: Path) -> tuple[Path, Contents, list[str]] | None:
    """The newest checkpoint that can be read, its contents, and why newer ones were passed over."""
    passed = []
    for path in listed(folder):
        try:
            contents = read(path)
            check_entries(contents, path)
        except UserError as error:
            passed.append(str(error))
            continue
        return path, contents, passed
    if passed:
        raise UserError(f"--resume auto: no checkpoint in {folder} can be read; the newest: {passed[0]}")
    return None


def prune(folder: Path, *, epoch_complete: int | None = None, keep_last: int = 0, keep_every: int = 0) -> None:
    """Remove what a newer checkpoint has made useless.

    Mid-epoch checkpoints beyond the newest two, and those of epochs up to ``epoch_complete``; with ``keep_last`` also
    checkpoints of epochs beyond the newest so many, except after every ``keep_every``-th epoch.
    """
    for partial in folder.glob(".*.pth.tar.*.partial"):  # left by a kill in the middle of writing
        own = partial.name.endswith(f".{os.getpid()}.partial")  # of other files, which another thread may be writing
        if not own or partial.name.startswith(".checkpoint_"):
            partial.unlink(missing_ok=True)
    ends: list[tuple[Path, int]] = []
    middles: list[tuple[Path, int]] = []
    for path in listed(folder):
        if match := _NAME.fullmatch(path.name):
            (middles if match[2] else ends).append((path, int(match[1])))
    for i, (path, epoch) in enumerate(middles):
        if i >= _MID_EPOCH_KEPT or (epoch_complete is not None and epoch <= epoch_complete):
            path.unlink(missing_ok=True)
    if keep_last:
        for path, epoch in ends[keep_last:]:
            if not keep_every or (epoch + 1) % keep_every:
                path.unlink(missing_ok=True)


def restore(
    path: Path,
    contents: Contents,
    *,
    arch: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: "torch.amp.GradScaler",
    iterations: int,
) -> Position:
    """Load a whole checkpoint, ours or the reference's; hyper-parameters stay those of the command line.

    Raises:
        UserError: if an entry is missing or does not fit; nothing is loaded then.
    """
    check_entries(contents, path)
    if contents["arch"] != arch:
        raise UserError(f"--resume {path}: is of arch {contents['arch']}, not {arch}; give --arch {contents['arch']}")
    state = {key.removeprefix(PREFIX): value for key, value in contents["state_dict"].items()}
    check_state(model, state, f"--resume {path}")
    saved = contents["optimizer"]
    _check_optimizer(saved, optimizer, path)
    wanted = model.state_dict()
    model.load_state_dict({key: like(value, wanted[key]) for key, value in state.items()})
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    restore_optimizer(optimizer, saved)
    for group, ours in zip(optimizer.param_groups, groups, strict=True):
        group.update(ours)
    if scaler.is_enabled() and contents.get("scaler"):
        scaler.load_state_dict(contents["scaler"])
    entry = our_entry(contents)
    epoch = int(contents["epoch"])
    return Position(epoch, int(entry.get("iteration", 0)), int(entry.get("step", epoch * iterations)))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Contents) -> None:
    """Load an optimizer's state, sharded and laid out in memory as the parameters are.

    Files of the reference and of sharded runs hold contiguous tensors, ours those of channels-last weights; torch
    loads either as it stands, and its fused updates then pair entries of different places.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(value: object, parameter: Tensor) -> object:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value  # a number, or the count of steps
        # shared parameters are contiguous, and so is the shard of a contiguous tensor
        return like(value.contiguous(), parameter) if is_shard(parameter) else in_memory_order(value, parameter)

    state = {
        number: {name: placed(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    # how updates are computed is this device's, not the file's
    ways = [{k: v for k, v in group.items() if k in ("fused", "foreach")} for group in optimizer.param_groups]
    groups = [{**group, **way} for group, way in zip(saved["param_groups"], ways, strict=True)]
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})


def check_state(model: nn.Module, state: Contents, where: str) -> None:
    """Refuse a state dict whose keys or shapes are not the model's, naming the first difference."""
    wanted = model.state_dict()
    for key, value in wanted.items():
        if key not in state:
            raise UserError(f"{where}: misses {key}; it is not a checkpoint of this model")
        if not isinstance(state[key], Tensor) or state[key].shape != value.shape:
            have = tuple(state[key].shape) if isinstance(state[key], Tensor) else type(state[key]).__name__
            raise UserError(
                f"{where}: {key} is {have} where this model has {tuple(value.shape)}; "
                "give the flags it was trained with"
            )
    if unknown := [key for key in state if key not in wanted]:
        raise UserError(f"{where}: holds {unknown[0]}, which this model does not have")


def check_entries(contents: Contents, where: Path | str, *, optimizer: bool = True) -> None:
    """Refuse contents that miss an entry of a checkpoint (with or without ``optimizer``) or are of a later format."""
    kinds = {"epoch": int, "arch": str, "state_dict": dict, **({"optimizer": dict} if optimizer else {})}
    for entry, kind in kinds.items():
        if not isinstance(contents.get(entry), kind):
            have = ", ".join(map(str, list(contents)[:6]))
            raise UserError(f"{where}: misses the entry {entry!r} of a checkpoint (it has: {have})")
    extra = contents.get("mocov3", {})
    own = isinstance(extra, dict) and all(isinstance(extra.get(name, kind()), kind) for name, kind in _OWN.items())
    if not own or not all(isinstance(index, int) for index in extra.get("corrupt", [])):
        raise UserError(f"{where}: its entry 'mocov3' is damaged; use another checkpoint")
    if extra.get("format", 0) > FORMAT_VERSION:
        raise UserError(f"{where}: was written by a newer mocov3; update this one")


def _check_optimizer(saved: Contents, optimizer: torch.optim.Optimizer, path: Path) -> None:
    try:
        counts = [len(group["params"]) for group in saved["param_groups"]]
        states = saved["state"]
        names = {name for state in states.values() for name in state}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shapes_fit = all(
            not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameters[number].shape
            for number, state in states.items()
            for value in state.values()
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"--resume {path}: its optimizer entry is damaged; use another checkpoint") from None
    wanted = [len(group["params"]) for group in optimizer.param_groups]
    if counts != wanted:
        raise UserError(f"--resume {path}: its optimizer has {counts} parameters, this model {wanted}")
    kind, ours = name_by_state(names), name_of(optimizer)
    if names and kind != ours:
        raise UserError(f"--resume {path}: was trained with --optimizer {kind}, not {ours}")
    if not shapes_fit:
        raise UserError(f"--resume {path}: its optimizer entry does not fit this model; use another checkpoint")
