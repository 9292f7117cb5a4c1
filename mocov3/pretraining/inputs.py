"""What pre-training is given: the configuration and its images, checked as far as that goes without torch."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.config.fields import check_writable
from mocov3.data import Source, open_source
from mocov3.data.loading.filling import check_readable
from mocov3.data.loading.order import Order, hold_out
from mocov3.data.sources.groups import NONE, groups_in, groups_of
from mocov3.data.sources.index import cache_folder
from mocov3.data.sources.labels import matched, with_labels
from mocov3.data.sources.opening import fractions, open_unseen
from mocov3.data.views import native
from mocov3.data.views.copies import Copies, limit, not_kept, opened_copies, used
from mocov3.errors import UserError, no_file
from mocov3.output.log import warn, warn_left_out


def check(config: PretrainConfig, *, script_door: bool) -> None:
    """Refuse what cannot work, before torch is imported.

    Raises:
        UserError: naming what, where and how to fix it.
    """
    config.check()
    source, _, order = open_images(config)
    warn_left_out(source)
    order.check()
    if config.nprocs_per_node > 1:
        check_divides(config.batch_size, config.nprocs_per_node * max(config.world_size, 1))
    if config.knn_every:
        known, validation = open_validation(config, source)
        groups_of((known, validation), config.group_by)
        check_readable(validation, config.preset.reading, f"--knn-every: {config.data_title} (val)")
        warn_left_out(validation, said=source)
    if config.quality_every:
        unseen = unseen_images(config)
        groups_in(unseen, config.group_by, needed=False)
        warn_left_out(unseen, said=source)
    if config.report_every and importlib.util.find_spec("plotly") is None:
        raise UserError(
            "--report-every draws its charts by plotly, which is not installed; pip install 'mocov3[report]'"
        )
    if config.resume not in ("", "auto") and not Path(config.resume).is_file():
        raise UserError(f"--resume {config.resume}: {no_file(config.resume)}")
    if config.init and not config.init.startswith("timm/") and not Path(config.init).is_file():
        raise UserError(f"--init {config.init}: {no_file(config.init)}; give a weights file, or timm/NAME")
    folder = Path(config.output_dir)
    check_writable(folder, "--output-dir")
    if not (script_door or config.resume or restarted_by_torchrun()) and any(folder.glob("checkpoint_*")):
        raise UserError(
            f"--output-dir {folder}: holds checkpoints of a former run; continue with --resume auto, or name another"
        )
    # remarks come last: a refusal is one line
    if config.views == "fast" and (remark := native.remark()):
        warn(remark)


def restarted_by_torchrun() -> bool:
    """Whether torchrun started this process again after a rank was lost: the same command line then resumes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def open_images(config: PretrainConfig) -> tuple[Source, Source | None, Order]:
    """Images to train on, images kept from training (``--hold-out``), and the order of the first.

    Raises:
        UserError: if there are none, or too few.
    """
    whole = open_source(config.data)
    if not config.hold_out:
        source, held_out = whole, None
    else:
        source, held_out = hold_out(whole, config.hold_out, config.group_by)
    # in batches only where it is asked for: images of few patients would leave no batch
    groups = groups_in(source, config.group_by) if config.group_by not in ("", NONE) else None
    return source, held_out, Order(len(source), config.batch_size, fractions(source), groups)


def copies_of(config: PretrainConfig, processes: int) -> Copies | None:
    """The smaller copies of large images, for one of so many processes; ``None`` where there are to be none."""
    if not config.smaller_copies or config.views == "pillow":
        return None
    try:
        return opened_copies(cache_folder(), processes)
    except (OSError, UserError):
        return not_kept()


def say_copies(copies: Copies, say: Callable[[str], None]) -> bool:
    """Say how many copies there are, and where; whether there are any."""
    count, size = used(copies.folder)
    if count:
        most = limit(Path(copies.folder).parent)
        say(
            f"{count} smaller copies of large images, {size / 1e6:.1f} MB of at most {most / 1e6:.0f}, in "
            f"{copies.folder} (--no-smaller-copies: none)"
        )
    return bool(count)


def unseen_images(config: PretrainConfig) -> Source:
    """Images for the quality without labels: those held out, else the validation part (DIR/val).

    Raises:
        UserError: if there are none.
    """
    _, held_out, _ = open_images(config)
    if held_out is not None:
        return held_out
    try:
        return open_unseen(config.data)
    except UserError as error:
        raise UserError(
            f"--quality-every needs images that are not trained on: give --hold-out N, or {config.data_title}/val "
            f"({error})"
        ) from None


def check_divides(batch_size: int, ranks: int) -> None:
    """Refuse a batch that is not the same on every rank, naming the nearest that are."""
    if batch_size % ranks:
        lower = batch_size // ranks * ranks
        choices = f"{lower} or {lower + ranks}" if lower else str(ranks)
        raise UserError(f"--batch-size {batch_size} does not divide over {ranks} processes; nearest that do: {choices}")


def open_validation(config: PretrainConfig, source: Source) -> tuple[Source, Source]:
    """The labelled images of ``source`` and of the validation part (DIR/val), for the k-NN evaluation.

    Raises:
        UserError: if one has no classes, or validation has a class that training lacks.
    """
    try:
        validation = open_unseen(config.data)
    except UserError as error:
        raise UserError(f"--knn-every needs labelled images in {config.data_title}/val: {error}") from None
    for part, images in (("train", source), ("val", validation)):
        if images.labels is None or len(np.unique(images.labels[images.labels >= 0])) < 2:
            raise UserError(f"--knn-every: {config.data_title} ({part}) does not hold images of two or more classes")
    return with_labels(source), matched(source.classes, validation, f"--knn-every: {config.data_title}")
