"""Quality without labels during training: judged at epoch ends, written to ``quality.jsonl``, a network kept.

``best_unlabelled.pth.tar`` holds what evaluation, conversion and export read: arch, weights and configuration. It is
the last network that was judged, since no measure chooses a better one within a run (``benchmarks/choosing.py``,
docs/own-images.md), unless it has collapsed; with ``--guard`` the one that finds most images again of those let pass.
"""

import dataclasses
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from mocov3.config import PretrainConfig
from mocov3.data import Source
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.groups import chosen, groups_in
from mocov3.data.sources.survey import giants, scattered
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.distributed.sharding import whole
from mocov3.errors import UserError
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.label_free import LabelFreeQuality, ViewsToJudge, features_of_views, judge, pixel_features
from mocov3.evaluation.paired import Conclusion
from mocov3.metrics import QUALITY, JsonLine, plain
from mocov3.models import Encoder, MoCo
from mocov3.output.log import warn
from mocov3.pretraining.against_start import AgainstStart
from mocov3.pretraining.inputs import unseen_images
from mocov3.pretraining.log import PretrainingLog
from mocov3.weights import checkpoint
from mocov3.weights.checkpoint import Position
from mocov3.weights.find import summed
from mocov3.weights.origin import origin_of_run

BEST = "best_unlabelled.pth.tar"
_HEADERS, _FEW_GIANTS = 50, 0.1
_COLLAPSED = 0.5
"""A network that retrieves less than this share of what an earlier one did is not kept."""


class LabelFreeEvaluation:
    """Judges the network of a run on images it is not trained on, every ``--quality-every`` epochs, or never.

    Args:
        config: of the run, seed included.
        world: this rank; the images are divided among the ranks.
        model: judged through its query backbone.
        log: where judgements are told.
        start: where the run begins or resumes.
        resumed: whether it resumes: lines up to ``start`` count, later ones are cut off; else all are.

    Raises:
        UserError: if there are no images to judge on.
    """

    def __init__(
        self, config: PretrainConfig, world: World, model: MoCo, log: PretrainingLog, *, start: Position, resumed: bool
    ) -> None:
        self.config, self.world, self.model, self.log = config, world, model, log
        self.best_file = Path(config.output_dir) / BEST
        self.against_start: AgainstStart | None = None
        if not config.quality_every:
            return
        self.images = unseen_images(config)
        self.views = self._views()
        self.groups = groups_in(self.images, config.group_by, needed=False)
        kept_until = start.step if resumed else -1
        self.against_start = AgainstStart(config, world, model, log, unseen=self.images, kept_until=kept_until)
        self._file, lines = log.open(
            QUALITY, lambda line: line["step"] <= kept_until and {"name", "retrieval"} <= set(line)
        )
        self._take_up(self.against_start, world.broadcast(lines))
        # a run that begins: what it starts from, and what a network must beat
        if "start" not in self.base:
            label_free = self._judge(model.base_encoder)[0]
            self._note("start", label_free, start)
            if self.against_start.guards:
                self.best = label_free.retrieval
                self._keep(label_free, start)
        if "pixels" not in self.base:
            self._note("pixels", self._judge(None)[0], start)

    def _views(self) -> ViewsToJudge:
        c, preset = self.config, self.config.preset
        return ViewsToJudge(
            self.images,
            ProbeViews(c.image_size, preset.evaluation_zoom, reading=preset.reading, giants=_many_giants(self.images)),
            world=self.world,
            workers=loader_workers(c.workers, self.world.local_size),
        )

    def _take_up(self, against_start: AgainstStart, lines: list[JsonLine]) -> None:
        """What a former process judged."""
        self.base = {line["name"]: line["retrieval"] for line in lines if line["name"] != "epoch"}
        past = [line["retrieval"] for line in lines if line["name"] == "epoch"]
        self.best, self.kept, self.since_best = 0.0, 0.0, 0  # 0: features that say nothing, or are no numbers
        for found in past:
            self.kept = found if _stands(found, self.best) else self.kept
            self._count(found, better=found > self.best)
        if against_start.guards:  # only what the guard let pass counts, and it must beat the start
            passed = {line["step"] for line in against_start.lines if line["chosen"]}
            judged = [line["step"] for line in lines if line["name"] == "epoch"]
            chosen = [i for i, step in enumerate(judged) if step in passed]
            self.best = self.kept = past[chosen[-1]] if chosen else self.base.get("start", 0.0)
            self.since_best = len(past) - 1 - chosen[-1] if chosen else len(past)

    def epoch_ended(self, position: Position, *, last: bool) -> bool:
        """Judge the network where due; whether to stop, after ``--patience`` judgements that were not the best."""
        c, done = self.config, position.epoch + bool(position.iteration)
        if not c.quality_every or (done % c.quality_every and not last):
            return False
        label_free, features, groups = self._judge(self.model.base_encoder)
        comparison = self.against_start.compare(features, groups) if self.against_start else None
        holds = comparison is None or comparison.holds
        self._note("epoch", label_free, position)
        measures = {f"quality/{name}": value for name, value in label_free.as_dict().items() if name != "pictures"}
        self.log.scalars(measures, position.step - 1)
        better = holds and label_free.retrieval > self.best
        keeps = better if c.guards else _stands(label_free.retrieval, self.best)
        other = f"less than half of what {self.best_file.name} does, which stays" if self.kept else "not kept"
        self.log.say(
            f"Epoch {done - 1}: without labels, {label_free.retrieval:.1f} % of {label_free.images} unseen images "
            f"retrieved (at the start {self.base.get('start', 0):.1f}, pixels {self.base.get('pixels', 0):.1f})"
            + (", the most so far" if better else "")
            + ("" if keeps or c.guards else f"; {other}")
        )
        self._count(label_free.retrieval, better=better)
        if keeps:
            self._keep(label_free, position)
        if self.against_start and comparison:
            self.against_start.note(position, comparison, chosen=keeps)
        if last and self.kept:
            self.log.say(f"kept without labels: {self.best_file} ({self.kept:.1f} % retrieved)")
        stop = bool(c.patience) and self.since_best >= c.patience and not last
        if stop:
            self.log.say(f"no improvement in {c.patience} judgements: stopping (--patience)")
        return stop or not holds

    def _count(self, retrieval: float, *, better: bool) -> None:
        self.best, self.since_best = (retrieval, 0) if better else (self.best, self.since_best + 1)

    @property
    def spared(self) -> float:
        """Seconds of the judgements so far that the next one is spared: reading what is kept."""
        return self.views.seconds_kept if self.config.quality_every else 0.0

    @property
    def stopped(self) -> bool:
        """Whether the guard has stopped the run."""
        return self.against_start is not None and self.against_start.stopped

    def conclusion(self) -> Conclusion | None:
        """Whether to use the network that was kept, as far as that was asked for."""
        return self.against_start.conclusion(str(self.best_file)) if self.against_start else None

    def _judge(self, network: Encoder | None) -> tuple[LabelFreeQuality, Tensor, np.ndarray | None]:
        """The measures, and the features of the evaluation view with the images' groups."""
        preset = self.config.preset
        module, features = (nn.Identity(), pixel_features) if network is None else (network, network.features)
        extractor = Extractor(module, features, self.views.view, preset.mean, preset.std)
        views, read = features_of_views(extractor, self.views)
        if len(views) < 2:
            raise UserError("the quality without labels needs two or more readable images that are not trained on")
        groups = chosen(self.groups, read)
        return judge(views, groups), views[:, 0], groups

    def _note(self, name: str, label_free: LabelFreeQuality, position: Position) -> None:
        if name != "epoch":
            self.base[name] = label_free.retrieval
        self._file.write({"name": name, "epoch": position.epoch, "step": position.step, **label_free.as_dict()})

    def _keep(self, label_free: LabelFreeQuality, position: Position) -> None:
        self.kept = label_free.retrieval
        state = whole(self.model.state_dict(), keep=self.world.main)  # --fsdp: every rank gives its part
        if not self.world.main:
            return
        contents = {
            "epoch": position.epoch,
            "arch": self.config.arch,
            "state_dict": {checkpoint.PREFIX + k: v for k, v in summed(state).items()},
            "mocov3": {
                "format": checkpoint.FORMAT_VERSION,
                "step": position.step,
                "seed": self.config.seed,
                "config": dataclasses.asdict(self.config),
                "quality": plain(label_free.as_dict()),
                **origin_of_run(self.config.init),
            },
        }
        try:
            checkpoint.write(self.best_file, contents)
        except OSError as error:
            warn(f"{BEST} could not be written ({error.strerror or error}); the run continues")


def _stands(retrieval: float, best: float) -> bool:
    """Whether a network has not collapsed; ``best`` is the most that was retrieved so far."""
    return retrieval > 0 and retrieval >= _COLLAPSED * best


def _many_giants(source: Source) -> bool:
    """Whether more than a few images are giants, by the headers of some: else it is quicker to judge without them."""
    return bool(giants(source, scattered(len(source), _HEADERS)).mean() > _FEW_GIANTS)
