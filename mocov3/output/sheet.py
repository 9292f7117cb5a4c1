"""Images of images: each with its views as training draws them, and queries with their nearest neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mocov3.config import PretrainConfig
from mocov3.config.presets import Reading
from mocov3.data import Source, TwoViews
from mocov3.data.sources.survey import scattered
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.data.views.draws import Draw, draw
from mocov3.errors import UserError

_ROWS, _PAIRS, _SIDE, _GAP, _TOP = 8, 4, 96, 4, 20
_OTHER_CLASS = (214, 39, 40)


@dataclass(frozen=True)
class Seen:
    """An image and its views in some epochs."""

    name: str
    image: Image.Image
    """Whole, RGB."""
    views: list[tuple[Image.Image, Image.Image]]
    """Views 1 and 2 of each epoch, RGB."""
    draws: list[tuple[Draw, Draw]]
    """What was drawn for them; crops count in the padded image."""


def seen(source: Source, config: PretrainConfig, rows: int, epochs: int, *, seed: int = 0) -> Iterator[Seen]:
    """At most ``rows`` readable images, scattered over ``source``, with their views in the first epochs."""
    preset = config.preset
    views = TwoViews(config.image_size, config.crop_min, preset, config.views)
    count = 0
    for index in scattered(len(source), 4 * rows).tolist():
        if count == rows:
            return
        try:
            data = source.read(index)
            whole = ImageBytes(data, preset.reading).pixels()[0]
            pairs = [views(data, seed=seed, epoch=epoch, index=index) for epoch in range(epochs)]
        except (DecodeError, OSError):
            continue
        height, width = whole.shape[:2]

        def drawn(epoch: int, view: int, index: int = index, width: int = width, height: int = height) -> Draw:
            return draw(preset, config.crop_min, width, height, seed=seed, epoch=epoch, index=index, view=view)

        count += 1
        yield Seen(
            source.name(index),
            shown(whole),
            [(shown(a), shown(b)) for a, b in pairs],
            [(drawn(epoch, 0), drawn(epoch, 1)) for epoch in range(epochs)],
        )


def write_sheet(path: Path, source: Source, config: PretrainConfig) -> int:
    """Write ``path`` (PNG): one image a row, then pairs of its two views in four epochs. Returns the rows.

    Raises:
        UserError: if it cannot be written.
    """
    sheet, rows = draw_views(source, config)
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written ({error.strerror or error})") from None
    return rows


def draw_views(source: Source, config: PretrainConfig) -> tuple[Image.Image, int]:
    """One image a row, then pairs of its two views in four epochs; and the number of rows."""
    cell = _SIDE + _GAP
    width = cell * (1 + 2 * _PAIRS) + (1 + _PAIRS) * 2 * _GAP
    sheet = Image.new("RGB", (width, _TOP + _ROWS * cell), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 4), "image", fill="black")
    for pair in range(_PAIRS):
        pen.text((_left(pair, 0), 4), f"views 1 and 2 (epoch {pair})", fill="black")
    row = 0
    for image in seen(source, config, _ROWS, _PAIRS):
        top = _TOP + row * cell
        sheet.paste(_tile(image.image), (_GAP, top))
        for pair, both in enumerate(image.views):
            for number, view in enumerate(both):
                resized = view.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
                sheet.paste(resized, (_left(pair, number), top))
        row += 1
    return sheet.crop((0, 0, width, _TOP + row * cell)), row


def draw_neighbours(
    asked: Source, shown: np.ndarray, bank: Source, neighbours: np.ndarray, reading: Reading
) -> Image.Image:
    """One query a row, then its neighbours, nearest first; those of another class in red.

    Args:
        asked: where the queries are.
        shown: their indices, (queries,).
        bank: where the neighbours are.
        neighbours: their indices, (queries, neighbours).
        reading: how images are read.
    """
    cell = _SIDE + _GAP
    left = cell + 3 * _GAP
    sheet = Image.new("RGB", (left + cell * neighbours.shape[1], _TOP + cell * len(shown)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 4), "query", fill="black")
    pen.text((left, 4), "nearest, by cosine" + (" (red: another class)" if _classes(asked, bank) else ""), fill="black")
    for row, (query, nearest) in enumerate(zip(shown.tolist(), neighbours.tolist(), strict=True)):
        top = _TOP + row * cell
        sheet.paste(_read(asked, query, reading), (_GAP, top))
        for column, index in enumerate(nearest):
            place = (left + column * cell, top)
            sheet.paste(_read(bank, index, reading), place)
            classes = _classes(asked, bank)
            if classes and classes[0][query] != classes[1][index]:
                box = (*place, place[0] + _SIDE - 1, top + _SIDE - 1)
                pen.rectangle(box, outline=_OTHER_CLASS, width=4)
    return sheet


def _classes(asked: Source, bank: Source) -> tuple[np.ndarray, np.ndarray] | None:
    return None if asked.labels is None or bank.labels is None else (asked.labels, bank.labels)


def _read(source: Source, index: int, reading: Reading) -> Image.Image:
    try:
        return _tile(shown(ImageBytes(source.read(index), reading).pixels()[0]))
    except (DecodeError, OSError):
        return Image.new("RGB", (_SIDE, _SIDE), "grey")


def _tile(image: Image.Image) -> Image.Image:
    tile = Image.new("RGB", (_SIDE, _SIDE), "white")
    tile.paste(contained(image, _SIDE))
    return tile


def contained(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side resized to ``side``; the shorter one keeps a pixel, however thin it is."""
    width, height = (max(round(n / max(image.size) * side), 1) for n in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def shown(pixels: np.ndarray) -> Image.Image:
    """One channel as grey, of many the first three."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., np.arange(3) % pixels.shape[2]]))


def _left(pair: int, number: int) -> int:
    cell = _SIDE + _GAP
    return cell + 3 * _GAP + pair * (2 * cell + 2 * _GAP) + number * cell
