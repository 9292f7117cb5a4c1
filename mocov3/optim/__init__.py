"""Optimizers of MoCo v3: LARS and torch's AdamW, as the reference has them, and Muon.

The optimizer is given every parameter of the model, frozen and momentum ones included: they take numbers in the
saved state, as in the reference's files, but never get state.
"""

from mocov3.optim.choice import build_optimizer, name_by_state, name_of
from mocov3.optim.lars import LARS
from mocov3.optim.memory import in_memory_order
from mocov3.optim.muon import Muon
from mocov3.optim.update import Group, flattened, guarded_update, set_learning_rate

__all__ = [
    "LARS",
    "Group",
    "Muon",
    "build_optimizer",
    "flattened",
    "guarded_update",
    "in_memory_order",
    "name_by_state",
    "name_of",
    "set_learning_rate",
]
