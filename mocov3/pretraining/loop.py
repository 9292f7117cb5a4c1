"""The training loop of one rank (arXiv 2104.02057, algorithm 1) and the run around it.

``train`` reads as the algorithm; ``Pretraining`` holds what it needs and is made once.
"""

import dataclasses
import secrets
from collections.abc import Iterator

import torch

from mocov3 import losses, schedules
from mocov3.config import PretrainConfig, logger_names, write_yaml
from mocov3.config.cheap import stage_of, stages
from mocov3.data import Batch, TwoViews
from mocov3.data.device.pixels import PixelViewBatch, ViewBatch
from mocov3.data.device.token_strips import cheaper
from mocov3.data.loading.loader import batches
from mocov3.distributed import World
from mocov3.distributed.agreement import check_agreement
from mocov3.models.precision import Precision, resolve_precision
from mocov3.output.log import RunLog, warn
from mocov3.output.machine import note_start
from mocov3.output.terminal import style_of
from mocov3.pretraining import assemble, resume
from mocov3.pretraining.assemble import (
    build_model,
    check_micro_batch,
    describe_micro_batch,
    optimizer_of,
    resolve_compile,
    resolve_micro_batch,
    set_determinism,
)
from mocov3.pretraining.groups import parameter_groups, scale_backbone
from mocov3.pretraining.inputs import Job, check_divides, open_images
from mocov3.pretraining.label_free_evaluation import LabelFreeEvaluation
from mocov3.pretraining.online_knn import OnlineKnn
from mocov3.pretraining.recorder import Recorder
from mocov3.pretraining.report_process import ReportProcess
from mocov3.pretraining.saver import IMAGES, Saver, new_run_name, write_images
from mocov3.pretraining.step import Outcome, Step
from mocov3.running.folder import Owner, owned
from mocov3.running.run import Run
from mocov3.weights import Contents, checkpoint, our_entry
from mocov3.weights.checkpoint import Position


def train(world: World, job: Job) -> int:
    """Train on this rank, from its present position to its end; returns the exit code."""
    with owned(world, job.config.output_dir) as owner, Pretraining(world, job, owner) as run:
        for batch in run.batches():
            lr, m = run.schedule(batch)
            run.seed_draws()
            run.thaw(batch)
            outcome = run.step(*run.views(batch), lr=lr, m=m)
            run.advance(batch, outcome, lr, m)
            if run.position.iteration == 0:
                run.end_epoch()
            run.save_where_due()
            if run.must_stop():
                run.save()
                break
        return run.exit_code()


class Pretraining(Run):
    """A pre-training run on one rank."""

    config: PretrainConfig
    log: RunLog

    def __init__(self, world: World, job: Job, owner: Owner) -> None:
        super().__init__(world, job.config, owner)
        c = job.config
        self.source, self.held_out, self.order = open_images(c)
        check_agreement(world, c, {"images": self.source.digest})
        check_divides(c.batch_size, world.size)
        self.preset, self.stages = c.preset, stages(c)
        self.iterations = self.order.iterations
        set_determinism(c)
        resume_from = resume.find(c, world)
        self.config = c = assemble.with_heads(c, resume_from)
        seed = resume.saved_seed(resume_from)
        self.seed: int = seed if seed is not None else world.broadcast(c.seed if c.seed is not None else _draw_seed())
        arithmetic = resolve_precision(c.precision, world.device, script_door=job.script_door)
        micro_batch = resolve_micro_batch(c, world, arithmetic)
        torch.manual_seed(self.seed)
        self.model = build_model(c, world)
        check_micro_batch(micro_batch, c, world, self.model)
        self.compiled = resolve_compile(c, world, micro_batch, resume_from)
        if self.compiled:
            self.model.compile_backbones(say=warn)
        params = parameter_groups(self.model, c.layer_decay, staged=c.freeze_epochs > 0)
        self.optimizer = optimizer_of(self.model, params, c, world)
        self.step = Step(
            self.model,
            self.optimizer,
            world=world,
            precision=Precision(arithmetic, world.device),
            micro_batch=micro_batch,
            spike_factor=c.skip_spikes,
        )
        self.position = self._start(resume_from)
        self.counters = resume.counters(resume_from, self.source)
        self.log = self._open_log(job.script_door)
        if c.micro_batch:
            self.log.say(describe_micro_batch(micro_batch, c, world, self.model))
        if c.fsdp and world.size == 1:
            self.log.say("--fsdp: there is one process, so there is nothing to shard")
        if self.compiled:
            self.log.say("compiling the backbones: the first steps take a minute more (--no-compile: slower steps)")
        complete = dataclasses.replace(c, seed=self.seed, compile=self.compiled)
        self.saver = Saver(world, complete, self._name_run(resume_from), self.source)
        self.recorder = Recorder(
            world, self.log, self.counters, batch_size=c.batch_size, print_freq=c.print_freq, images=self._images
        )
        self.online_knn = OnlineKnn(c, world, self.model, self.source, self.log)
        self.label_free = LabelFreeEvaluation(complete, world, self.model, self.log, start=self.position)
        self.report = ReportProcess(self.folder, c.report_every, self.log, active=world.main)

    def _name_run(self, resume_from: resume.ResumeFrom | None) -> str:
        """The run's name: the checkpoint's, or a new one; config.yaml and the list of images go with it."""
        name = resume.saved_run(resume_from) or new_run_name()
        if self.world.main:
            note_start(self.folder, self.world, self.position.step, self.step.precision.name)
            complete = dataclasses.replace(self.config, seed=self.seed, resume="", config="")
            write_yaml(complete, self.folder / "config.yaml", f"run {name}; re-run by: mocov3 pretrain --config FILE")
            if resume_from is None or not (self.folder / IMAGES).exists():
                write_images(self.source, self.folder)
        return name

    def _start(self, resume_from: resume.ResumeFrom | None) -> Position:
        c = self.config
        if resume_from is None:
            return Position(c.start_epoch, 0, c.start_epoch * self.iterations)
        resume.check_same_run(resume_from, c, self.source)
        scaler = self.step.precision.scaler
        position = checkpoint.restore(
            *resume_from,
            arch=c.arch,
            model=self.model,
            optimizer=self.optimizer,
            scaler=scaler,
            iterations=self.iterations,
        )
        entry = our_entry(resume_from[1])
        if self.step.spikes is not None and "spikes" in entry:
            self.step.spikes.restore(entry["spikes"])
        # another batch size (--allow-config-change) may have fewer iterations an epoch
        return position if position.iteration < self.iterations else Position(position.epoch + 1, 0, position.step)

    def _open_log(self, script_door: bool) -> RunLog:
        c, world = self.config, self.world
        start, floor = losses.loss_start(c.moco_t, c.batch_size), losses.loss_floor(c.moco_t, c.batch_size)
        log = RunLog(
            self.folder,
            active=world.main,
            style=style_of(quiet=c.quiet, json=c.json, script_door=script_door),
            epochs=c.epochs,
            iterations=self.iterations,
            start=start,
            floor=floor,
            first_step=self.position.step,
            corrupt=self.counters.corrupt,
            loggers=logger_names(c.logger),
            config={**dataclasses.asdict(c), "seed": self.seed},
        )
        used = self.step.precision.name
        if world.main and c.precision not in ("auto", used):
            warn(f"--precision {c.precision} is for CUDA; training in {used}")
        if world.size > 1 and world.device.type != "cuda" and c.dist_backend == "nccl":
            log.say("no CUDA here: ranks communicate over gloo instead of nccl")
        log.say(
            f"{len(self.source)} images, {self.iterations} steps of {c.batch_size} an epoch, {c.epochs} epochs; "
            f"{world.size} process(es) on {world.device.type}, {used}; seed {self.seed}"
        )
        log.say(
            f"The loss starts near {start:.2f} (4τ·ln N: all keys look alike) and cannot fall below about {floor:.2f} "
            "(own key retrieved, others unrelated); where it settles depends on batch and temperature."
        )
        if self.counters.resumed:
            log.say(f"resumed at epoch {self.position.epoch}, iteration {self.position.iteration}")
        return log

    def batches(self) -> Iterator[Batch]:
        """Batches from the present position to the end of the last epoch, prepared ahead."""
        c, world, position = self.config, self.world, self.position
        if self.is_done():
            return
        if not position.step:
            self.online_knn.show_views(0)
        start = (position.epoch, position.iteration)
        for stage in (s for s in self.stages if s.end > start[0]):
            views = TwoViews(stage.image_size, c.crop_min, self.preset, c.views, c.views_on == "device")
            local = c.batch_size // world.size
            works = batches(
                len(self.source),
                seed=self.seed,
                batch_size=c.batch_size,
                rank=world.rank,
                ranks=world.size,
                start=max(start, (stage.first, 0)),
                epochs=stage.end,
                order=self.order,
            )
            for batch in self.load(self.source, views, works, batch_size=local, seed=self.seed):
                self.recorder.batch_came()
                yield batch

    def views(self, batch: Batch) -> tuple[ViewBatch, ViewBatch]:
        """The two views, made on the device when the step asks for them; strips of them in a cheap stage of a ViT."""
        device, mean, std = self.world.device, self.preset.mean, self.preset.std
        left = batch.colour_draws if batch.colour_draws is not None else (None, None)
        x1, x2 = (
            PixelViewBatch(pixels, device, mean, std, rest) for pixels, rest in zip(batch.pixels, left, strict=True)
        )
        return cheaper(x1, x2, stage_of(self.stages, batch.work.epoch), batch.work, seed=self.seed, device=device)

    def schedule(self, batch: Batch) -> tuple[float, float]:
        """Learning rate and momentum of this step."""
        c, epoch = self.config, self._epoch(batch)
        lr = schedules.learning_rate(epoch, peak=c.peak_lr, warmup_epochs=c.warmup_epochs, epochs=c.epochs)
        return lr, schedules.momentum(epoch, start=c.moco_m, epochs=c.epochs, cosine=c.moco_m_cos)

    def seed_draws(self) -> None:
        """Seed what is drawn in the network (stochastic depth, dropout): a function of (seed, step, rank)."""
        torch.manual_seed((self.seed * 1_000_003 + self.position.step * 4099 + self.world.rank) % 2**63)

    def thaw(self, batch: Batch) -> None:
        """Scale the backbone's learning rate in the optimizer where it starts frozen (``--freeze-epochs``)."""
        c = self.config
        if c.freeze_epochs:
            factor = schedules.thaw(self._epoch(batch), freeze_epochs=c.freeze_epochs, warmup_epochs=c.warmup_epochs)
            scale_backbone(self.optimizer, factor)

    def _epoch(self, batch: Batch) -> float:
        return batch.work.epoch + batch.work.iteration / self.iterations

    def advance(self, batch: Batch, outcome: Outcome, lr: float, m: float) -> None:
        """Record the step and move the position past it."""
        self.recorder.step_done(batch, outcome, step=self.position.step, lr=lr, m=m, skipped=self.step.skipped)
        self.move_past(batch.work)

    def end_epoch(self) -> None:
        """Evaluate and checkpoint, where due."""
        c, done = self.config, self.position.epoch
        if c.knn_every and (done % c.knn_every == 0 or done == c.epochs):
            step = self.position.step - 1
            self.recorder.knn(self.online_knn.knn(step), epoch=done - 1, step=step)
        if self.label_free.epoch_ended(self.position):
            self._stop.finish()
        if done % c.checkpoint_every == 0 or done == c.epochs:
            self.save()
        if done < c.epochs:
            self.report.epoch_ended(done)
        self.recorder.restart_clock()

    def must_stop(self) -> bool:
        """Refuse to continue where too many images cannot be read or numbers stay bad; then as every run."""
        c, p = self.config, self.position
        met = min((p.epoch * self.iterations + p.iteration) * c.batch_size, len(self.source))
        bad = len(self.counters.corrupt)
        if bad >= 10 and bad > c.max_corrupt * met:
            self._stop.refuse(
                f"{self.data_title}: {bad} of {met} images met cannot be read, more than --max-corrupt {c.max_corrupt}"
            )
        if self.recorder.skips.in_a_row >= self.step.most_skips_in_a_row and not self._stop.refusal:
            self._stop.refuse(self.saver.diverged(self.recorder.skips.longest, self.step.diagnosis(), self._images))
        return super().must_stop()

    def files(self) -> dict[str, Contents]:
        """The checkpoint of the present position; what was recorded before it is read off the device first."""
        self.recorder.flush()
        self.recorder.count_corrupt(self.position.epoch)
        return self.saver.files(self.position, self.model, self.optimizer, self.step, self.counters)

    def written(self, name: str) -> None:
        """Remove checkpoints that a newer one has made useless."""
        self.saver.prune()

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
        """Say where the run stands."""
        self.log.result(f"{self.folder / self.saver.newest}: {self.log.standing(self.position.epoch)}")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.report.close()
        super().__exit__(kind, error, trace)


def _draw_seed() -> int:
    return secrets.randbelow(2**31)
