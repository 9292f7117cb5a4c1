"""What every rank of a run is given."""

import time
from dataclasses import dataclass, field
from typing import Generic, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Job(Generic[C]):
    """The configuration, and whether one of the reference's scripts was called."""

    config: C
    script_door: bool = False
    began: float = field(default_factory=time.time)
    """When the command was called, by the clock of this machine."""
