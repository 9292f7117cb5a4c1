"""The fine-tuning loop of one rank, and the run around it. ``tune`` reads as DeiT's recipe."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from mocov3.config import FinetuneConfig
from mocov3.data import Batch, CentreView
from mocov3.data.device.pixels import normalise
from mocov3.data.device.sending import send
from mocov3.data.loading.supervised import Repeated, stratified
from mocov3.data.sources.groups import chosen, groups_in
from mocov3.data.sources.labels import matched
from mocov3.data.sources.transfer import Pair, open_pair
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.evaluation import measures
from mocov3.evaluation.features import Extractor
from mocov3.finetuning import files, setup
from mocov3.finetuning.batches import batches, images_shown, iterations
from mocov3.finetuning.evaluate import Accuracy, Areas, Scored, evaluate, score_all
from mocov3.finetuning.log import TuneLog
from mocov3.finetuning.mixing import erase
from mocov3.finetuning.model import set_epoch
from mocov3.finetuning.recorder import TuneCounters, TuneRecorder
from mocov3.finetuning.step import Micro, Outcome
from mocov3.running.folder import Owner, owned
from mocov3.running.job import Job
from mocov3.running.run import Run
from mocov3.weights import Contents, our_entry
from mocov3.weights.checkpoint import Position

_BAD_IN_A_ROW = 50
T = TypeVar("T")


def tune(world: World, job: Job[FinetuneConfig]) -> int:
    """Fine-tune on this rank, from its present position to its end; returns the exit code."""
    # ranks of torchrun name a run by their own clocks
    config = dataclasses.replace(job.config, output_dir=world.broadcast(job.config.output_dir))
    job = dataclasses.replace(job, config=config)
    if config.eval:
        with Tuning(world, job, None) as run:
            run.report(run.evaluate())
            run.report_measures()
            return 0
    with owned(world, config.output_dir, "--output_dir") as owner, Tuning(world, job, owner) as run:
        for batches in run.steps():
            lr = set_epoch(run.parts.schedule, batches[0].work.epoch)
            outcome = run.parts.step(run.micro(batch) for batch in batches)
            run.advance(batches, outcome, lr)
            if run.position.iteration == 0:
                run.end_epoch(lr)
            run.save_where_due()
            if run.must_stop():
                run.save()
                break
        return run.exit_code()


class Tuning(Run):
    """A fine-tuning run on one rank."""

    config: FinetuneConfig
    log: TuneLog

    def __init__(self, world: World, job: Job[FinetuneConfig], owner: Owner | None) -> None:
        super().__init__(world, job, owner)
        self.start = files.find_start(job.config, world)
        self.config = c = self.start.config
        self.pair = self._opened()
        self.agree({"images": self.pair.train.digest, "test images": self.pair.test.digest})
        self.classes = len(self.pair.test.classes)
        self.train = Repeated(stratified(self.pair.train, c.fraction, c.group_by), c.repeats)
        self.labels = np.asarray(self.train.labels, dtype=np.int64)
        self.preset = c.preset
        self.total_batch = setup.total_batch(c, world)
        self.iterations = self._iterations()
        findings = self.labels.ndim == 2
        self.parts = setup.build(self.start, self.classes, world, script_door=job.script_door, findings=findings)
        self.position, self.counters = self._restored()
        self.log = self._open_log()
        self.recorder = TuneRecorder(world, self.log, self.counters, self.total_batch, c.print_freq, c.repeats)
        self._better = False
        self.scored: Scored | None = None

    def _opened(self) -> Pair:
        """The images; where a file is evaluated, those to test on are numbered by the file's classes."""
        c = self.config
        pair = open_pair(c.data_set, c.data_path, c.group_by, c.labels)
        saved = our_entry(self.start.resumed or self.start.weights).get("classes")
        if not c.eval or not isinstance(saved, list):
            return pair
        return pair._replace(test=matched(saved, pair.test, f"{self.start.where}, --data-path {c.data_path}"))

    def _iterations(self) -> int:
        c, n = self.config, len(self.train.source)
        groups = self.total_batch // c.batch_size
        steps = iterations(n, repeats=c.repeats, groups=groups, batch_size=c.batch_size)
        if not steps and not c.eval:
            raise UserError(
                f"--batch-size {c.batch_size} × {groups} (processes × --accum-iter) is more than the {n} images "
                f"of {c.data_set}; lower it"
            )
        return steps

    def _restored(self) -> tuple[Position, TuneCounters]:
        contents, c = self.start.resumed, self.config
        if contents is None:
            return Position(0, 0, 0), TuneCounters()
        if not c.eval:
            files.check_same_run(
                self.start, total_batch=self.total_batch, digest=self.train.digest, images=len(self.train.source)
            )
        return setup.restore(self.parts, contents, self.start.where, self.train.source)

    def _open_log(self) -> TuneLog:
        c = self.config
        self.log = log = TuneLog(c, self.session(), self.counters.corrupt)
        if not c.eval:
            self.write_config("config.yaml", "re-run by: mocov3 finetune --config FILE")
        kind = "classes" if self.labels.ndim == 1 else "findings"
        self.say_start(
            f"{c.arch} on {c.data_set}: {len(self.train.source)} images of {self.classes} {kind}, "
            f"{len(self.pair.test)} to test; {self.iterations} steps of {self.total_batch} an epoch, "
            f"{c.epochs} epochs; {self.world.size} process(es) on {self.world.device.type}, "
            f"{self.parts.precision.name}; seed {c.seed}",
            resumed=bool(self.counters.resumed),
        )
        if self.start.weights is not None:
            log.say(f"starts from {files.named(self.start)}; new: {', '.join(self.parts.fresh)}")
        elif not self.counters.resumed:
            log.say("starts from scratch: neither --finetune nor --resume names weights")
        if c.transfer and c.reprob:
            log.say(
                "--reprob, --aa and --color-jitter are not applied: as in the reference, transfer crops and flips only"
            )
        if not c.transfer and c.channels != 3 and (c.aa != "none" or c.color_jitter):
            log.say(
                f"--aa and --color-jitter change each of {c.channels} channels as a grey image: no saturation, no hue"
            )
        if self.labels.ndim == 2 and (c.mixes or c.smoothing):
            log.say("--mixup, --cutmix and --smoothing are not applied: they are for one class an image")
        if c.drop_path and not self.parts.depth.layers:
            log.say(f"--drop-path is not applied: {c.arch} has no stochastic depth")
        return log

    def steps(self) -> Iterator[list[Batch]]:
        """The batches of every step from the present position on, prepared ahead."""
        c, p = self.config, self.position
        if self.is_done():
            return
        works = batches(
            len(self.train.source),
            seed=c.seed,
            repeats=c.repeats,
            batch_size=c.batch_size,
            accumulate=c.accum_iter,
            rank=self.world.rank,
            ranks=self.world.size,
            start=(p.epoch, p.iteration),
            epochs=c.epochs,
        )
        together: list[Batch] = []
        transform = setup.transform(c, self.preset)
        for batch in self.load(self.train, transform, works, batch_size=c.batch_size, seed=c.seed):
            # a batch's slot is overwritten when the next is asked for
            copy = batch if c.accum_iter == 1 else dataclasses.replace(batch, pixels=batch.pixels.copy())
            together.append(copy)
            if len(together) == c.accum_iter:
                self.log.batch_came()
                yield together
                together = []

    def micro(self, batch: Batch) -> Micro:
        """Images and targets on the device, erased and mixed, and the draws of stochastic depth."""
        c, work, device = self.config, batch.work, self.world.device
        shown = images_shown(work, {bad.index for bad in batch.corrupt}, seed=c.seed, n=len(self.train))
        target = send(self.labels[shown], device)
        x = normalise(batch.pixels[0], device, self.preset.mean, self.preset.std)
        x = x if device.type == "cuda" else x.contiguous()
        if not c.transfer:
            erase(x, work.indices, probability=c.reprob, seed=c.seed, epoch=work.epoch)
        if self.parts.mixer is not None:
            x, target = self.parts.mixer(x, target, epoch=work.epoch, index=int(work.indices[0]))
        return x, target, partial(self.parts.depth, work.indices, epoch=work.epoch, device=device)

    def advance(self, batches: Sequence[Batch], outcome: Outcome, lr: float) -> None:
        """Record the step and move the position past it."""
        self.recorder.step_done(batches, outcome, step=self.position.step, lr=lr)
        if self.recorder.bad >= _BAD_IN_A_ROW:
            raise UserError(
                f"loss or gradient were not finite for {_BAD_IN_A_ROW} steps in a row; lower --lr or --clip-grad"
            )
        self.move_past(batches[0].work)

    def end_epoch(self, lr: float) -> None:
        """Evaluate where due, and checkpoint."""
        c, done = self.config, self.position.epoch
        accuracy = self.evaluate() if done % c.eval_freq == 0 or done == c.epochs else None
        better = self.recorder.epoch_done(done - 1, self.position.step - 1, lr, accuracy)
        if accuracy is not None:
            self.report(accuracy)
        self._better = better
        self.save()
        self._better = False
        self.log.restart_clock()

    def evaluate(self) -> Accuracy | Areas:
        """Accuracy (of findings AUROC) of the present weights (not of their average) on the test images."""
        if self.labels.ndim == 2 or self.config.measures:
            self.scored = found = self._judged(score_all)
            return Areas.of(found) if self.labels.ndim == 2 else found.accuracy(self.classes)
        return self._judged(evaluate)

    def _judged(self, judge: Callable[..., T]) -> T:
        c = self.config
        bicubic = not c.transfer
        kind = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
        view = CentreView(c.image_size, self.preset.evaluation_zoom, kind, self.preset.reading)
        model = self.parts.model
        return judge(
            Extractor(model, model, view, self.preset.mean, self.preset.std),
            self.pair.test,
            world=self.world,
            precision=self.parts.precision,
            batch_size=max(3 * c.batch_size // 2, 1),
            workers=self.workers(len(self.pair.test)),
        )

    def report_measures(self) -> None:
        """Print further measures of the last evaluation, as far as asked for."""
        if (found := self.scored) is None or not self.world.main:
            return
        c, test = self.config, self.pair.test
        groups = chosen(groups_in(test, c.group_by), found.read)
        if found.truth.ndim == 2:
            values = measures.of_findings(found.scores, found.truth, test.classes, groups)
        else:
            values = measures.of_classes(torch.from_numpy(found.scores).softmax(1).numpy(), found.truth, groups)
        if c.json:
            print(json.dumps({"measures": values}), flush=True)
            return
        for line in measures.described(values, test.classes):
            self.log.result(line)

    def report(self, accuracy: Accuracy | Areas) -> None:
        """Print accuracies, in DeiT's words; of findings their mean AUROC."""
        tell = self.log.result if self.config.eval else self.log.say
        if isinstance(accuracy, Areas):
            left_out = f" ({accuracy.left_out})" if accuracy.left_out else ""
            tell(
                f"* AUROC {accuracy.auroc:.3f} AP {accuracy.average_precision:.3f} loss {accuracy.loss:.3f}, means "
                f"over {self.classes} findings of the {accuracy.total} test images{left_out}"
            )
            if not self.config.eval:
                tell(f"Max AUROC: {self.counters.best:.2f}")
            return
        per_class = f" mean per class {accuracy.mean_class_acc1:.3f}" if self.pair.per_class else ""
        tell(f"* Acc@1 {accuracy.acc1:.3f} Acc@5 {accuracy.acc5:.3f} loss {accuracy.loss:.3f}{per_class}")
        left_out = f" ({accuracy.left_out})" if accuracy.left_out else ""
        tell(f"Accuracy of the network on the {accuracy.total} test images{left_out}: {accuracy.acc1:.1f}%")
        if not self.config.eval:
            tell(f"Max accuracy: {self.counters.best:.2f}%")

    def files(self) -> dict[str, Contents]:
        """The checkpoint of the present position, and the best one where this is it."""
        self.recorder.flush()
        self.counters.gather(self.world, self.log, self.position.epoch)
        last = {files.LAST: self._contents()}
        return {files.BEST: self._contents(best=True), **last} if self._better else last

    def _contents(self, *, best: bool = False) -> Contents:
        return files.contents(
            self.start,
            self.parts,
            self.position,
            self.counters,
            best=best,
            total_batch=self.total_batch,
            digest=self.train.digest,
            images=len(self.train.source),
            classes=list(self.pair.train.classes),
        )

    @property
    def data_title(self) -> str:
        """The images, for messages."""
        return f"--data-path {self.config.data_path}"

    def result(self) -> None:
        """Say where the run stands."""
        self.log.result(
            f"{self.folder / files.LAST}: {self.position.epoch} of {self.config.epochs} epochs, best {self.log.called} "
            f"{self.counters.best:.2f} %"
        )
