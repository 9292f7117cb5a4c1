"""What every rank of a run is given."""

from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Job(Generic[C]):
    """The configuration, and whether one of the reference's scripts was called."""

    config: C
    script_door: bool = False
