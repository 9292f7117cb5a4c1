"""What a run's network has learned: features of some images by the network as it began and as it is now.

Needs a checkpoint in the run's folder and the images that its config.yaml names; says so where they are not available.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mocov3.config import PretrainConfig
from mocov3.config.presets import Reading
from mocov3.data import Source, open_source
from mocov3.data.device.pixels import normalise
from mocov3.data.sources.groups import groups_in
from mocov3.data.sources.labels import with_labels
from mocov3.data.sources.opening import Subset, has_unseen
from mocov3.data.sources.survey import scattered
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.distributed import World
from mocov3.distributed.launch import pick_device
from mocov3.errors import UserError
from mocov3.evaluation import quality
from mocov3.evaluation.features import stream
from mocov3.evaluation.frozen import Frozen, open_frozen
from mocov3.evaluation.neighbours import TEMPERATURE, Groups, K, nearest, vote
from mocov3.metrics import JsonLine
from mocov3.output.sheet import shown
from mocov3.pretraining.assemble import build_model
from mocov3.pretraining.inputs import open_images
from mocov3.pretraining.label_free_evaluation import BEST
from mocov3.report.geometry import cls_attention, flat_map, spectrum
from mocov3.report.images import THUMB, encoded, heated, sprite, thumbnail
from mocov3.report.runs import Run
from mocov3.weights import Contents, checkpoint, our_entry
from mocov3.weights.origin import origin_of

_MOST_REMARKS = 10
SECONDS = 60.0
"""A network reads no more images once it has taken so long, but for ``FEWEST``."""
FEWEST = 100
_BATCH, _QUERIES, _SHOWN, _LOOKS, _SIDE, _HEADS = 50, 10, 6, 6, 112, 6


@dataclasses.dataclass(frozen=True)
class Network:
    """One network's features of the images, as the page shows them."""

    title: str
    map: np.ndarray
    """(images, 2): principal components of the normalised features."""
    spectrum: np.ndarray
    """Share of the variance of each principal component."""
    rankme: float
    neighbours: np.ndarray
    """(queries, shown): the nearest images of each query, of other groups where there are groups."""
    correct: np.ndarray | None
    """Whether the nearest others vote for an image's class; ``None`` without labels."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """Images, and what networks make of them."""

    pool: str
    """Which images, in words."""
    names: list[str]
    labels: np.ndarray | None
    classes: list[str]
    sprite: Image.Image
    columns: int
    queries: np.ndarray
    networks: list[Network]
    attention: list[tuple[str, str, list[str]]]
    """Name, the mean over heads and each head, as data addresses."""


@dataclasses.dataclass
class RunContents:
    """What a run's checkpoint and images gave; ``remarks`` say what is missing."""

    learned: Learned | None = None
    source: Source | None = None
    """The images trained on."""
    facts: JsonLine = dataclasses.field(default_factory=dict)
    """Of the checkpoint: file, step, digest, licence, origin."""
    remarks: list[str] = dataclasses.field(default_factory=list)


def look(run: Run, *, images: int, device: str) -> RunContents:
    """What the newest checkpoint of ``run`` has learned.

    Args:
        run: with its configuration.
        images: how many to look at, at most.
        device: as ``--device``.
    """
    result = RunContents()
    config = run.config
    if config is None:
        result.remarks.append("config.yaml could not be read, so neither images nor network are known")
        return result
    try:
        result.source, held_out, _ = open_images(config)
        result.remarks += getattr(result.source, "skipped", [])[:_MOST_REMARKS]
    except (UserError, OSError) as error:
        result.remarks.append(f"the images are not available: {error}")
    try:
        file, contents = _checkpoint(run)
    except (UserError, OSError) as error:
        result.remarks.append(str(error))
        return result
    result.facts = _facts(file.name, contents)
    if result.source is None:
        return result
    try:
        world = World(0, 1, pick_device(device, None))
        trained = open_frozen(str(file), flag="checkpoint").to(world.device)
        pool, about = _pool(config, result.source, held_out)
        result.learned = _learn(config, trained, pool, about, world, images, result.remarks)
    except (UserError, OSError) as error:
        result.remarks.append(f"the network of {file.name} could not be looked at: {error}")
    return result


def _checkpoint(run: Run) -> tuple[Path, Contents]:
    try:
        newest = checkpoint.newest(run.folder)
    except UserError as error:
        raise UserError(str(error).removeprefix("--resume auto: ")) from None
    if newest is not None:
        return newest[0], newest[1]
    best = run.folder / BEST
    if best.is_file():
        return best, checkpoint.read(best)
    raise UserError("there is no checkpoint in the run's folder yet")


def _facts(name: str, contents: Contents) -> JsonLine:
    entry = our_entry(contents)
    facts = {
        k: entry[k] for k in ("run", "step", "seed", "pictures", "data_digest") if isinstance(entry.get(k), str | int)
    }
    return {"checkpoint": name, "epochs": contents.get("epoch"), **facts, **origin_of(contents)}


def _pool(config: PretrainConfig, source: Source, held_out: Source | None) -> tuple[Source, str]:
    """Images that were not trained on, if there are some; else those that were."""
    if has_unseen(config.data):
        return open_source(config.data, "val"), "validation images (not trained on)"
    if held_out is not None and len(held_out) >= FEWEST:
        return held_out, "images held out from training"
    return source, "images that were trained on (none were kept back)"


def _learn(
    config: PretrainConfig, trained: Frozen, pool: Source, about: str, world: World, images: int, remarks: list[str]
) -> Learned:
    if len(known := with_labels(pool)) >= FEWEST:
        pool = known
    indices = scattered(len(pool), images)
    thumbs, readable = _thumbs(pool, indices, config.preset.reading)
    if len(readable) < 3:
        raise UserError("fewer than three of its images can be read")
    chosen = Subset(pool, readable)
    now, seconds = _features(trained, chosen, world, None)
    before, title = _beginning(config, trained, chosen, world, len(now), seconds, remarks)
    n = min(len(now), len(before)) if before is not None else len(now)
    # both saw the same images in the same order: the first n of a fixed shuffle
    order = _shuffle(len(readable))[:n]
    back = np.argsort(order)
    chosen, thumbs = Subset(pool, readable[order[back]]), [thumbs[i] for i in order[back]]
    labels = chosen.labels
    if labels is not None and (labels.min() < 0 or len(np.unique(labels)) < 2):
        labels = None
    queries = _choose(labels, n)
    own = Groups.among(groups_in(chosen, config.group_by, needed=False), n)
    both = [(title, before), ("trained", now)] if before is not None else [("trained", now)]
    networks = [_network(name, x[:n][torch.from_numpy(back)], labels, queries, own) for name, x in both]
    columns = int(np.ceil(np.sqrt(n)))
    if n < len(pool):
        about = f"{n} of {len(pool)} {about}"
    else:
        about = f"all {n} {about}"
    return Learned(
        about,
        [chosen.name(i) for i in range(n)],
        labels,
        chosen.classes if labels is not None else [],
        sprite(thumbs, columns),
        columns,
        queries,
        networks,
        _attention(trained, chosen, queries, world),
    )


def _thumbs(pool: Source, indices: np.ndarray, reading: Reading) -> tuple[list[Image.Image], np.ndarray]:
    thumbs, readable = [], []
    for i in indices.tolist():
        try:
            thumbs.append(thumbnail(shown(ImageBytes(pool.read(i), reading).pixels()[0]), THUMB))
        except (DecodeError, OSError):
            continue
        readable.append(i)
    return thumbs, np.array(readable, dtype=np.int64)


def _shuffle(n: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).permutation(n)


def _features(frozen: Frozen, source: Source, world: World, most: int | None) -> tuple[Tensor, float]:
    """Features of the images in shuffled order, until ``SECONDS`` have passed or ``most`` are read; the seconds."""
    order = _shuffle(len(source))[:most]
    batches = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
    parts, began, count = [], time.monotonic(), 0
    for part in stream(frozen.extractor, source, batches, device=world.device):
        parts.append(part.arriving.wait())
        count += len(part.indices)
        if count >= FEWEST and time.monotonic() - began > SECONDS:
            break
    x = torch.cat(parts)
    if not bool(torch.isfinite(x).all()):
        raise UserError("its features are not finite")
    return x, time.monotonic() - began


def _beginning(
    config: PretrainConfig, trained: Frozen, source: Source, world: World, most: int, seconds: float, remarks: list[str]
) -> tuple[Tensor | None, str]:
    """Features of the network as the run began with it, rebuilt from its seed or from ``--init``."""
    title = "at the start" if config.init else "untrained"
    try:
        torch.manual_seed(config.seed or 0)
        encoder = build_model(
            dataclasses.replace(config, grad_checkpoint=False, heads=trained.heads), world
        ).base_encoder
        frozen = dataclasses.replace(trained, network=encoder.eval(), features=encoder.features)
        return _features(frozen, source, world, most)[0], title
    except (UserError, OSError) as error:
        remarks.append(f"the network that the run began with could not be built: {error}")
        return None, title


def _network(title: str, x: Tensor, labels: np.ndarray | None, queries: np.ndarray, own: Groups) -> Network:
    if not own.available:  # one group alone
        own = Groups.among(None, len(x))
    k = min(max(K, _SHOWN), own.available)
    neighbours = nearest(x, x, k, groups=own)
    correct = None
    if labels is not None:
        truth = torch.from_numpy(np.asarray(labels, np.int64))
        chosen = vote(neighbours, truth, [k], [TEMPERATURE], classes=int(truth.max()) + 1)[k, TEMPERATURE]
        correct = (chosen == truth).numpy()
    return Network(
        title,
        flat_map(x).numpy(),
        spectrum(x).numpy(),
        quality.rankme(x),
        neighbours.index[queries, :_SHOWN].numpy(),
        correct,
    )


def _choose(labels: np.ndarray | None, n: int) -> np.ndarray:
    """Queries: the first of each of the first classes, or evenly spread ones."""
    if labels is not None:
        return np.array([np.flatnonzero(labels == c)[0] for c in np.unique(labels)[:_QUERIES]])
    return np.unique(np.linspace(0, n - 1, min(n, _QUERIES)).round().astype(int))


def _attention(frozen: Frozen, source: Source, queries: np.ndarray, world: World) -> list[tuple[str, str, list[str]]]:
    """Attention of the cls token on some images; nothing for networks without one."""
    looked = queries[:_LOOKS].tolist()
    pixels = np.stack([frozen.view(source.read(i))[0] for i in looked])
    x = normalise(pixels, world.device, frozen.preset.mean, frozen.preset.std)
    attention = cls_attention(frozen.network, x)
    if attention is None:
        return []
    heads = attention.cpu().numpy().astype(float)
    return [
        (
            source.name(i),
            encoded(heated(image, weights.mean(0), _SIDE)),
            [encoded(heated(image, one, _SIDE // 2)) for one in weights[:_HEADS]],
        )
        for i, image, weights in zip(looked, (np.asarray(shown(p)) for p in pixels), heads, strict=True)
    ]
