"""Networks of files, judged on the same images: what ``mocov3 compare`` prints."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mocov3.config import preset_of
from mocov3.config.fields import Fields
from mocov3.data import Source
from mocov3.data.loading.order import hold_out
from mocov3.data.sources.groups import chosen, groups_in
from mocov3.data.sources.labels import Labels
from mocov3.data.sources.opening import Subset
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.distributed.launch import pick_device
from mocov3.errors import UserError
from mocov3.evaluation.answers import Answers, answered
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.label_free import ViewsToJudge, features_of_views, judge, pixel_features
from mocov3.metrics import JsonLine
from mocov3.models import Encoder, build_backbone
from mocov3.weights import Contents, checkpoint, trained_with
from mocov3.weights.adapters import read_adapter
from mocov3.weights.attention_heads import choices, width_of
from mocov3.weights.convert import Built, build_from
from mocov3.weights.find import find_backbone, named_arch
from mocov3.weights.start import load_start


def read_all(files: Sequence[str]) -> dict[str, Contents]:
    """File → what it holds but for its optimizer, each file read once.

    Raises:
        UserError: naming the first that cannot be read.
    """
    return {file: {k: v for k, v in checkpoint.read(file).items() if k != "optimizer"} for file in files}


def kept_back(files: Mapping[str, Contents], data: str, whole: Source) -> Source | None:
    """The images that the runs of these files kept from training, if all did so on this very data."""
    settings = set()
    for contents in files.values():
        config = trained_with(contents)
        same = bool(config.get("data")) and os.path.abspath(str(config["data"])) == os.path.abspath(data)
        settings.add((same, _count(config.get("hold_out")), str(config.get("group_by") or "")))
    if len(settings) != 1:
        return None
    same, count, group_by = settings.pop()
    return hold_out(whole, count, group_by)[1] if same and count and 2 * count <= len(whole) else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def judge_all(
    files: Mapping[str, Contents],
    images: Source,
    whole: Source,
    labels: Labels | None,
    *,
    device: str,
    workers: int,
    arch: str | None = None,
    heads: int | None = None,
    blend: Sequence[float] = (),
    group_by: str = "",
    measures: bool = False,
) -> list[JsonLine]:
    """A row of measures for pixels, for the untrained and starting networks, for each file and its blends.

    With labels a file's row holds the paired comparison with the network it started from, where that is to be had.

    Args:
        files: checkpoints, as ``read_all`` gives them.
        images: to judge on.
        whole: what the indices of ``labels`` count in.
        labels: known classes.
        device: as ``--device``.
        workers: loading processes.
        arch: of files that do not say it.
        heads: attention heads of ViTs, of files that do not tell.
        blend: fractions of the way from the start's weights to the file's, to be judged as well.
        group_by: as ``--group-by``: no image is judged by others of its group, and groups are resampled whole.
        measures: give further ones (``mocov3.evaluation.measures``) of labelled images.

    Raises:
        UserError: if something cannot be read, or a blend is wanted with a start that is not here.
    """
    # --heads is for files that ask for it, or for all
    asking = [file for file, contents in files.items() if heads is not None and _asks(contents, file, arch)] or list(
        files
    )
    judges = _Judges(images, whole, labels, World(0, 1, pick_device(device, None)), workers, group_by, measures)
    rows: list[JsonLine] = []
    for file, contents in files.items():
        named = named_arch(contents) is not None
        encoder, settings = build_from(
            contents, file, arch=None if named else arch, heads=heads if file in asking else None
        )
        rows += judges.beside(trained_with(contents), settings)
        rows += judges.of_file(file, encoder, trained_with(contents), settings, blend)
    return rows


class _Judges:
    """What judges networks on the same images, one after the other, and knows which it has judged.

    Args:
        images: to judge on.
        whole: what the indices of ``labels`` count in.
        labels: known classes.
        world: where.
        workers: loading processes.
        group_by: as ``--group-by``.
        measures: give further ones of labelled images.
    """

    def __init__(
        self,
        images: Source,
        whole: Source,
        labels: Labels | None,
        world: World,
        workers: int,
        group_by: str,
        measures: bool,
    ) -> None:
        self.measures = measures
        self.images, self.labels, self.world, self.workers = images, labels, world, workers
        self.labelled = None if labels is None else Subset(whole, labels.indices)
        self.groups = groups_in(images, group_by)
        self.labelled_groups = None if self.labelled is None else groups_in(self.labelled, group_by)
        self._kept: dict[tuple[bool, ProbeViews], ViewsToJudge] = {}
        self._beside: set[str] = set()
        self._starts: dict[str, tuple[Encoder, Answers | None]] = {}

    def beside(self, config: Fields, settings: Built) -> Iterator[JsonLine]:
        """Rows that a file is shown beside and that are not there yet: pixels, untrained, the start."""
        size = settings["image_size"]
        if self._first(f"pixels {size}"):
            yield self._row("pixels", "pixels", None, config, size)[0]
        if self._first(str(settings)):
            torch.manual_seed(0)
            untrained = build_backbone(**settings)
            yield self._row(f"untrained {settings['arch']}", "untrained", untrained, config, size)[0]
        start, place = _start_of(config), self._place(config, settings)
        if start and self._first(place) and (before := _beginning(config, settings)) is not None:
            row, right = self._row(f"start: {start}", "start", before, _config_of_start(config), size)
            self._starts[place] = before, right
            yield row

    def of_file(
        self, file: str, encoder: Encoder, config: Fields, settings: Built, blend: Sequence[float]
    ) -> Iterator[JsonLine]:
        """Rows of a file and of its blends; with labels each against its start."""
        start, first = self._starts.get(self._place(config, settings), (None, None))
        if blend and start is None:
            raise UserError(f"--blend: {file} names no --init that is here and fits it, to be blended with")
        networks = [(file, "checkpoint", encoder)]
        networks += [(f"{file} blend {f:g}", "blend", blended(start, encoder, f)) for f in blend if start is not None]
        for name, kind, network in networks:
            row, right = self._row(name, kind, network, config, settings["image_size"])
            if first is not None and right is not None and (change := right.against(first)) is not None:
                row["against_start"] = change
            yield row

    def _first(self, thing: str) -> bool:
        new = thing not in self._beside
        self._beside.add(thing)
        return new

    def _place(self, config: Fields, settings: Built) -> str:
        return f"start {_start_of(config)} {settings}"

    def _views(self, source: Source, view: ProbeViews) -> ViewsToJudge:
        """The views of a source; those of the last networks are kept for the next."""
        key = source is self.labelled, view
        if key not in self._kept:
            others = {k: v for k, v in self._kept.items() if k[0] != key[0]}
            self._kept = {**others, key: ViewsToJudge(source, view, world=self.world, workers=self.workers)}
        return self._kept[key]

    def _row(
        self, name: str, kind: str, encoder: Encoder | None, config: Fields, size: int
    ) -> tuple[JsonLine, Answers | None]:
        """The measures, and with labels which labelled images are answered rightly."""
        preset, labels = preset_of(config), self.labels
        network, made = (
            (nn.Identity(), pixel_features) if encoder is None else (encoder.to(self.world.device), encoder.features)
        )

        def features(source: Source, probes: int) -> tuple[torch.Tensor, np.ndarray]:
            images = self._views(source, ProbeViews(size, preset.evaluation_zoom, probes, preset.reading))
            return features_of_views(Extractor(network, made, images.view, preset.mean, preset.std), images)

        views, found = features(self.images, 4)
        if len(views) < 10:
            raise UserError(
                f"data: only {len(views)} of {len(self.images)} images can be read; 10 or more are needed to judge by"
            )
        row = {"name": name, "kind": kind, **judge(views, chosen(self.groups, found)).as_dict()}
        answers = None
        if labels is not None and self.labelled is not None:
            labelled, read = features(self.labelled, 0)
            if len(read) < 2:
                raise UserError(f"only {len(read)} of {len(labels.numbers)} labelled images can be read; label others")
            groups = chosen(self.labelled_groups, read)
            answers = answered(labelled[:, 0], labels.numbers[read], labels.classes, groups, self.world.device)
            row |= answers.line(further=self.measures)
        return row, answers


def _start_of(config: Fields) -> str:
    """What a run started from, for people."""
    return " + ".join(str(config[name]) for name in ("init", "adapter") if config.get(name))


def _config_of_start(config: Fields) -> Fields:
    """How the images of the starting network's own training were read; as the run's, where it does not say."""
    if config.get("adapter"):
        return trained_with(read_adapter(str(config["adapter"])).contents) or config
    init = str(config["init"])
    return (trained_with(checkpoint.read(init)) if Path(init).is_file() else {}) or config


@torch.no_grad()
def blended(start: Encoder, adapted: Encoder, fraction: float) -> Encoder:
    """A network with weights ``fraction`` of the way from one network's to another's (Wortsman et al. 2022, WiSE-FT).

    Running statistics of batch norms are blended too, although those of the blend are others. At 0 and 1 it is exactly
    one of the two.
    """
    network = copy.deepcopy(adapted)
    before = start.state_dict()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[name].to(value), value, fraction))
    return network


def _asks(contents: Contents, file: str, arch: str | None) -> bool:
    """Whether a file does not tell which of two numbers of attention heads its ViT has."""
    weights = find_backbone(contents, file, arch=arch)
    return weights.heads.number is None and bool(choices(width_of(weights.state)))


def _beginning(config: Fields, settings: Built) -> Encoder | None:
    """The network of a run's ``--init`` as the run began: a file's weights, or those that timm publishes; ``None``
    where they are elsewhere by now.
    """
    encoder = build_backbone(**settings)
    setattr(encoder, encoder.projector_name, nn.Identity())
    heads, adapter = settings.get("num_heads"), str(config.get("adapter") or "")
    try:
        load_start(str(config["init"]), [encoder], settings["arch"], heads, adapter)
    except UserError:
        return None
    return encoder.eval()
