"""The training loop of one rank (arXiv 2104.02057, algorithm 1) and the run around it.

``train`` reads as the algorithm; ``Pretraining`` holds what it needs and is made once.
"""

import dataclasses
import time
from collections.abc import Generator, Iterator
from contextlib import closing

import torch

from mocov3 import schedules
from mocov3.config import PretrainConfig
from mocov3.config.cheap import Stage
from mocov3.config.schedule import STABLE, budget_hours, latest
from mocov3.data import Batch, TwoViews
from mocov3.data.device.pixels import PixelViewBatch, ViewBatch
from mocov3.data.device.token_strips import cheaper
from mocov3.data.loading.loader import batches
from mocov3.data.views.copies import Copies
from mocov3.distributed import World
from mocov3.errors import KEEP_YOURS
from mocov3.output.log import warn
from mocov3.output.machine import note_start
from mocov3.pretraining import assemble, resume
from mocov3.pretraining.assemble import describe_micro_batch
from mocov3.pretraining.groups import scale_backbone
from mocov3.pretraining.inputs import check_divides, copies_of, open_images, say_copies
from mocov3.pretraining.label_free_evaluation import LabelFreeEvaluation
from mocov3.pretraining.length import Decisions, Length, clock_of
from mocov3.pretraining.log import PretrainingLog
from mocov3.pretraining.online_knn import OnlineKnn
from mocov3.pretraining.recorder import Recorder
from mocov3.pretraining.report_process import ReportProcess
from mocov3.pretraining.saver import IMAGES, Saver, new_run_name, write_images
from mocov3.pretraining.step import Outcome
from mocov3.running.folder import Owner, owned
from mocov3.running.job import Job
from mocov3.running.run import Run
from mocov3.weights import Contents
from mocov3.weights.checkpoint import Position


def train(world: World, job: Job[PretrainConfig]) -> int:
    """Train on this rank, from its present position to its end; returns the exit code."""
    with owned(world, job.config.output_dir) as owner, Pretraining(world, job, owner) as run:
        for batch in run.batches():
            lr, m = run.schedule(batch)
            run.seed_draws()
            run.thaw(batch)
            outcome = run.step(*run.views(batch), lr=lr, m=m)
            run.advance(batch, outcome, lr, m)
            if run.position.iteration == 0 or run.is_complete():
                run.end_epoch()
            run.decide()
            run.save_where_due()
            if run.must_stop() or run.is_complete():
                run.save()
                break
        return run.exit_code()


class Pretraining(Run):
    """A pre-training run on one rank."""

    config: PretrainConfig
    log: PretrainingLog
    copies: Copies | None = None
    """Smaller copies of large images."""
    _said_copies = False

    def __init__(self, world: World, job: Job[PretrainConfig], owner: Owner) -> None:
        super().__init__(world, job, owner)
        self.source, self.held_out, self.order = open_images(job.config)
        self.iterations = self.order.iterations
        self.agree({"images": self.source.digest})
        check_divides(job.config.batch_size, world.size)
        resume_from = resume.find(job.config, world)
        if resume_from is not None:
            resume.check_same_run(resume_from, job.config, self.source)
        self.config = c = assemble.completed(job.config, world, resume_from)
        self.preset = c.preset
        # networks are drawn from the seed, and moved to the device, before a checkpoint is read into them
        self.parts = assemble.build(c, world, resume_from, script_door=job.script_door)
        self.model, self.step = self.parts.model, self.parts.step
        self.position = self._start(resume_from)
        own = None if resume.is_of_other_run(resume_from, c) else resume_from
        self.counters = resume.counters(own, self.source)
        self.length = self._length(resume_from, job.began, resumed=own is not None)
        self.log = self._open_log()
        self.name = resume.saved_run(own) or new_run_name()
        self._note_run(resume_from)
        self._watch(dataclasses.replace(self.config, compile=self.parts.compiled), resumed=own is not None)

    def _watch(self, c: PretrainConfig, *, resumed: bool) -> None:
        """Open what saves, records and judges the run."""
        world = self.world
        self.saver = Saver(world, c, self.name, self.source, self.parts.start)
        self.recorder = Recorder(
            world,
            self.log,
            self.counters,
            batch_size=c.batch_size,
            print_freq=c.print_freq,
            images=self._images,
            late=world.device.type == "cuda",
        )
        self.online_knn = OnlineKnn(c, world, self.model, self.source, self.log)
        began = time.monotonic()
        self.label_free = LabelFreeEvaluation(c, world, self.model, self.log, start=self.position, resumed=resumed)
        if self.length.clock is not None:  # at the end it judges once more
            self.length.clock.closing(time.monotonic() - began - self.label_free.spared)
        self.report = ReportProcess(self.folder, c.report_every, self.log, active=world.main)

    def _start(self, resume_from: resume.ResumeFrom | None) -> Position:
        """The position to start from; a checkpoint is read into the networks."""
        c = self.config
        if resume_from is None:
            return Position(c.start_epoch, 0, c.start_epoch * self.iterations)
        return resume.restore(resume_from, c.arch, self.model, self.parts.optimizer, self.step, self.iterations)

    def _length(self, resume_from: resume.ResumeFrom | None, began: float, *, resumed: bool) -> Length:
        """The run's length and rates, with the decisions taken so far."""
        self.config, seconds = resume.recorded(resume_from, self.config, self.iterations)
        clock = clock_of(self.config, began=began, seconds=seconds, resumed=resumed)
        return Length(self.config, self.world, self.iterations, clock)

    def _note_run(self, resume_from: resume.ResumeFrom | None) -> None:
        """Write config.yaml, the list of images, and that the run starts here."""
        self._write_config()
        if self.world.main:
            note_start(self.folder, self.world, self.position.step, self.step.precision.name)
            if resume_from is None or not (self.folder / IMAGES).exists():
                write_images(self.source, self.folder)

    def _write_config(self) -> None:
        self.write_config("config.yaml", f"run {self.name}; re-run by: mocov3 pretrain --config FILE")

    def _open_log(self) -> PretrainingLog:
        c, world, used = self.config, self.world, self.step.precision.name
        self.log = log = PretrainingLog(c, self.session(), self.counters.corrupt)
        if world.main and c.precision not in ("auto", used):
            warn(f"--precision {c.precision} is for CUDA; training in {used}")
        self.say_start(
            f"{len(self.source)} images, {self.iterations} steps of {c.batch_size} an epoch, {c.epochs} epochs; "
            f"{world.size} process(es) on {world.device.type}, {used}; seed {c.seed}",
            resumed=bool(self.counters.resumed),
        )
        log.say(
            f"The loss starts near {log.start:.2f} (4τ·ln N: all keys look alike) and cannot fall below about "
            f"{log.floor:.2f} (own key retrieved, others unrelated); where it settles depends on batch and temperature."
        )
        if c.micro_batch:
            log.say(describe_micro_batch(self.parts.micro_batch, c, world, self.model))
        if c.fsdp and world.size == 1:
            log.say("--fsdp: there is one process, so there is nothing to shard")
        if self.parts.compiled:
            log.say("compiling the backbones: the first steps take a minute more (--no-compile: slower steps)")
        return log

    def batches(self) -> Iterator[Batch]:
        """Batches from the present position to the end of the last epoch, prepared ahead."""
        if self.is_done():
            return
        if not self.position.step:
            self.online_knn.show_views(0)
        while not self.is_complete():
            stage = self.length.stage(self.position)
            with closing(self._batches_of(stage)) as batches_of_stage:
                for batch in batches_of_stage:
                    self.log.batch_came()
                    yield batch
                    if self.is_complete() or self.length.stage(self.position) != stage:  # other views from here on
                        break

    def _batches_of(self, stage: Stage) -> Generator[Batch, None, None]:
        """Batches from the present position to the end of a stage."""
        c, size = self.config, self.config.batch_size // self.world.size
        self.copies = copies_of(c, self.world.local_size * max(self.workers(), 1))  # room is what is left by now
        views = TwoViews(
            stage.image_size, c.crop_min, self.preset, c.views, c.views_on == "device", c.local, self.copies
        )
        works = batches(
            len(self.source),
            seed=self.seed,
            batch_size=c.batch_size,
            rank=self.world.rank,
            ranks=self.world.size,
            start=(self.position.epoch, self.position.iteration),
            epochs=stage.end,
            order=self.order,
        )
        return self.load(self.source, views, works, batch_size=size, seed=self.seed)

    def views(self, batch: Batch) -> tuple[ViewBatch, ViewBatch, ViewBatch | None]:
        """The two views, made on the device when the step asks for them; strips of them in a cheap stage of a ViT.

        Then the local views, if there are any.
        """
        device, mean, std = self.world.device, self.preset.mean, self.preset.std
        left = batch.colour_draws if batch.colour_draws is not None else (None, None)
        x1, x2 = (
            PixelViewBatch(pixels, device, mean, std, rest) for pixels, rest in zip(batch.pixels, left, strict=False)
        )
        local: ViewBatch | None = None
        if (pixels := batch.local_pixels) is not None:
            draws = batch.colour_draws
            rest = None if draws is None else draws[2:].reshape(-1, draws.shape[2])
            local = PixelViewBatch(pixels.reshape(-1, *pixels.shape[2:]), device, mean, std, rest)
        two = cheaper(x1, x2, self.length.stage(self.position), batch.work, seed=self.seed, device=device)
        return *two, local

    def schedule(self, batch: Batch) -> tuple[float, float]:
        """Learning rate and momentum of this step."""
        return self.length.rates(self._epoch(batch), self.position.step)

    def seed_draws(self) -> None:
        """Seed what is drawn in the network (stochastic depth, dropout): a function of (seed, step, rank)."""
        torch.manual_seed((self.seed * 1_000_003 + self.position.step * 4099 + self.world.rank) % 2**63)

    def thaw(self, batch: Batch) -> None:
        """Scale the backbone's learning rate in the optimizer where it starts frozen (``--freeze-epochs``)."""
        c = self.config
        if c.freeze_epochs:
            factor = schedules.thaw(self._epoch(batch), freeze_epochs=c.freeze_epochs, warmup_epochs=c.warmup_epochs)
            scale_backbone(self.parts.optimizer, factor)

    def _epoch(self, batch: Batch) -> float:
        return batch.work.epoch + batch.work.iteration / self.iterations

    def advance(self, batch: Batch, outcome: Outcome, lr: float, m: float) -> None:
        """Record the step and move the position past it."""
        self.log.terminal.expect(self.length.expected(self.position.step))
        self.recorder.step_done(batch, outcome, step=self.position.step, lr=lr, m=m, skipped=self.step.skipped)
        self.move_past(batch.work)

    def end_epoch(self) -> None:
        """Evaluate and checkpoint, where due: after an epoch, or at the end of a run within one."""
        c, p, last, began = self.config, self.position, self.is_complete(), time.monotonic()
        done = p.epoch + bool(p.iteration)
        if c.knn_every and (done % c.knn_every == 0 or last):
            step = self.position.step - 1
            self.recorder.knn(self.online_knn.knn(step), epoch=done - 1, step=step)
        if self.label_free.epoch_ended(p, last=last):
            self._stop.finish()
        if done % c.checkpoint_every == 0 or last:
            self.save()
        if not last:
            self.report.epoch_ended(done)
        self.log.restart_clock()
        if self.length.clock is not None:
            self.length.clock.closing(time.monotonic() - began)
        if self.copies is not None and self.world.main and not self._said_copies:
            self._said_copies = say_copies(self.copies, self.log.say)

    def is_complete(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.length.is_over(self.position)

    def decide(self) -> None:
        """End a cheap stage, begin the decay of ``--schedule wsd``, or correct its pace, where due.

        A decision is on the disk before the first step that follows it.
        """
        decisions, before = self.length.due(self.position), self.length.decisions
        if self.world.main and (warning := self.length.foreseen(self.position.step)):
            warn(warning)
        if decisions is None:
            return
        self._go_by(decisions)
        self.save(again=True)
        if unsaved := self.flushed() or self._unwritten_config():
            self._go_by(before)
            self.length.postpone(self.position.step)
            if self.world.main:
                warn(f"the next part waits for the disk ({unsaved}): a decision is kept before it is followed")
            return
        for news in decisions.news(before, self.length.stages):
            self.log.say(news)
        self.log.restart_clock()

    def _unwritten_config(self) -> str:
        """Write config.yaml: why that could not be done, the same on every rank, or ''."""
        reason = ""
        try:
            self._write_config()
        except OSError as error:
            reason = error.strerror or str(error)
        return self.world.broadcast(reason)

    def _go_by(self, decisions: Decisions) -> None:
        self.length.take(decisions)
        self.config = decisions.recorded(self.config)
        self.saver.config = decisions.recorded(self.saver.config)

    def must_stop(self) -> bool:
        """Refuse to continue where too many images cannot be read or numbers stay bad; then as every run."""
        c, p = self.config, self.position
        met = min((p.epoch * self.iterations + p.iteration) * c.batch_size, len(self.source))
        bad = len(self.counters.corrupt)
        if bad >= 10 and bad > c.max_corrupt * met:
            self._stop.refuse(
                f"{self.data_title}: {bad} images cannot be read where {met} were loaded, more than "
                f"--max-corrupt {c.max_corrupt}"
            )
        if self.recorder.skips.in_a_row >= self.step.most_skips_in_a_row and not self._stop.refusal:
            self._stop.refuse(self.saver.diverged(self.recorder.skips.longest, self.step.diagnosis(), self._images))
        return super().must_stop()

    def files(self) -> dict[str, Contents]:
        """The checkpoint of the present position; what was recorded before it is read off the device first."""
        self.recorder.flush()
        self.counters.gather(self.world, self.log, self.position.epoch)
        clock, begins = self.length.clock, self.length.begins_decay(self.position.step)
        if self.saver.config.compile and not self.model.compiled:  # which the first step shows
            self.saver.config = dataclasses.replace(self.saver.config, compile=False)
        return self.saver.files(
            self.position,
            self.model,
            self.parts.optimizer,
            self.step,
            self.counters,
            {"seconds": clock.spent()} if clock is not None else {},
            [STABLE] if begins else [],
        )

    def written(self, name: str) -> None:
        """Remove checkpoints that a newer one has made useless."""
        self.saver.prune()

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return int(self.config.seed or 0)

    @property
    def data_title(self) -> str:
        """The images, for messages."""
        return f"data {self.config.data_title}"

    def _images(self, epoch: int, iteration: int) -> list[int]:
        size = self.config.batch_size
        return self.order.epoch(self.seed, epoch)[iteration * size : (iteration + 1) * size].tolist()

    def finish(self) -> None:
        """Finish the page."""
        self.report.finish()

    def result(self) -> None:
        """Say where the run stands, and whether to use what it made."""
        self.log.result(f"{self.folder / self.saver.newest}: {self.log.standing(self.position.step / self.iterations)}")
        if conclusion := self.label_free.conclusion():
            for sentence in conclusion.sentences:
                self.log.result(sentence)
            self.code = KEEP_YOURS if conclusion.keep_yours else 0

    @property
    def longest(self) -> float:
        """Hours after which the run is stopped: of a budget, should a full disk keep its decay from beginning."""
        c = self.config
        return c.max_hours or (latest(budget_hours(c.budget) or 0) if self.length.clock is not None else 0.0)

    def is_done(self) -> bool:
        """Whether nothing is left to do, which is said."""
        if self.label_free.stopped:
            self.log.say("nothing left to do: --guard has stopped this run")
        return self.label_free.stopped or super().is_done()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.report.close()
        super().__exit__(kind, error, trace)
