"""Where linear evaluation starts or resumes: its file, its backbone, its resolved configuration."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

from mocov3.config import PRESETS, LinclsConfig, changed_fields, logger_names, write_yaml
from mocov3.config.archs import stored_heads
from mocov3.config.lincls import numbers
from mocov3.data import Source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation.frozen import Frozen, open_frozen
from mocov3.evaluation.linear import files
from mocov3.evaluation.linear.heads import Heads
from mocov3.evaluation.linear.log import EvaluationLog
from mocov3.output.log import warn
from mocov3.output.terminal import style_of
from mocov3.weights import Contents, our_entry
from mocov3.weights.checkpoint import Position

PROTOCOL = "linear evaluation"
CACHED = "linear evaluation on cached features, without augmentation (not the published protocol)"


def protocol(config: LinclsConfig) -> str:
    """The protocol, as it is written beside every number."""
    return CACHED if config.cache_features else PROTOCOL


def find(config: LinclsConfig) -> tuple[str, Contents | None]:
    """The linear file of ``--resume`` (what to call it, its contents), or ``None``; ``auto`` may find nothing.

    Raises:
        UserError: if it cannot be read or is not a linear file.
    """
    if not config.resume:
        return "", None
    path = Path(config.output_dir) / files.CHECKPOINT if config.resume == "auto" else Path(config.resume)
    if config.resume == "auto" and not path.exists():
        return "", None
    return str(path), files.read(path, f"--resume {path}")


def open_backbone(
    config: LinclsConfig, world: World, path: str, contents: Contents | None
) -> tuple[Frozen, LinclsConfig]:
    """The frozen backbone, and the configuration with arch, seed, image size and preset as they are used.

    A linear file holds its backbone; where ``--pretrained`` is given too, the two must agree.

    Raises:
        UserError: if there is no backbone, or not of this arch.
    """
    c = config
    saved = our_entry(contents)
    drawn = secrets.randbelow(2**31) if c.seed is None else c.seed
    seed = saved["seed"] if c.seed is None and isinstance(saved.get("seed"), int) else world.broadcast(drawn)
    common: dict[str, Any] = {"image_size": c.image_size, "view_preset": c.view_preset, "seed": seed, "heads": c.heads}
    pretrained = None
    if c.pretrained:
        pretrained = open_frozen(c.pretrained, flag="--pretrained", arch=c.arch, encoder=c.encoder, **common)
    if contents is not None and c.arch != "pixels":
        frozen = open_frozen(path, flag="--resume", arch=c.arch, **common)
        if isinstance(saved.get("origin"), str):  # what it was before it was frozen into this file
            frozen = dataclasses.replace(frozen, about=saved["origin"])
        if pretrained is not None and pretrained.digest() != frozen.digest():
            raise UserError(f"--resume {path}: was trained on another backbone than --pretrained {c.pretrained}")
    elif pretrained is not None:
        frozen = pretrained
    else:
        frozen = open_frozen(c.arch, flag="--arch", **common)
    preset = next((name for name, p in PRESETS.items() if p == frozen.preset), c.view_preset)
    return frozen, dataclasses.replace(
        c,
        arch=frozen.arch,
        seed=seed,
        image_size=frozen.image_size,
        view_preset=preset,
        heads=stored_heads(frozen.heads, frozen.arch, c.heads),
    )


def check_same_run(path: str, contents: Contents | None, config: LinclsConfig, source: Source) -> None:
    """Refuse to resume from a file with other result-changing flags, other classes or other images.

    Raises:
        UserError: naming what differs.
    """
    if contents is None:
        return
    entry = our_entry(contents)
    saved = {k: v for k, v in entry.get("config", {}).items() if k != "heads"}  # compared with the backbone already
    for name in ("lr", "weight_decay"):
        if name in saved:
            saved[name] = numbers(saved[name])
    if (changed := changed_fields(config, saved)) and not config.allow_config_change:
        raise UserError(
            f"--resume {path}: these fields differ from the checkpoint's: {', '.join(changed)}; "
            "give them as they were, or --allow-config-change"
        )
    classes = entry.get("classes")
    if isinstance(classes, list) and classes != list(source.classes):
        raise UserError(
            f"--resume {path}: was trained on {len(classes)} classes, first {classes[0]!r}; "
            f"{config.data} has {len(source.classes)}, first {source.classes[0]!r}"
        )
    if entry.get("data_digest", source.digest) != source.digest and not config.allow_config_change:
        raise UserError(
            f"--resume {path}: was trained on other images than those of {config.data}; give the same, "
            "or --allow-config-change"
        )


def open_log(
    config: LinclsConfig,
    world: World,
    frozen: Frozen,
    images: tuple[int, int],
    heads: Heads,
    iterations: int,
    position: Position,
    *,
    resumed: bool,
    script_door: bool,
) -> EvaluationLog:
    """The log of a run, ``lincls.yaml``, and what is said at the beginning."""
    c = config
    style = style_of(quiet=c.quiet, json=c.json, script_door=script_door)
    folder = Path(c.output_dir)
    log = EvaluationLog(
        folder,
        active=world.main,
        style=style,
        epochs=c.epochs,
        iterations=iterations,
        batch_size=c.batch_size,
        first_epoch=position.epoch,
        done=position.epoch * iterations + position.iteration,
        loggers=logger_names(c.logger),
        config=dataclasses.asdict(c),
    )
    if world.main:
        complete = dataclasses.replace(c, resume="", config="")
        write_yaml(complete, folder / "lincls.yaml", "re-run by: mocov3 lincls --config FILE")
        if not (c.pretrained or c.resume or c.arch == "pixels"):
            warn("no --pretrained: the backbone is untrained")
    if world.size > 1 and world.device.type != "cuda" and c.dist_backend == "nccl":
        log.say("no CUDA here: ranks communicate over gloo instead of nccl")
    log.say(
        f"{protocol(c)} of {frozen.about}: {images[0]} training and {images[1]} validation images, "
        f"{heads.classes} classes, {len(heads.specs)} heads, {iterations} steps of {c.batch_size} an epoch, "
        f"{c.epochs} epochs; {world.size} process(es) on {world.device.type}; seed {c.seed}"
    )
    if resumed:
        log.say(f"resumed at epoch {position.epoch}, iteration {position.iteration}")
    return log
