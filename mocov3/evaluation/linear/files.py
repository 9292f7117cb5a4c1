"""Files of linear evaluation: the reference's ``epoch, arch, state_dict, best_acc1, optimizer``, and ``mocov3``.

``state_dict`` is the whole model with one linear layer (that of the best head, a batch norm folded in), so that the
reference and every reader of its files can use it. What a resume of many heads needs lies in ``mocov3``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocov3.config.archs import HEAD_KEYS
from mocov3.errors import UserError
from mocov3.evaluation.frozen import Frozen
from mocov3.evaluation.linear.heads import Heads
from mocov3.weights import Contents, checkpoint, our_entry
from mocov3.weights.checkpoint import FORMAT_VERSION, PREFIX, Position

CHECKPOINT, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
TASK = "linear evaluation"


class Classifier(NamedTuple):
    """The linear layer of a file."""

    weight: Tensor
    bias: Tensor


def pack(frozen: Frozen, heads: Heads, best: int, *, position: Position, best_acc1: float, extra: Contents) -> Contents:
    """Contents of a file whose classifier is head number ``best``; ``extra`` joins the ``mocov3`` entry."""
    name = f"{frozen.head}."
    state = {k: v for k, v in frozen.network.state_dict().items() if not k.startswith(name)}
    weight, bias = heads.folded(best)
    whole = {**state, f"{name}weight": weight, f"{name}bias": bias}
    return {
        "epoch": position.epoch,
        "arch": frozen.arch,
        "state_dict": {PREFIX + k: v.detach().cpu() for k, v in whole.items()},
        "best_acc1": best_acc1,
        "optimizer": _one_head(heads, best),
        "mocov3": {
            "format": FORMAT_VERSION,
            "task": TASK,
            "iteration": position.iteration,
            "step": position.step,
            "state": heads.state(),
            **extra,
        },
    }


def _one_head(heads: Heads, number: int) -> Contents:
    """The optimizer of one head, numbered as if it were the only one; without momentum if a norm was folded in."""
    group = {k: v for k, v in heads.optimizer.param_groups[number].items() if k != "params"}
    parameters = (heads.weights[number], heads.biases[number])
    momenta = [heads.optimizer.state[p].get("momentum_buffer") for p in parameters]
    state: dict[int, Any] = {}
    if heads.specs[number].kind == "linear" and momenta[0] is not None:
        state = {i: {"momentum_buffer": m.cpu().clone()} for i, m in enumerate(momenta)}
    return {"state": state, "param_groups": [{**group, "params": [0, 1]}]}


def read(path: str | Path, where: str) -> Contents:
    """The contents of a linear file, ours or the reference's.

    Raises:
        UserError: if it is something else, or misses an entry.
    """
    contents = checkpoint.read(path)
    checkpoint.check_entries(contents, where, optimizer=False)
    if any("base_encoder." in str(k) for k in contents["state_dict"]):
        raise UserError(f"{where}: is a pre-training checkpoint, not a linear file; give it by --pretrained")
    return contents


def classifier(contents: Contents, where: str) -> Classifier:
    """The linear layer in the contents of a linear file.

    Raises:
        UserError: if there is none.
    """
    state = {str(k).removeprefix(PREFIX): v for k, v in contents["state_dict"].items()}
    for name in HEAD_KEYS:
        weight, bias = state.get(f"{name}weight"), state.get(f"{name}bias")
        if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.ndim == 2 and len(bias) == len(weight):
            return Classifier(weight.float(), bias.float())
    raise UserError(f"{where}: holds no linear classifier (fc.weight, head.weight or projector.weight)")


def best_acc1(contents: Contents) -> float:
    """The file's ``best_acc1``, a number or (in the reference's published files) a tensor of one."""
    value = contents.get("best_acc1", 0.0)
    return float(value) if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1) else 0.0


def restore(contents: Contents, heads: Heads, where: str, *, iterations: int) -> Position:
    """Load heads and optimizer from the contents of a linear file, and say where the run stood.

    Raises:
        UserError: if classes, width or number of heads are others.
    """
    entry = our_entry(contents)
    saved_classifier = classifier(contents, where)
    check_shape(saved_classifier, heads.classes, heads.weights[0].shape[1], where)
    epoch = int(contents["epoch"])
    if isinstance(entry.get("state"), dict):
        try:
            heads.load(entry["state"])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError):
            raise UserError(f"{where}: its heads are not those of these flags, or damaged") from None
        return Position(epoch, int(entry.get("iteration", 0)), int(entry.get("step", epoch * iterations)))
    if len(heads.specs) != 1 or heads.specs[0].kind != "linear":
        raise UserError(f"{where}: holds one linear head (the reference wrote it); resume it with one --lr")
    momenta = _momenta(contents.get("optimizer"), saved_classifier, where)
    heads.load(
        {
            "weights": [saved_classifier.weight],
            "biases": [saved_classifier.bias],
            "momenta": momenta,
            "norm": [heads.norm.mean.cpu(), heads.norm.variance.cpu()],
        }
    )
    return Position(epoch, 0, epoch * iterations)


def check_shape(saved: Classifier, classes: int, width: int, where: str) -> None:
    """Refuse a classifier of another number of classes or of another width of features."""
    if len(saved.weight) != classes:
        raise UserError(f"{where}: classifies {len(saved.weight)} classes, the data has {classes}")
    if saved.weight.shape[1] != width:
        raise UserError(f"{where}: its classifier takes {saved.weight.shape[1]} features, the backbone gives {width}")


def _momenta(optimizer: object, saved: Classifier, where: str) -> list[Tensor]:
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise UserError(f"{where}: misses the entry 'optimizer' that a resume needs")
    if not optimizer["state"]:
        return [torch.empty(0), torch.empty(0)]
    momenta: list[Any] = [(optimizer["state"].get(i) or {}).get("momentum_buffer") for i in range(2)]
    for m, value in zip(momenta, saved, strict=True):
        if not isinstance(m, Tensor) or m.shape != value.shape:
            raise UserError(f"{where}: its optimizer entry does not fit its classifier; use another checkpoint")
    return momenta
