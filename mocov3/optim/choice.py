"""Optimizers by name."""

import torch
from torch.optim.optimizer import ParamsT

from mocov3.optim.lars import LARS
from mocov3.optim.muon import Muon


def build_optimizer(params: ParamsT, name: str, *, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    """``lars``, ``adamw`` or ``muon`` over all parameters in one group, as the reference builds the first two.

    AdamW decays every parameter (biases, norms and cls token too) and is torch's fused one, which reads memory once
    and can be told on the device to skip a step (``found_inf``). Muon does so too. ``momentum`` is that of LARS. The
    learning rate is set each step.
    """
    if name == "lars":
        return LARS(params, weight_decay=weight_decay, momentum=momentum)
    if name == "muon":
        return Muon(params, weight_decay=weight_decay)
    return torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, fused=True)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Which of them it is."""
    kinds = {Muon: "muon", LARS: "lars", torch.optim.AdamW: "adamw"}
    return next(name for kind, name in kinds.items() if isinstance(optimizer, kind))


def name_by_state(entries: set[str]) -> str:
    """Which of them keeps states with these entries."""
    if "mu" in entries:
        return "muon" if "exp_avg" in entries else "lars"
    return "adamw"
