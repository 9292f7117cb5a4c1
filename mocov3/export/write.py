"""Write, load back, compare: what ``mocov3 export`` does once its arguments have been checked."""

import dataclasses
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mocov3.config import FinetuneConfig
from mocov3.config.fields import Fields
from mocov3.data.device.pixels import normalise
from mocov3.errors import UserError, printable
from mocov3.export import odd_images
from mocov3.export.formats import WRITERS, Exported, Format, Unfit
from mocov3.export.model_card import card
from mocov3.export.places import FORMATS, Staged
from mocov3.export.preprocessing import prepared, read_image
from mocov3.weights import checkpoint, convert, our_entry, trained_with

_REFERENCE = "not stated in the file; the public files of facebookresearch/moco-v3 are CC-BY-NC 4.0"
_MODES = {1: "L", 3: "RGB"}
"""Pillow's modes of the images that libraries prepare, by channels."""
_KINDS = {"L": "grey", "RGB": "RGB"}
_ORIGIN = "not stated in the file (the reference's files do not say)"


@dataclass(frozen=True)
class Report:
    """What was written and how closely it agrees."""

    output: Path
    format: str
    compared: str
    """How closely the outputs agree."""
    own: str
    """The same for images prepared by the library's own preprocessing; empty where it has none."""

    def __str__(self) -> str:
        own = f". {self.own} (see the card)" if self.own else ""
        return f"{printable(str(self.output))}: {self.format}, loaded back and compared {self.compared}{own}"


def export(
    path: Path,
    to: str,
    output: Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    momentum: bool = False,
    classifier: bool = False,
    licence: str = "",
    heads: int | None = None,
) -> Report:
    """Export the backbone of a file; nothing is left at ``output`` unless the features agree.

    Args:
        path: a checkpoint.
        to: a format of ``mocov3.export.places.FORMATS``.
        output: file or folder to make.
        arch: of a file that does not say it.
        image_size: side of the images in pixels, unless that of training.
        momentum: take the momentum encoder, or the average of fine-tuned weights.
        classifier: keep the linear classifier of a fine-tuned file.
        licence: to state in the card, unless what the file says.
        heads: attention heads of a ViT, of a file that does not tell.

    Raises:
        UserError: if the file holds no backbone, the format cannot hold it, or the output cannot be written.
        RuntimeError: if the features of what was written differ from ours; our fault.
    """
    model = load(
        path, arch=arch, image_size=image_size, momentum=momentum, classifier=classifier, licence=licence, heads=heads
    )
    writer = WRITERS[to]
    try:
        writer.fits(model)
    except Unfit as reason:
        raise UserError(f"--to {to} cannot hold {model.arch}: {reason}") from None
    with Staged(output) as place:
        writer.write(model, place)
        compared, own, note = _compare(model, writer, place)
        text = card(model, to, output.name, compared, f"{own}. {note}".strip(". ") + "." if own else "")
        if FORMATS[to].is_folder:
            (place / "README.md").write_text(text, encoding="utf-8")
    if not FORMATS[to].is_folder:
        output.with_name(output.name + ".md").write_text(text, encoding="utf-8")
    return Report(output, to, compared, own)


@torch.no_grad()
def _compare(model: Exported, writer: Format, place: Path) -> tuple[str, str, str]:
    """What was compared and the largest differences, from file bytes to outputs.

    Then the same by the library's preprocessing, or that it has none for such images; and a remark on how it differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = odd_images.write(Path(folder), model)
        pixels = np.stack([model.view(file.read_bytes())[0] for file in files.values()])
        x = torch.stack([prepared(model, str(file)) for file in files.values()])
        mode = _MODES.get(model.in_chans)
        images = [read_image(str(file)).convert(mode) for file in files.values()] if mode and writer.own else []
        own = writer.prepared(place, images) if images else None
    ours = model.encoder(normalise(pixels, torch.device("cpu"), model.mean, model.std).contiguous())
    theirs = writer.features(model, place, x if own is None else torch.cat([x, own]))
    if theirs.shape[1:] != ours.shape[1:]:
        raise RuntimeError(f"outputs are {tuple(theirs.shape[1:])} where ours are {tuple(ours.shape[1:])}")
    difference, largest = float((theirs[: len(ours)] - ours).abs().max()), float(ours.abs().max())
    if not difference <= writer.tolerance * max(largest, 1.0):  # also refuses NaN
        raise RuntimeError(f"outputs differ by {difference:.1e} (largest output {largest:.3g})")
    compared = f"from file bytes on {len(ours)} unusual images: largest difference of an output {difference:.1e} "
    compared += f"(largest output {largest:.3g})"
    if not writer.own:
        return compared, "", ""
    if own is None:
        return compared, f"{writer.own} takes no images of {model.in_chans} channel(s)", ""
    by_image = (theirs[len(ours) :] - ours).abs().amax(1)
    most = f"up to {float(by_image.max()):.1e}, most on {list(files)[int(by_image.argmax())]!r}"
    window = f"{writer.own} knows no window of more than 8 bits" if model.window else ""
    note = ". ".join(text.rstrip(".") for text in (writer.own_note, window) if text)
    return compared, f"Prepared by {writer.own} instead ({_KINDS[str(mode)]} images): {most}", note


def load(
    path: Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    momentum: bool = False,
    classifier: bool = False,
    licence: str = "",
    heads: int | None = None,
) -> Exported:
    """The backbone of a file with all that a card says about it."""
    contents = checkpoint.read(path)
    encoder, settings = convert.build_from(
        contents, str(path), arch=arch, image_size=image_size, momentum=momentum, heads=heads
    )
    names: tuple[str, ...] = ()
    classes = 0
    if classifier:
        head = convert.find_classifier(contents, encoder, str(path), momentum=momentum)
        setattr(encoder, encoder.projector_name, head)
        classes = head.out_features
        known = our_entry(contents).get("classes")
        names = tuple(map(str, known)) if isinstance(known, list) and len(known) == classes else ()
    config = trained_with(contents)
    preset = convert.views_of(contents, str(path))
    entry = our_entry(contents)
    return Exported(
        encoder=encoder,
        arch=settings["arch"],
        image_size=settings["image_size"],
        patch_size=settings["patch_size"],
        small_stem=settings["small_stem"],
        in_chans=settings["in_chans"],
        mean=preset.mean,
        std=preset.std,
        zoom=preset.evaluation_zoom,
        window=preset.reading.window,
        source=path.name,
        sha256=_sha256(path),
        recipe=_recipe(config),
        epochs=contents["epoch"] if isinstance(contents.get("epoch"), int) else None,
        licence=licence or str(entry.get("licence", _REFERENCE)),
        origin=str(entry.get("origin", _ORIGIN)),
        momentum=momentum,
        classes=classes,
        class_names=names,
        bicubic=_bicubic(config),
    )


def _bicubic(config: Fields) -> bool:
    if "data_set" not in config:  # not fine-tuned
        return False
    known = {f.name for f in dataclasses.fields(FinetuneConfig)}
    return not FinetuneConfig(**{k: v for k, v in config.items() if k in known}).transfer


def _recipe(config: Fields) -> Fields:
    left_out = ("data", "data_path", "output_dir", "resume", "init", "finetune", "config")  # places of a machine
    return {k: v for k, v in config.items() if k not in left_out and v not in (None, "", False)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
