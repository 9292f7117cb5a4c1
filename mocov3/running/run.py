"""The base of a run: where it stands, its loader, when it saves and stops, how it ends.

A task adds its step, its evaluation and what its files hold; what a run survives is written here once: signals and
limits that ranks agree on, a disk that is full or gone, images that cannot be read, another run in its folder.
"""

import dataclasses
import os
import signal
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mocov3.config import write_yaml
from mocov3.data import Batch, Loader, Source
from mocov3.data.device.sending import page_locked, until_sent
from mocov3.data.loading.filling import Transform, Unreadable
from mocov3.data.loading.loader import loader_workers, usable_cores
from mocov3.data.loading.slots import Work
from mocov3.distributed import World
from mocov3.distributed.agreement import check_agreement
from mocov3.errors import UserError, stopped_by
from mocov3.output.log import Log, Session, warn, warn_once
from mocov3.running.folder import Owner
from mocov3.running.job import Job
from mocov3.running.stop import Stop
from mocov3.running.writer import Writer
from mocov3.weights import Contents
from mocov3.weights.checkpoint import Position

R = TypeVar("R", bound="Run")


def _set_determinism(deterministic: bool) -> None:
    """Only deterministic operations in this process, or the fastest ones."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Run:
    """A run on one rank. A task sets ``position``, ``iterations`` and ``log``, and says what its files hold.

    Args:
        world: this rank.
        job: its configuration has ``output_dir``, ``epochs``, ``workers``, ``checkpoint_steps``, ``max_steps`` and
            ``max_hours``.
        owner: of the folder, on the main rank; ``None`` for a run that writes nothing.
    """

    config: Any
    position: Position
    iterations: int
    """Steps of an epoch."""
    log: Log

    def __init__(self, world: World, job: Job[Any], owner: Owner | None) -> None:
        self.world, self.folder, self._owner = world, Path(job.config.output_dir), owner
        self.config, self.script_door = job.config, job.script_door
        _set_determinism(job.config.deterministic)
        self._loader: Loader | None = None
        self._writer: Writer | None = None
        self._saved_at = -1
        self.code = 0
        """Exit code where the run comes to its end."""

    # --- what a task says ------------------------------------------------------------------------------------------

    @property
    def data_title(self) -> str:
        """The flag of the images and its value, for messages."""
        raise NotImplementedError

    def files(self) -> Mapping[str, Contents]:
        """Name → contents of the files of the present position. Every rank calls it; the main rank's are written."""
        raise NotImplementedError

    def finish(self) -> None:
        """Finish what runs beside; called at the end unless a signal stopped the run."""

    def result(self) -> None:
        """Say what a run that was not stopped came to."""

    def written(self, name: str) -> None:
        """Called in the writer's thread when a file is complete."""

    # --- what all runs do ------------------------------------------------------------------------------------------

    def agree(self, images: dict[str, str]) -> None:
        """Refuse ranks that were started with other flags, images (name → digest) or versions.

        Raises:
            UserError: on every rank, naming what differs.
        """
        check_agreement(self.world, self.config, images)

    def workers(self, images: int | None = None) -> int:
        """Loader processes of this rank, for so many images."""
        return loader_workers(self.config.workers, self.world.local_size, images)

    def session(self) -> Session:
        """What this process does of the run, for its log."""
        main, p = self.world.main, self.position
        return Session(
            self.iterations,
            first_epoch=p.epoch,
            first_step=p.step,
            writes=main and self._owner is not None,
            shows=main,
            script_door=self.script_door,
        )

    def write_config(self, name: str, comment: str) -> None:
        """Write the configuration as it is used, to run it again by."""
        if self.world.main:
            write_yaml(dataclasses.replace(self.config, resume="", config=""), self.folder / name, comment)

    def say_start(self, about: str, *, resumed: bool) -> None:
        """What is trained on which processes, in a line; where a resume stands, in another."""
        c, world, p = self.config, self.world, self.position
        if world.size > 1 and world.device.type != "cuda" and getattr(c, "dist_backend", "") == "nccl":
            self.log.say("no CUDA here: ranks communicate over gloo instead of nccl")
        self.log.say(about)
        if resumed:
            self.log.say(f"resumed at epoch {p.epoch}, iteration {p.iteration}")

    @property
    def longest(self) -> float:
        """Hours after which the run is stopped (0: never)."""
        return float(self.config.max_hours)

    def is_complete(self) -> bool:
        """Whether the schedule has come to its end."""
        return bool(self.position.epoch >= self.config.epochs)

    def is_done(self) -> bool:
        """Whether nothing is left to do, which is said."""
        p = self.position
        done = self.is_complete() or self._stop.steps_done(p.step)
        if done:
            self.log.say(f"nothing left to do: {p.step} steps, {p.epoch} epochs are done")
        return done

    def load(
        self, source: Source, transform: Transform, works: Iterable[Work], *, batch_size: int, seed: int
    ) -> Generator[Batch, None, None]:
        """Batches of ``works``, prepared ahead; a batch is valid until the next is asked for."""
        say = warn_once if self.world.main else None
        # steps on a CPU want its cores: one is lent to loading while they wait
        workers = self.workers()
        spare = int(self.world.device.type == "cpu" and workers * self.world.local_size >= usable_cores())
        loader = Loader(source, transform, batch_size=batch_size, seed=seed, workers=workers, say=say, spare=spare)
        self._loader = loader
        with loader, page_locked(loader.memory, self.world.device):
            yield from until_sent(loader.run(works), self.world.device)

    def move_past(self, work: Work) -> None:
        """Move the position past a step."""
        ended = work.iteration + 1 == self.iterations
        self.position = Position(work.epoch + ended, 0 if ended else work.iteration + 1, self.position.step + 1)

    def save_where_due(self) -> None:
        """Write the files of the present position where ``--checkpoint-steps`` asks for them."""
        every = self.config.checkpoint_steps
        if every and self.position.step % every == 0:
            self.save()

    def must_stop(self) -> bool:
        """Whether a limit or a signal asks to stop now, the same on every rank.

        Raises:
            UserError: if another run took the folder.
        """
        if self._owner is not None:
            self._owner.check()
        return self._stop.agreed(self.world, self.position.step)

    def save(self, *, again: bool = False) -> None:
        """Write the files of the present position in the background, once; every rank calls it at the same step.

        Args:
            again: although they were written at this step, as an evaluation has changed what they hold.
        """
        if self._saved_at == self.position.step and not again:
            return
        self._saved_at = self.position.step
        files = self.files()
        if self.world.main and files:
            if self._writer is None:
                self._writer = Writer(self.folder, before=self.log.sync, after=self.written, warn=warn)
            self._writer.save(files)

    def flushed(self) -> str:
        """Wait until what was saved last is on the disk: why it is not, the same on every rank, or ''."""
        return self.world.broadcast(self._writer.flush() if self._writer is not None else "")

    def exit_code(self) -> int:
        """Wait for the disk and say how the run ended: ``code`` when done, 128 + its number when stopped by a signal.

        Raises:
            UserError: when the run refused to continue, or the disk refuses its last files.
        """
        unsaved = self.flushed()
        where = f"the last checkpoint is not in {self.folder} ({unsaved})" if unsaved else "a checkpoint was written"
        if not self._stop.signal:
            self.finish()
        if self._stop.refusal:
            raise UserError(f"{self._stop.refusal}; {where}")
        if unsaved:
            raise UserError(f"--output-dir: {where}; make room and continue with --resume auto from what is there")
        if number := self._stop.signal:
            name = signal.Signals(number).name
            self.log.say(f"stopped by {name}, checkpoint written; continue with --resume auto")
            return stopped_by(number)
        self.result()
        return self.code

    def __enter__(self: R) -> R:
        self._stop = Stop(max_steps=self.config.max_steps, max_hours=self.longest)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._stop.close()
        if self._loader is not None:
            self._loader.close()
        if self._writer is not None:
            self._writer.close()
        self.log.close()
        if isinstance(error, Unreadable):
            raise UserError(f"{self.data_title}: {error}") from None
