"""What is counted over a whole run, resumes included."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from mocov3.data.loading.slots import Corrupt
from mocov3.distributed import World
from mocov3.output.log import TrainingLog


@dataclass
class Counters:
    """What a checkpoint carries along."""

    resumed: int = 0
    skipped: int = 0
    """Steps that changed nothing."""
    corrupt: dict[int, str] = field(default_factory=dict)
    """Unreadable images met so far: index → name."""
    _met: list[Corrupt] = field(default_factory=list)

    def meet(self, images: Iterable[Corrupt]) -> None:
        """Note the unreadable images of this rank's batch."""
        self._met += images

    def gather(self, world: World, log: TrainingLog, epoch: int) -> None:
        """Count the unreadable images that ranks met, and list those met for the first time. Every rank calls it."""
        met = [c for part in world.gather(self._met) for c in part]
        new = {c.index: c for c in met if c.index not in self.corrupt}
        self.corrupt.update({i: c.name for i, c in new.items()})
        self._met.clear()
        log.corrupt([new[i] for i in sorted(new)], epoch)
