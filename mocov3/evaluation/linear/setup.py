"""Where linear evaluation starts or resumes: its file, its backbone, its resolved configuration."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import torch

from mocov3.config import PRESETS, LinclsConfig
from mocov3.config.archs import stored_heads
from mocov3.data import Source
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation.frozen import Frozen, open_frozen
from mocov3.evaluation.linear import files
from mocov3.evaluation.linear.heads import Heads, HeadSpec
from mocov3.running.changes import refuse_changes
from mocov3.weights import Contents, our_entry, trained_with

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
    common: dict[str, Any] = {
        name: getattr(c, name) for name in ("image_size", "view_preset", "heads", "channels", "bit_window")
    }
    common["seed"] = seed
    pretrained = None
    if c.pretrained:
        pretrained = open_frozen(
            c.pretrained, flag="--pretrained", arch=c.arch, encoder=c.encoder, adapter=c.adapter, **common
        )
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
    began_in = trained_with(contents).get("precision", c.precision) if contents is not None else c.precision
    return frozen, dataclasses.replace(
        c,
        arch=frozen.arch,
        seed=seed,
        image_size=frozen.image_size,
        view_preset=preset,
        heads=stored_heads(frozen.heads, frozen.arch, c.heads),
        precision=began_in if c.precision == "auto" else c.precision,
    )


def check_same_run(path: str, contents: Contents | None, config: LinclsConfig, source: Source) -> None:
    """Refuse to resume from a file with other result-changing flags, other classes or other images.

    Raises:
        UserError: naming what differs.
    """
    if contents is None:
        return
    entry = our_entry(contents)
    refuse_changes(f"--resume {path}", config, contents)
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


def build_heads(config: LinclsConfig, frozen: Frozen, classes: int, world: World) -> Heads:
    """The heads that are trained side by side: every kind, weight decay and learning rate."""
    c = config
    lrs = c.lrs if c.solver == "sgd" else (0.0,)  # L-BFGS has none
    return Heads(
        [HeadSpec(kind, lr, wd) for kind in c.kinds for wd in c.weight_decays for lr in lrs],
        width=frozen.width,
        classes=classes,
        seed=c.seed or 0,
        momentum=c.momentum,
        world=world,
        dtype=torch.get_default_dtype(),
    )
