"""The model that a configuration describes, on this rank's device."""

from typing import Any

import torch

from mocov3 import models
from mocov3.config import PretrainConfig
from mocov3.config.archs import is_vit
from mocov3.distributed import World, synchronise_batch_norm
from mocov3.errors import UserError
from mocov3.groups import freeze_until
from mocov3.models import MoCo
from mocov3.start import load_start


def build_model(config: PretrainConfig, world: World) -> MoCo:
    """The model of a configuration on this rank's device, in training mode."""
    c = config
    model = models.build(
        c.arch,
        image_size=c.image_size,
        patch_size=c.patch_size,
        in_chans=c.channels,
        dim=c.moco_dim,
        mlp_dim=c.moco_mlp_dim,
        temperature=c.moco_t,
        stop_grad_conv1=c.stop_grad_conv1,
        small_stem=c.small_stem,
    )
    if c.init:
        load_start(c.init, [model.base_encoder, model.momentum_encoder], c.arch)
    if c.freeze_until:
        freeze_until(model.base_encoder, c.freeze_until)
    if c.grad_checkpoint:
        backbone: Any = getattr(model.base_encoder, "backbone", model.base_encoder)
        if not hasattr(backbone, "set_grad_checkpointing"):
            raise UserError(f"--grad-checkpoint: {c.arch} cannot recompute its blocks")
        if model.views_meet and not is_vit(c.arch):  # a ViT's convolutional stem is not recomputed
            raise UserError(f"--grad-checkpoint would update the batch statistics of {c.arch} twice")
        backbone.set_grad_checkpointing(True)
    if world.size > 1:
        synchronise_batch_norm(model)
    # channels-last is the layout convolutions are fastest in; names and values are the same
    model.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()
