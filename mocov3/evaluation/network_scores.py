"""Networks of files, judged on the same images: what ``mocov3 compare`` prints."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mocov3.config import preset_of
from mocov3.config.fields import Fields
from mocov3.data import Source
from mocov3.data.loading.order import hold_out
from mocov3.data.sources.labels import Labels
from mocov3.data.sources.opening import Subset
from mocov3.data.views.probes import ProbeViews
from mocov3.distributed import World
from mocov3.distributed.launch import pick_device
from mocov3.errors import UserError
from mocov3.evaluation.features import Extractor
from mocov3.evaluation.intervals import interval
from mocov3.evaluation.label_free import features_of_views, judge, pixel_features
from mocov3.evaluation.neighbours import right_among
from mocov3.metrics import JsonLine
from mocov3.models import Encoder, build_backbone
from mocov3.weights import Contents, checkpoint, trained_with
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
) -> list[JsonLine]:
    """A row of measures for pixels, for the untrained and starting networks, and for each file.

    Args:
        files: checkpoints, as ``read_all`` gives them.
        images: to judge on.
        whole: what the indices of ``labels`` count in.
        labels: known classes.
        device: as ``--device``.
        workers: loading processes.
        arch: of files that do not say it.
        heads: attention heads of ViTs, of files that do not tell.
    """
    # --heads is for files that ask for it, or for all
    asking = [file for file, contents in files.items() if heads is not None and _asks(contents, file, arch)] or list(
        files
    )
    world = World(0, 1, pick_device(device, None))
    rows: list[JsonLine] = []
    beside: set[str] = set()
    for file, contents in files.items():
        config = trained_with(contents)
        named = named_arch(contents) is not None
        encoder, settings = build_from(
            contents, file, arch=None if named else arch, heads=heads if file in asking else None
        )
        size = settings["image_size"]
        setting: dict[str, Any] = {"world": world, "config": config, "size": size, "workers": workers, "whole": whole}
        if f"pixels {size}" not in beside:
            beside.add(f"pixels {size}")
            rows.append(_row("pixels", "pixels", None, images, labels, **setting))
        if (built := str(settings)) not in beside:
            beside.add(built)
            torch.manual_seed(0)
            untrained = build_backbone(**settings)
            rows.append(_row(f"untrained {settings['arch']}", "untrained", untrained, images, labels, **setting))
        start = str(config.get("init") or "")
        if start and start not in beside:
            beside.add(start)
            try:
                before: Encoder | None = _beginning(start, settings)
            except UserError:  # elsewhere by now
                before = None
            if before is not None:
                rows.append(_row(f"start: {start}", "start", before, images, labels, **setting))
        rows.append(_row(file, "checkpoint", encoder, images, labels, **setting))
    return rows


def _asks(contents: Contents, file: str, arch: str | None) -> bool:
    """Whether a file does not tell which of two numbers of attention heads its ViT has."""
    weights = find_backbone(contents, file, arch=arch)
    return weights.heads.number is None and bool(choices(width_of(weights.state)))


def _beginning(start: str, settings: Built) -> Encoder:
    """The network of a run's ``--init`` as the run began: a file's weights, or those that timm publishes."""
    encoder = build_backbone(**settings)
    load_start(start, [encoder], settings["arch"], settings.get("num_heads"))
    return encoder


def _row(
    name: str,
    kind: str,
    encoder: Encoder | None,
    images: Source,
    labels: Labels | None,
    *,
    world: World,
    config: Fields,
    size: int,
    workers: int,
    whole: Source,
) -> JsonLine:
    preset = preset_of(config)
    network, made = (nn.Identity(), pixel_features) if encoder is None else (encoder.to(world.device), encoder.features)

    def features(source: Source, probes: int) -> tuple[torch.Tensor, np.ndarray]:
        view = ProbeViews(size, preset.evaluation_zoom, probes, preset.reading)
        return features_of_views(
            Extractor(network, made, view, preset.mean, preset.std),
            source,
            world=world,
            workers=workers if len(source) * size**2 > 500 * 64 * 64 else 0,
        )

    views, _ = features(images, 4)
    if len(views) < 10:
        raise UserError(
            f"data: only {len(views)} of {len(images)} images can be read; 10 or more are needed to judge by"
        )
    row = {"name": name, "kind": kind, **judge(views).as_dict()}
    if labels is not None:
        labelled, read = features(Subset(whole, labels.indices), 0)
        if len(read) < 2:
            raise UserError(f"only {len(read)} of {len(labels.numbers)} labelled images can be read; label others")
        hits, n = leave_one_out(labelled[:, 0], torch.as_tensor(labels.numbers[read]))
        low, high = interval(hits, n)
        row |= {"knn": 100 * hits / n, "knn_low": low, "knn_high": high, "labelled": n}
    return row


def leave_one_out(features: Float[Tensor, "images dim"], labels: Int[Tensor, "images"]) -> tuple[int, int]:
    """Images whose class the k nearest others vote for (weights as in ``neighbours``), and all images."""
    return int(right_among(features, labels).sum()), len(features)
