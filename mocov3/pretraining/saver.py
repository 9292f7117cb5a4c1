"""What a run leaves for its resume: checkpoints, the list of its images, the batch that made it fail."""

import dataclasses
import gzip
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocov3.config import PretrainConfig
from mocov3.data import Source, TwoViews
from mocov3.distributed import World
from mocov3.distributed.sharding import is_sharded
from mocov3.errors import printable
from mocov3.models import MoCo
from mocov3.output.log import warn
from mocov3.pretraining.recorder import Recorded
from mocov3.pretraining.step import Step
from mocov3.running.counters import Counters
from mocov3.weights import Contents, checkpoint
from mocov3.weights.checkpoint import Position
from mocov3.weights.origin import origin_of_run

IMAGES = "pictures.txt.gz"
_LISTED = 3


class Saver:
    """What the files of one run hold, and which are kept.

    Args:
        world: this rank.
        config: of the run, with its seed.
        run: name of the run, the same after every resume.
        source: the images.
        start: digest of the network of ``--init``, where the run compares with it.
    """

    def __init__(self, world: World, config: PretrainConfig, run: str, source: Source, start: str = "") -> None:
        self.world, self.config, self.run, self.source, self.start = world, config, run, source, start
        self.folder = Path(config.output_dir)
        self.newest = ""
        """Name of the newest checkpoint of this process, on the main rank."""
        self._epoch_complete: int | None = None
        self._digest = source.digest

    def files(
        self,
        position: Position,
        model: MoCo,
        optimizer: torch.optim.Optimizer,
        step: Step,
        counters: Counters,
        more: Mapping[str, object],
        names: Sequence[str] = (),
    ) -> dict[str, Contents]:
        """The checkpoint of the present position by its name, on the main rank. Every rank must call it.

        ``more`` goes into its entry ``mocov3``; it is written under further ``names`` first.
        """
        if not self.world.main and not is_sharded(model):
            return {}
        c, p = self.config, position
        extra: dict[str, Any] = {
            "run": self.run,
            "config": dataclasses.asdict(c),
            "seed": c.seed,
            "pictures": len(self.source),
            "data_digest": self._digest,
            "skipped": counters.skipped + int(step.skipped),
            "resumed": counters.resumed,
            "corrupt": sorted(counters.corrupt),
            **origin_of_run(c.init),
            **more,
        }
        if self.start:
            extra["start"] = self.start
        if step.spikes is not None:
            extra["spikes"] = step.spikes.state()
        contents = checkpoint.pack(
            arch=c.arch,
            model=model,
            optimizer=optimizer,
            scaler=step.precision.scaler.state_dict(),
            position=p,
            extra=extra,
            keep=self.world.main,
        )
        self.newest = checkpoint.step_name(p.epoch, p.step) if p.iteration else checkpoint.epoch_name(p.epoch - 1)
        self._epoch_complete = p.epoch - 1
        return dict.fromkeys([*names, self.newest], contents)

    def prune(self) -> None:
        """Remove what a newer checkpoint has made useless."""
        c = self.config
        checkpoint.prune(
            self.folder, epoch_complete=self._epoch_complete, keep_last=c.keep_last, keep_every=c.keep_every
        )

    def diverged(self, row: Sequence[Recorded], diagnosis: str, images: Callable[[int, int], list[int]]) -> str:
        """Save the views of the last bad batch; what happened, where to look and what to try, in one line."""
        c, first, last = self.config, row[0], row[-1]
        name = f"bad_batch_step{last.step:09d}.npz"
        if self.world.main:
            local_images = images(last.epoch, last.iteration)[: c.batch_size // self.world.size]
            views = TwoViews(c.image_size, c.crop_min, c.preset, c.views)
            self._save_batch(name, last.epoch, local_images, views)
        return (
            f"{len(row)} steps in a row, from step {first.step}, had a loss or gradients that were not finite, or a "
            f"spike, and changed nothing; {diagnosis}; images of step {last.step} are in {name}; try a lower --lr, a "
            "longer --warmup-epochs, --stop-grad-conv1 (ViT) or --precision fp32"
        )

    def _save_batch(self, name: str, epoch: int, indices: list[int], views: TwoViews) -> None:
        pixels, readable, size = [], [], views.image_size
        for index in indices:
            out = np.zeros((2, size, size, views.reading.channels), np.uint8)
            try:
                views(self.source.read(index), seed=int(self.config.seed or 0), epoch=epoch, index=index, out=out)
            except Exception:  # unreadable: another image was used instead
                continue
            readable.append(index)
            pixels.append(out)
        names = [printable(self.source.name(i)) for i in readable]
        try:
            np.savez_compressed(self.folder / name, views=np.array(pixels), indices=readable, names=names)
        except OSError as error:
            warn(f"{name} could not be written ({error.strerror or error})")


def new_run_name() -> str:
    """A name that no other run has."""
    return secrets.token_hex(8)


def write_images(source: Source, folder: Path) -> None:
    """List the names of a run's images, so that a resume on others can name the difference."""
    try:
        with gzip.open(folder / IMAGES, "wt", compresslevel=1, encoding="utf-8") as file:
            file.writelines(printable(source.name(i)) + "\n" for i in range(len(source)))
    except OSError as error:
        warn(f"{IMAGES} could not be written ({error.strerror or error})")


def image_changes(source: Source, folder: Path) -> str:
    """How the images differ from those listed in a run's folder, in words; '' if that is not known."""
    try:
        with gzip.open(folder / IMAGES, "rt", encoding="utf-8") as file:
            old = file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    new = [printable(source.name(i)) for i in range(len(source))]
    gone, come = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    parts = []
    for names, what in ((gone, "missing"), (come, "new")):
        if names:
            shown = ", ".join(itertools.islice(names, _LISTED)) + (" …" if len(names) > _LISTED else "")
            parts.append(f"{len(names)} {what}: {shown}")
    return "; ".join(parts) or "the same names in other classes or of other content"
