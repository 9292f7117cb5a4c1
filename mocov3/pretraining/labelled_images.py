"""Labelled images to compare a network with its start on: of the old kind (``--guard``), of the new (``--new-labels``).

Looked up without torch, so that a mistake is told before a run starts.
"""

import os
from pathlib import Path

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.data import Source, open_source
from mocov3.data.loading.order import hold_out
from mocov3.data.sources.labels import Labelled, Labels, read_labels, with_labels
from mocov3.data.sources.opening import Subset, has_unseen
from mocov3.data.sources.survey import scattered
from mocov3.errors import UserError
from mocov3.pretraining.inputs import unseen_images

MOST = 2000
"""Images of a set; more would cost time at every judgement and tell little more."""
FEWEST = 10
FOLDERS = "folders"


def old_images(config: PretrainConfig) -> tuple[Source, Source] | None:
    """Images of ``--guard`` in two parts, by a fixed draw: what decides when to stop, and what nothing is decided by.

    Raises:
        UserError: if there are none, their classes are not known, or they are too few.
    """
    if not config.guards:
        return None
    name, file = _named(config.guard)
    where = f"--guard {config.guard}"
    try:
        images = open_source(name, "val" if has_unseen(name) else "train")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if file:
        images = Labelled(images, read_labels(Path(file), images, flag="--guard"))
    images = _known(images, where, "give DIR,labels.csv (path,label), or a folder of class folders")
    images = Subset(images, scattered(len(images), 2 * MOST))
    judging, choosing = hold_out(images, len(images) // 2, config.group_by, needed=False)
    for part in (choosing, judging):
        if part.labels is None or len(np.unique(part.labels)) < 2 or len(part) < FEWEST:
            raise UserError(
                f"{where}: {len(images)} images are too few for two parts of two or more classes; give {4 * FEWEST} or "
                "more"
            )
    return choosing, judging


def new_images(config: PretrainConfig) -> Source | None:
    """Images of ``--new-labels``, of those that are not trained on.

    Raises:
        UserError: if there are none, or too few.
    """
    if not config.new_labels:
        return None
    where = f"--new-labels {config.new_labels}"
    unseen = unseen_images(config)
    if config.new_labels != FOLDERS:
        unseen = Labelled(unseen, _of_unseen(config, unseen))
    images = with_labels(unseen)
    if len(images) < FEWEST:
        raise UserError(
            f"{where}: {len(images)} of its images are kept from training, too few; label more of those (--hold-out, "
            "or DIR/val)"
        )
    images = _known(images, where, "give a CSV of path,label, or 'folders' where class folders hold the images")
    return Subset(images, scattered(len(images), MOST))


def _of_unseen(config: PretrainConfig, unseen: Source) -> Labels:
    """Labels of images that are not trained on, among those of a file that may name all."""
    file = Path(config.new_labels)
    if not (config.hold_out and isinstance(unseen, Subset)):
        return read_labels(file, unseen, flag="--new-labels")
    labels = read_labels(file, unseen.whole, flag="--new-labels")
    among = np.isin(labels.indices, unseen.indices)
    places = np.searchsorted(unseen.indices, labels.indices[among])
    return Labels(places, labels.numbers[among], labels.classes, labels.remarks)


def _named(guard: str) -> tuple[str, str]:
    """Folder and file of labels, which may be left out."""
    head, comma, tail = guard.rpartition(",")
    return (head, tail) if comma and not os.path.exists(guard) else (guard, "")


def _known(images: Source, where: str, cure: str) -> Source:
    labelled = with_labels(images)
    if labelled.labels is None or len(np.unique(labelled.labels[labelled.labels >= 0])) < 2:
        raise UserError(f"{where}: two or more classes of its images must be known; {cure}")
    return labelled
