"""The network that a run with ``--init`` starts from, built again beside the model, and made sure of at a resume."""

from pathlib import Path
from typing import Any

import torch

from mocov3 import models
from mocov3.config import PretrainConfig
from mocov3.errors import UserError
from mocov3.models import Encoder
from mocov3.weights import Contents, our_entry
from mocov3.weights.adapters import digest_of
from mocov3.weights.start import load_start


def backbone_settings(c: PretrainConfig) -> dict[str, Any]:
    """What ``build_backbone`` needs beside the arch, but for what is frozen."""
    return {
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "in_chans": c.channels,
        "small_stem": c.small_stem,
        **({"num_heads": c.heads} if c.heads is not None else {}),
    }


def start_network(config: PretrainConfig) -> Encoder:
    """The backbone as a run with ``--init`` begins, without heads, on the CPU.

    Raises:
        UserError: if the weights cannot be had, or do not fit.
    """
    c = config
    encoder = models.build_backbone(c.arch, **backbone_settings(c))
    setattr(encoder, encoder.projector_name, torch.nn.Identity())
    load_start(c.init, [encoder], c.arch, c.heads, c.adapter)
    return encoder


def check_start(start: Encoder, config: PretrainConfig, resume_from: tuple[Path, Contents] | None) -> str:
    """Digest of the starting network.

    Raises:
        UserError: if the run to resume began with other weights.
    """
    digest = digest_of(start.state_dict())
    saved = our_entry(resume_from[1]).get("start") if resume_from else None
    if saved and saved != digest:
        raise UserError(
            f"--init {config.init}: holds other weights than when this run began, which compares with them: give the "
            "file as it was, or begin a new run"
        )
    return digest
