"""Checkpoints of fine-tuning: DeiT's ``checkpoint.pth`` (``model, optimizer, epoch, model_ema``) and what we add.

``model`` holds the network with its classifier under the names of DeiT's files, so every reader of those can read ours.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mocov3.config import FinetuneConfig
from mocov3.config.archs import is_vit, stored_heads
from mocov3.config.fields import Fields
from mocov3.config.finetune import known_arch
from mocov3.config.presets import PRESETS
from mocov3.distributed import World
from mocov3.errors import UserError, nearest
from mocov3.models import Encoder
from mocov3.running.changes import refuse_changes
from mocov3.running.counters import Counters
from mocov3.weights import Contents, checkpoint, convert, our_entry, trained_with
from mocov3.weights.convert import views_of
from mocov3.weights.find import find_backbone, hint, named_arch
from mocov3.weights.start import for_channels

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"
TASK = "finetune"
_OPEN = {
    "arch": ("", "vit_base"),
    "image_size": (0, 224),
    "patch_size": (0, 16),
    "small_stem": (None, False),
    "view_preset": ("", "photos"),
}
"""Fields that the weights decide unless they are given: (not given, without weights)."""


class Start(NamedTuple):
    """Where a run begins."""

    config: FinetuneConfig
    """Complete: nothing is left to the weights."""
    resumed: Contents | None
    """Contents of a checkpoint of this task to resume from."""
    weights: Contents | None
    """Contents of a file to start from."""
    where: str
    """The file, for messages."""


def find_start(config: FinetuneConfig, world: World) -> Start:
    """The checkpoint or weights that ``--resume`` and ``--finetune`` name, and the configuration completed by them.

    ``--resume FILE`` resumes if FILE is a checkpoint of this task; any other file with weights is started from, as
    the reference's users start from a file with ``model`` alone.

    Raises:
        UserError: if a named file is missing or holds no weights.
    """
    resumed = weights = None
    where = ""
    if config.resume == "auto":
        last = Path(config.output_dir) / LAST
        if world.broadcast(last.is_file()):
            where, resumed = f"--resume {last}", checkpoint.read(last)
    elif config.resume:
        where = f"--resume {config.resume}"
        contents = checkpoint.read(config.resume)
        entry = our_entry(contents)
        if entry.get("task") == TASK and "optimizer" in contents:
            resumed = contents
        else:
            weights = contents
    if resumed is None and weights is None and config.finetune:
        where, weights = f"--finetune {config.finetune}", checkpoint.read(config.finetune)
    return Start(_completed(config, resumed or weights, where), resumed, weights, where)


def _completed(config: FinetuneConfig, contents: Contents | None, where: str) -> FinetuneConfig:
    saved = dict(trained_with(contents)) if contents else {}
    if contents and (named := named_arch(contents)):
        saved["arch"] = named
    values: Fields = {}
    for name, (not_given, default) in _OPEN.items():
        value = getattr(config, name)
        if value == not_given:
            value = saved.get(name)
            value = value if isinstance(value, type(default)) and value != not_given else default
        values[name] = value
    values |= _reading(config, contents or {}, where)
    values["arch"] = known_arch(values["arch"])
    if contents and is_vit(values["arch"]):
        weights = find_backbone(contents, where, heads=config.heads, arch=values["arch"])
        heads = weights.sizes(values["arch"], where).get("num_heads", config.heads)
        values["heads"] = stored_heads(heads, values["arch"], config.heads)
    complete = dataclasses.replace(config, **values)
    complete.check()
    if complete.view_preset not in PRESETS:
        raise UserError(
            f"--view-preset {complete.view_preset!r} is not known; {nearest(complete.view_preset, list(PRESETS))}"
        )
    return complete


def _reading(config: FinetuneConfig, contents: Contents, where: str) -> Fields:
    """How images are read and normalised: as the weights' were, unless flags say otherwise."""
    saved, views = trained_with(contents), views_of(contents, where)
    channels, window = views.reading.channels, saved.get("bit_window")
    values: Fields = {"channels": config.channels or channels, "bit_window": config.bit_window}
    if not config.bit_window and views.reading.window:
        values["bit_window"] = window if window and isinstance(window, str) else _listed(views.reading.window)
    if config.mean_std or config.view_preset or values["channels"] != channels:
        return values  # the weights' mean and deviation belong to their preset and channels
    if isinstance(saved.get("mean_std"), str) and saved["mean_std"]:
        values["mean_std"] = saved["mean_std"]
    elif "view" in our_entry(contents):  # a file of linear evaluation, or an export of one
        values["mean_std"] = _listed(views.mean + views.std)
    return values


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(str(number).removesuffix(".0") for number in numbers)


def start_from(
    model: Encoder,
    contents: Contents,
    where: str,
    *,
    arch: str,
    classes: int,
    keep_head: bool,
    heads: int | None = None,
) -> list[str]:
    """Load the backbone of a file; with ``keep_head`` its classifier too. Returns the keys that stayed as built.

    ``heads`` are the attention heads of a file that does not tell them.

    Raises:
        UserError: if it does not fit, or has no classifier of ``classes`` classes where one is to be kept.
    """
    weights = find_backbone(contents, where, heads=heads, arch=arch)
    if weights.arch is not None and weights.arch != arch:
        raise UserError(f"{where}: is of arch {weights.arch}, not {arch}")
    try:
        left = convert.load_into(model, for_channels(weights, model, where), where)
    except UserError as error:
        raise UserError(f"{error} ({hint(weights)})") from None
    if keep_head:
        state: dict[str, Tensor] = contents.get("model", {})
        for key in left:
            if key not in state:
                raise UserError(f"{where}: has no classifier ({key}); fine-tune it first")
            check_classes(state[key], classes, where)
        model.load_state_dict({key: state[key] for key in left}, strict=False)
        return []
    return left


def check_classes(value: Tensor, classes: int, where: str) -> None:
    """Refuse a classifier of another number of classes than the data set's."""
    if value.shape[:1] != (classes,):
        have = value.shape[0] if value.ndim else 0
        raise UserError(f"{where}: its classifier has {have} classes, the data set has {classes}")


def check_same_run(start: Start, *, total_batch: int, digest: str, images: int) -> None:
    """Refuse to resume with other result-changing fields, another batch over all processes, or other images.

    Raises:
        UserError: naming what differs.
    """
    assert start.resumed is not None
    entry = our_entry(start.resumed)
    more = []
    if (before := entry.get("total_batch")) != total_batch:
        more = [f"images a step in all ({before} → {total_batch}; --accum-iter makes up for processes)"]
    refuse_changes(start.where, start.config, start.resumed, more=more)
    if entry.get("data_digest") != digest:
        raise UserError(
            f"{start.where}: was trained on {entry.get('pictures')} images; --data-path holds {images}, or others"
        )


def origin(start: Start) -> tuple[str, str]:
    """Origin and licence of the weights, as every file of ours carries them."""
    contents = start.resumed or start.weights
    if contents is None:
        return "trained from scratch by mocov3", "the trainer's to choose"
    entry = our_entry(contents)
    if start.resumed is not None:
        return str(entry.get("origin", "")), str(entry.get("licence", ""))
    name = Path(start.where.split(" ", 1)[1]).name
    unknown = "that of the starting weights, not stated in them (the reference's public files: CC-BY-NC 4.0)"
    return f"fine-tuned from {name} ({entry.get('origin', 'origin not stated')})", str(entry.get("licence", unknown))


def named(start: Start) -> str:
    """The file a run starts from, as the user named it."""
    return start.where.split(" ", 1)[1]


def contents(
    start: Start,
    parts: Any,
    position: checkpoint.Position,
    counters: Counters,
    *,
    best: bool,
    total_batch: int,
    digest: str,
    images: int,
    classes: list[str],
) -> Contents:
    """What is written: everything a resume needs, or for the ``best`` weights only what names them.

    Args:
        start: where the run began.
        parts: its ``setup.Parts``.
        position: where it stands.
        counters: what was counted so far.
        best: only the weights.
        total_batch: images a step over all processes.
        digest: of the training images.
        images: how many.
        classes: their names.
    """
    come_from, licence = origin(start)
    entry = {
        "format": checkpoint.FORMAT_VERSION,
        "task": TASK,
        "config": dataclasses.asdict(start.config),
        "epoch": position.epoch,
        "iteration": position.iteration,
        "step": position.step,
        "counters": {k: v for k, v in vars(counters).items() if isinstance(v, int | float)},
        "corrupt": sorted(counters.corrupt),
        "total_batch": total_batch,
        "data_digest": digest,
        "pictures": images,
        "classes": classes,
        "origin": come_from,
        "licence": licence,
    }
    weights = {"model": parts.model.state_dict(), "arch": start.config.arch, "epoch": position.epoch, "mocov3": entry}
    if best:
        return weights
    average = parts.ema.module.state_dict() if parts.ema is not None else {}
    return weights | {
        "optimizer": parts.optimizer.state_dict(),
        "model_ema": average,
        "scaler": parts.precision.scaler.state_dict(),
    }
