"""The loop of linear evaluation on one rank: a frozen backbone, many heads, exact counts, exact resume.

``train`` is the protocol of MoCo v3 (arXiv 2104.02057, §4): SGD without weight decay on random crops and flips, the
learning rate a half cosine that changes once an epoch, the backbone in evaluation mode.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mocov3 import schedules
from mocov3.config import LinclsConfig
from mocov3.data import Batch
from mocov3.data.device.pixels import normalise
from mocov3.data.device.sending import Arriving, send
from mocov3.data.loading.labelled import CropView, open_labelled, plan_all
from mocov3.data.loading.slots import Work
from mocov3.distributed import World
from mocov3.evaluation.features import Collected, collect, finite_rows, first_of, refuse_rows
from mocov3.evaluation.linear import files
from mocov3.evaluation.linear.lbfgs import solve
from mocov3.evaluation.linear.log import EvaluationLog, HeadResult, best_of, titles
from mocov3.evaluation.linear.scores import Batches, evaluated, measured, rates, validation_features
from mocov3.evaluation.linear.setup import build_heads, check_same_run, find, open_backbone, protocol
from mocov3.losses import at_least_float32
from mocov3.metrics import JsonLine
from mocov3.models.precision import frozen_precision
from mocov3.output.log import warn
from mocov3.running.folder import LINCLS_LOCK, Owner, owned
from mocov3.running.job import Job
from mocov3.running.run import Run
from mocov3.weights import Contents, our_entry
from mocov3.weights.checkpoint import Position
from mocov3.weights.convert import view_entry


def train(world: World, job: Job[LinclsConfig]) -> int:
    """Train the heads on this rank, from its present position to its end; returns the exit code."""
    with owned(world, job.config.output_dir, name=LINCLS_LOCK) as owner, Evaluation(world, job, owner) as run:
        if run.config.solver == "lbfgs":
            run.solve()
        else:
            for work, batch in run.batches():
                run.step(work, batch)
                if run.position.iteration == 0:
                    run.end_epoch()
                run.save_where_due()
                if run.must_stop():
                    run.save()
                    break
        return run.exit_code()


class Evaluation(Run):
    """A run of linear evaluation on one rank."""

    config: LinclsConfig
    log: EvaluationLog

    def __init__(self, world: World, job: Job[LinclsConfig], owner: Owner) -> None:
        super().__init__(world, job, owner)
        self._open_images(job.config)
        where, contents = find(job.config)
        self.frozen, self.config = open_backbone(job.config, world, where, contents)
        self.digest = self.frozen.digest()
        check_same_run(where, contents, self.config, self.source)
        self.heads = build_heads(self.config, self.frozen, len(self.source.classes), world)
        self.results = [HeadResult(s.kind, s.lr, s.weight_decay) for s in self.heads.specs]
        self.unreadable: dict[str, dict[int, str]] = {"train": {}, "val": {}}
        self._val: Batches | None = None
        self._train: Collected | None = None
        self._best = False
        self._unchecked: list[tuple[np.ndarray, Arriving]] = []
        self._zero_counts()
        self.position = self._start(where, contents)
        self.frozen.to(world.device)
        self.precision = frozen_precision(self.config.precision, world.device)
        self.log = self._open_log(resumed=contents is not None)

    def _open_images(self, config: LinclsConfig) -> None:
        self.source, self.val_source = open_labelled(config.data, config.group_by, config.labels)
        self.agree({"images": self.source.digest, "validation images": self.val_source.digest})
        self.labels, self.val_labels = (
            torch.as_tensor(s.labels, dtype=torch.long, device=self.world.device)
            for s in (self.source, self.val_source)
        )
        self.iterations = -(-len(self.source) // config.batch_size)

    def _open_log(self, *, resumed: bool) -> EvaluationLog:
        c, world, frozen = self.config, self.world, self.frozen
        self.log = EvaluationLog(c, self.session(), titles(self.labels))
        self.write_config("lincls.yaml", "re-run by: mocov3 lincls --config FILE")
        if world.main and not (c.pretrained or c.resume or c.arch == "pixels"):
            warn("no --pretrained: the backbone is untrained")
        kind = "classes" if self.labels.ndim == 1 else "findings"
        self.say_start(
            f"{protocol(c)} of {frozen.about}: {len(self.source)} training and {len(self.val_source)} validation "
            f"images, {self.heads.classes} {kind}, {len(self.heads.specs)} heads, {self.iterations} steps of "
            f"{c.batch_size} an epoch, {c.epochs} epochs; {world.size} process(es) on {world.device.type}; "
            f"seed {c.seed}",
            resumed=resumed,
        )
        return self.log

    def _start(self, where: str, contents: Contents | None) -> Position:
        """The position to start from; a checkpoint is read into heads, results and counts."""
        if contents is None:
            return Position(self.config.start_epoch, 0, self.config.start_epoch * self.iterations)
        position = files.restore(contents, self.heads, where, iterations=self.iterations)
        if position.iteration >= self.iterations:  # another batch size, by --allow-config-change
            position = Position(position.epoch + 1, 0, position.step)
        entry = our_entry(contents)
        for result, saved in zip(self.results, entry.get("heads", []), strict=False):
            for field in ("acc1", "acc5", "loss", "best_acc1", "best_epoch"):
                setattr(result, field, saved[field])
        if not entry:
            self.results[0].best_acc1 = files.best_acc1(contents)
            self.results[0].best_epoch = position.epoch - 1
        if isinstance(entry.get("counts"), Tensor) and position.iteration and self.world.main:
            self.counts += entry["counts"].to(self.counts)
        return position

    def batches(self) -> Iterator[tuple[Work, Batch | None]]:
        """This rank's batches from the present position to the end; without pixels where features are cached."""
        c, world, p = self.config, self.world, self.position
        if self.is_done():
            return
        works = plan_all(
            len(self.source),
            seed=c.seed or 0,
            batch_size=c.batch_size,
            rank=world.rank,
            ranks=world.size,
            start=(p.epoch, p.iteration),
            epochs=c.epochs,
        )
        if c.cache_features:
            self._collect_train()
            self.log.restart_clock()
            for work in works:
                self.log.batch_came()
                yield work, None
            return
        view = CropView(self.frozen.image_size, c.crop_min, self.frozen.preset.reading)
        local = -(-c.batch_size // world.size)
        for batch in self.load(self.source, view, works, batch_size=local, seed=c.seed or 0):
            self.log.batch_came()
            yield batch.work, batch

    def _collect_train(self) -> Collected:
        if self._train is None:
            self._train = collect(
                self.frozen.extractor,
                self.source,
                world=self.world,
                title=f"{self.data_title} (train)",
                workers=self.workers(),
                autocast=self.precision.autocast,
            )
            self._note_unreadable("train", self._train.corrupt)
        return self._train

    @torch.no_grad()
    def _features(self, work: Work, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """Features and classes of a batch; unreadable images are left out."""
        indices = work.indices
        bad = set(self.unreadable["train"]) if batch is None else {c.index for c in batch.corrupt}
        if bad:
            keep = np.array([i not in bad for i in indices.tolist()], dtype=bool)
        if batch is None:
            x = send(self._collect_train().features[torch.from_numpy(indices)].numpy(), self.world.device)
        else:
            met = set(indices.tolist())
            self._note_unreadable("train", {c.index: c.reason for c in batch.corrupt if c.index in met})
            if not len(indices):
                return torch.empty(0, self.frozen.width, device=self.world.device), self.labels[:0]
            preset = self.frozen.preset
            with self.precision.autocast():
                pixels = normalise(batch.pixels[0], self.world.device, preset.mean, preset.std)
                x = at_least_float32(self.frozen.features(pixels))
        if bad:
            x, indices = x[torch.from_numpy(keep).to(x.device)], indices[keep]
        self._unchecked.append((indices, Arriving(finite_rows(x))))
        return x, self.labels[send(indices, self.world.device)]

    def _refuse_not_finite(self) -> None:
        """Refuse where a feature was not finite since the last time: read here, so no step waits for the device."""
        unchecked, self._unchecked = self._unchecked, []
        for indices, finite in unchecked:
            refuse_rows(indices, finite.wait(), self.source)

    def step(self, work: Work, batch: Batch | None) -> None:
        """Train the heads on a batch, and move the position past it."""
        c = self.config
        x, target = self._features(work, batch)
        factor = schedules.epoch_cosine(work.epoch, initial=c.lr_scale, epochs=c.epochs)
        sums = self.heads.step(x, target, lr_factor=factor)
        now = torch.cat([sums, sums.new_full((len(sums), 1), float(len(target)))], dim=1)
        self.counts += now
        self.log.step_ended(work.epoch, self.position.step, c.batch_size)
        if work.iteration % c.print_freq == 0:
            self._refuse_not_finite()
            lead = best_of(self.results)
            summed = self.world.sum(torch.stack([now[lead], self.counts[lead]]))
            self.log.line(work.epoch, work.iteration, *(rates(row) for row in summed.tolist()))
        self.move_past(work)

    def end_epoch(self) -> None:
        """Evaluate every head, write the lines and the checkpoints."""
        c, done = self.config, self.position.epoch
        self._refuse_not_finite()
        trained = [rates(row) for row in self.world.sum(self.counts).tolist()]
        seconds = self.log.seconds
        before = self.results[best_of(self.results)]
        best_before = before.best_acc1 if before.best_epoch >= 0 else -1.0
        values = self.evaluate()
        for result, (loss, acc1, acc5) in zip(self.results, values, strict=True):
            result.update(loss, acc1, acc5, done - 1)
        lead = self.results[best_of(self.results)]
        self.log.evaluated(lead, done - 1, c.epochs, len(self.results) > 1)
        rate = round(len(self.source) / seconds, 1) if seconds else None
        self.log.write(
            [
                {
                    "epoch": done - 1,
                    "head": r.head,
                    "lr": r.lr,
                    "weight_decay": r.weight_decay,
                    "train_loss": t[0],
                    "train_acc1": t[1],
                    "train_acc5": t[2],
                    "val_loss": r.loss,
                    "acc1": r.acc1,
                    "acc5": r.acc5,
                    "best_acc1": r.best_acc1,
                    "images_per_second": rate,
                    "protocol": protocol(c),
                }
                for r, t in zip(self.results, trained, strict=True)
            ]
        )
        self._zero_counts()
        if done in (1, c.epochs):
            self._check_backbone()
        self._best = lead.best_acc1 > best_before
        self.save(again=self._best)
        self._best = False
        self.log.restart_clock()

    def evaluate(self) -> list[tuple[float, float, float]]:
        """Loss, top-1 and top-5 in % of every head on the whole validation set, exact over ranks.

        Of findings loss, mean AUROC and mean average precision.
        """
        return evaluated(
            self.heads, self._validation(), self.world, self.log.terminal, self.config.print_freq, self.log.called
        )

    def _validation(self) -> Batches:
        if self._val is None:  # the backbone does not change, so one pass does for all epochs
            self._val, bad = validation_features(
                self.frozen,
                self.val_source,
                self.val_labels,
                self.world,
                f"{self.data_title} (val)",
                workers=self.workers(),
                autocast=self.precision.autocast,
            )
            self._note_unreadable("val", bad)
        return self._val

    def solve(self) -> None:
        """Fit every head to the cached features by L-BFGS, and evaluate."""
        collected = self._collect_train()
        mine = np.array_split(np.flatnonzero(collected.readable), self.world.size)[self.world.rank]
        rows = torch.from_numpy(mine)
        solve(self.heads, collected.features[rows], self.labels[rows.to(self.labels.device)].cpu(), self.world)
        self.position = Position(self.config.epochs, 0, 0)
        self.end_epoch()

    def _note_unreadable(self, part: str, reasons: dict[int, str]) -> None:
        new = {i: reason for i, reason in reasons.items() if i not in self.unreadable[part]}
        self.unreadable[part].update(new)
        if new:
            source = self.source if part == "train" else self.val_source
            warn(f"{part}: {len(new)} unreadable images left out, first: {first_of(new, source)}")

    def _check_backbone(self) -> None:
        if self.frozen.digest() != self.digest:
            raise RuntimeError("the backbone changed during linear evaluation")

    def _zero_counts(self) -> None:
        wide = torch.float32 if self.world.device.type == "mps" else torch.float64
        self.counts = torch.zeros(len(self.results), 4, dtype=wide, device=self.world.device)

    def files(self) -> dict[str, Contents]:
        """``checkpoint.pth.tar`` of the present position, and ``model_best.pth.tar`` where it is the best."""
        self._refuse_not_finite()
        c, counts = self.config, self.world.sum(self.counts).cpu()
        if not self.world.main:
            return {}
        lead, view = best_of(self.results), self.frozen.preset
        contents = files.pack(
            self.frozen,
            self.heads,
            lead,
            position=self.position,
            best_acc1=self.results[lead].best_acc1,
            extra={
                "config": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(c).items()},
                "seed": c.seed,
                "classes": list(self.source.classes),
                "findings": self.labels.ndim == 2,
                "data_digest": self.source.digest,
                "heads": [dataclasses.asdict(r) for r in self.results],
                "counts": counts,
                "protocol": protocol(c),
                "backbone": self.digest,
                "view": view_entry(view.mean, view.std, view.evaluation_zoom, view.reading),
                "origin": self.frozen.about,
                "licence": "that of the backbone's weights",
            },
        )
        # the best first: killed between the two, a resume makes it again
        return {**({files.BEST: contents} if self._best else {}), files.CHECKPOINT: contents}

    @property
    def data_title(self) -> str:
        """The images, for messages."""
        return f"data {self.config.data}"

    def result(self) -> None:
        """The table of heads."""
        if self.results[0].best_epoch >= 0:
            c = self.config
            bad = {part: len(set().union(*self.world.gather(set(met)))) for part, met in self.unreadable.items()}
            lead = best_of(self.results)
            self.log.summary(
                self.results,
                {
                    "protocol": protocol(c),
                    "backbone": self.frozen.about,
                    "data": c.data,
                    "epochs": self.position.epoch,
                    "batch_size": c.batch_size,
                    "solver": c.solver,
                    "seed": c.seed,
                    "unreadable": bad,
                },
                self._measured(lead),
                self.val_source.classes,
            )

    def _measured(self, head: int) -> JsonLine:
        """Further measures of a head as it is now, as far as asked for; every rank must call it."""
        if not (self.config.measures or self.labels.ndim == 2):
            return {}
        batches = self._validation()
        return measured(
            self.heads, head, batches, self.world, self.val_source, self.unreadable["val"], self.config.group_by
        )
