"""During training: the network against the one it started from, on labelled images of the old kind and of the new.

``--guard`` stops a run that may be forgetting the old kind, and sees to it that what the run keeps
(``best_unlabelled.pth.tar``) was never such a network. Half of its images decide that; the other half, which decides
nothing, gives the verdict at the end. Every judgement is a line of ``guard.jsonl``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mocov3.config import PretrainConfig
from mocov3.data import CentreView, Source
from mocov3.data.loading.loader import loader_workers
from mocov3.data.sources.groups import chosen, groups_in
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.evaluation.features import Extractor, collect
from mocov3.evaluation.frozen import open_frozen
from mocov3.evaluation.label_free import ViewsToJudge, features_of_views
from mocov3.evaluation.neighbours import right_among, shared_neighbours
from mocov3.evaluation.paired import Conclusion, Paired, conclude, kept, smallest_set
from mocov3.metrics import GUARD, JsonLine
from mocov3.models import MoCo
from mocov3.pretraining.labelled_images import new_images, old_images
from mocov3.pretraining.log import PretrainingLog
from mocov3.weights.checkpoint import Position

_SMALL = 500 * 64 * 64  # pixels that one process reads before others have started
OLD, VERDICT, NEW = "old", "verdict", "new"


@dataclass(frozen=True)
class Comparison:
    """One judgement of the network against its start."""

    pairs: dict[str, Paired]
    """By set of images: OLD decides, VERDICT and NEW decide nothing."""
    agreement: float
    """Share in % of the nearest neighbours among unseen images that are those of the start."""
    holds: bool
    """Whether the guard lets the run go on."""


class AgainstStart:
    """Compares a run's network with the one it started from, or does nothing where no flag asks for it.

    Args:
        config: of the run.
        world: this rank; the images are divided among the ranks.
        model: its query backbone is compared.
        log: where judgements are told.
        unseen: the images of the quality without labels, whose neighbours are compared.
        kept_until: step up to which lines of a former process count; later ones are cut off.

    Raises:
        UserError: if the starting network or the images cannot be had.
    """

    def __init__(
        self, config: PretrainConfig, world: World, model: MoCo, log: PretrainingLog, *, unseen: Source, kept_until: int
    ) -> None:
        self.config, self.world, self.model, self.log = config, world, model, log
        self.active = bool(config.guard or config.new_labels)
        self.lines: list[JsonLine] = []
        if self.active:
            self._open(unseen)
            self._file, lines = log.open(
                GUARD, lambda line: line["step"] <= kept_until and {"chosen", "holds"} <= set(line)
            )
            self.lines = world.broadcast(lines)

    def _open(self, unseen: Source) -> None:
        c, world = self.config, self.world
        old, new = old_images(c), new_images(c)
        sets = {**({OLD: old[0], VERDICT: old[1]} if old else {}), **({NEW: new} if new else {})}
        self.sets: dict[str, Source] = sets
        # a file of groups may be of the new images only
        self.groups = {name: groups_in(images, c.group_by, needed=name == NEW) for name, images in sets.items()}
        start = open_frozen(
            c.init, flag="--init", arch=c.arch, heads=c.heads, adapter=c.adapter, image_size=c.image_size
        ).to(world.device)
        self._before = {name: self._right(start.extractor, name) for name in sets}
        view = ProbeViews(c.image_size, start.preset.evaluation_zoom, 0, start.preset.reading)
        extractor = Extractor(start.network, start.features, view, start.preset.mean, start.preset.std)
        self._start = features_of_views(extractor, ViewsToJudge(unseen, view, world=world))[0][:, 0]
        if old and len(old[0]) < (enough := smallest_set(c.guard_drop)):
            self.log.say(
                f"--guard: {len(old[0])} images decide and {len(old[1])} judge; to rule out a drop of {c.guard_drop:g} "
                f"points about {enough} are needed in each: the verdict will be 'cannot tell', and only a larger drop "
                "stops the run"
            )

    def _right(self, extractor: Extractor, name: str) -> tuple[Tensor, Tensor]:
        """Which images of a set are answered rightly by the others' classes, and which can be read."""
        c, images, groups = self.config, self.sets[name], self.groups[name]
        parallel = len(images) * c.image_size**2 > _SMALL
        workers = loader_workers(c.workers, self.world.local_size, len(images)) if parallel else 0
        collected = collect(extractor, images, world=self.world, workers=workers, check=False, title="--guard")
        readable = torch.from_numpy(collected.readable)
        right = torch.zeros(len(images), dtype=torch.bool)
        features = collected.features[readable]
        if bool(torch.isfinite(features).all()):  # else nothing is right
            labels = torch.as_tensor(images.labels, dtype=torch.long)[readable]
            right[readable] = right_among(features, labels, chosen(groups, collected.readable), self.world.device)
        return right, readable

    @property
    def guards(self) -> bool:
        """Whether it decides which network is kept."""
        return self.config.guards

    @property
    def stopped(self) -> bool:
        """Whether the guard has stopped the run."""
        return bool(self.lines) and not self.lines[-1]["holds"]

    def compare(self, unseen: Float[Tensor, "images dim"], groups: np.ndarray | None = None) -> Comparison | None:
        """The present network against the start; every rank must call it.

        Args:
            unseen: features of the unseen images' evaluation view.
            groups: of the unseen images.
        """
        if not self.active:
            return None
        c, preset, encoder = self.config, self.config.preset, self.model.base_encoder
        view = CentreView(c.image_size, preset.evaluation_zoom, reading=preset.reading)
        extractor = Extractor(encoder, encoder.features, view, preset.mean, preset.std)
        pairs = {}
        for name in self.sets:
            (before, first), (after, second) = self._before[name], self._right(extractor, name)
            both = first & second
            pairs[name] = Paired.of(before[both], after[both], chosen(self.groups[name], both.numpy()))
        same = len(unseen) == len(self._start)
        agreement = (
            shared_neighbours(self._start, unseen, groups=groups, device=self.world.device) if same else float("nan")
        )
        return Comparison(pairs, agreement, OLD not in pairs or kept(pairs[OLD], c.guard_drop))

    def note(self, position: Position, comparison: Comparison, *, chosen: bool) -> None:
        """Write a judgement down and tell it; ``chosen``: whether this network is what the run keeps."""
        pairs = comparison.pairs
        line: JsonLine = {"epoch": position.epoch, "step": position.step, "holds": comparison.holds, "chosen": chosen}
        line |= {"agreement": comparison.agreement, **{name: pair.as_dict() for name, pair in pairs.items()}}
        self.lines.append(line)
        self._file.write(line)
        numbers = {"guard/agreement": comparison.agreement}
        told = f"Epoch {position.epoch - 1}: {comparison.agreement:.0f} % of neighbours are the start's"
        if old := pairs.get(OLD):
            numbers |= {"guard/drop": old.drop, "guard/most": old.most}
            told += (
                f"; old kind: k-NN {old.before:.1f} → {old.after:.1f} % of {old.images} images, {old.most:.1f} points "
                "lost at most (95 %)"
            )
        self.log.scalars(numbers, position.step - 1)
        self.log.say(told)
        if not comparison.holds:
            self.log.say(
                f"--guard: a loss of {self.config.guard_drop:g} points on the old kind can no longer be ruled out: "
                "stopping; checkpoints from here on are not the result"
            )

    def conclusion(self, network: str) -> Conclusion | None:
        """What the run comes to; ``None`` where nothing was asked for, or judged yet.

        Args:
            network: file of the network that the run keeps.
        """
        if not (self.guards or self.config.new_labels) or not self.lines:
            return None
        chosen = [line for line in self.lines if line["chosen"]]
        if not (chosen or self.guards):
            return Conclusion(["Keep your weights: no network of this run tells images apart."], keep_yours=True)
        if not chosen:
            return Conclusion(
                [
                    "Keep your weights: no network of this run found more images again than the start and kept the "
                    f"old kind; {network} is the start."
                ],
                keep_yours=True,
            )
        pairs = {name: Paired.from_dict(chosen[-1][name]) for name in (VERDICT, NEW) if name in chosen[-1]}
        return conclude(network, pairs.get(VERDICT), pairs.get(NEW), self.config.guard_drop)
