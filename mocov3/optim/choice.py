"""Optimizers by name."""

import torch
from torch.optim.optimizer import ParamsT

from mocov3.optim.lars import LARS


def build_optimizer(params: ParamsT, name: str, *, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    """``lars`` or ``adamw`` over all parameters in one group, as the reference builds it.

    AdamW decays every parameter (biases, norms and cls token too) and is torch's fused one, which reads memory once
    and can be told on the device to skip a step (``found_inf``). The learning rate is set each step.
    """
    if name == "lars":
        return LARS(params, weight_decay=weight_decay, momentum=momentum)
    return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, fused=True)
