"""The network to fine-tune with its classifier, its optimizer and schedule, as DeiT sets them up."""

from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mocov3.config.archs import is_resnet, is_vit
from mocov3.losses import answers_loss
from mocov3.models import Encoder, build_encoder
from mocov3.models.backbones import Settings
from mocov3.optim import Group

_NOT_DECAYED = ("cls_token", "pos_embed", "dist_token")
_RESNET_LAYERS = {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)\.(\d+)"}


def build_classifier(
    arch: str,
    classes: int,
    *,
    image_size: int,
    patch_size: int,
    small_stem: bool,
    in_chans: int = 3,
    drop_path: float,
    heads: int | None = None,
) -> Encoder:
    """A freshly initialised network with a linear classifier, everything trainable.

    The classifier's weights are truncated-normal (σ .02), its bias 0; a ViT's position table is trained too.
    """

    def head(width: int) -> nn.Module:
        layer = nn.Linear(width, classes)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        return layer

    sizes: Settings = {
        "image_size": image_size,
        "patch_size": patch_size,
        "small_stem": small_stem,
        "in_chans": in_chans,
    }
    if heads is not None:
        sizes["num_heads"] = heads
    dims = {"drop_path_rate": drop_path} if not is_resnet(arch) and drop_path else {}
    try:
        model = build_encoder(arch, head, **sizes, **dims)
    except TypeError:  # some networks of timm have no branches to drop
        model = build_encoder(arch, head, **sizes)
    if is_vit(arch):
        model.pos_embed.requires_grad_(True)
    return model


def parameter_groups(model: Encoder, *, weight_decay: float, layer_decay: float) -> list[Group]:
    """Groups with and without weight decay, one pair a layer where the learning rate decays by layer.

    Not decayed: biases, norms, cls token, position table. With ``layer_decay`` below 1, a layer's ``lr_scale`` is
    ``layer_decay`` to the number of layers above it (Clark et al. 2020, as in BEiT and MAE); the classifier's is 1.
    """
    trunk: Any = model if layer_decay == 1.0 else getattr(model, "backbone", model)
    not_decayed = [name for name, _ in trunk.named_parameters() if name.endswith(_NOT_DECAYED)]  # old timm: no patterns
    if layer_decay == 1.0:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=not_decayed)
    if not hasattr(trunk, "group_matcher"):
        trunk.group_matcher = lambda coarse=False: _RESNET_LAYERS
    groups = param_groups_layer_decay(trunk, weight_decay, no_weight_decay_list=not_decayed, layer_decay=layer_decay)
    if trunk is not model:  # the classifier beside timm's backbone is a layer above it
        for group in groups:
            group["lr_scale"] *= layer_decay
        head: Any = model.projector
        groups += [{**g, "lr_scale": 1.0} for g in param_groups_weight_decay(head, weight_decay)]
    return groups


def build_optimizer(groups: list[Group], *, lr: float, fused: bool = False) -> torch.optim.Optimizer:
    """AdamW, β .9 and .999, ε 1e-8; ``fused`` into one kernel, which can leave a step out, on a GPU."""
    way: dict[str, Any] = {"fused": True} if fused else {}
    return create_optimizer_v2(groups, opt="adamw", lr=lr, eps=1e-8, **way)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, epochs: int, warmup_epochs: int, warmup_lr: float, min_lr: float
) -> Scheduler:
    """timm's cosine per epoch after linear warm-up; use ``set_epoch`` to go to an epoch."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, min_lr=min_lr
    )
    assert scheduler is not None
    return scheduler


def set_epoch(scheduler: Scheduler, epoch: int) -> float:
    """Set the learning rates of ``epoch`` (from 0) and return the unscaled one.

    DeiT steps its scheduler by the finished epoch's number, so epoch e trains at the schedule's value of e − 1, and
    the first two at the same.
    """
    scheduler.step(max(epoch - 1, 0))
    group = scheduler.optimizer.param_groups[-1]
    return group["lr"] / group.get("lr_scale", 1.0)


class FindingsLoss(nn.Module):
    """Binary cross entropy of several findings an image, mean over images; what is not known counts 0.

    Divided by the number of images and findings, known or not, so that the mean over ranks and accumulated batches is
    that of all their images.
    """

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """The mean, of scores (batch, findings) and 1, 0 or −1 for each."""
        return answers_loss(scores, target) / len(scores)


def build_criterion(*, mixes: bool, smoothing: float, findings: bool = False) -> nn.Module:
    """Cross entropy: against mixed targets (smoothed already), with smoothing, or plain; or that of findings."""
    if findings:
        return FindingsLoss()
    if mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
