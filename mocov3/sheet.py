"""A picture of what the network will see: pictures of a set, each with its views as training draws them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from mocov3.config import PretrainConfig
from mocov3.data import Source, TwoViews
from mocov3.data.decode import DecodeError, Picture
from mocov3.data.survey import scattered
from mocov3.errors import UserError

_ROWS, _PAIRS, _SIDE, _GAP, _TOP = 8, 4, 96, 4, 20


def write_sheet(path: Path, source: Source, config: PretrainConfig) -> int:
    """Write ``path`` (PNG): one picture a row, then pairs of its two views in four epochs. Returns the rows.

    Raises:
        UserError: if it cannot be written.
    """
    views = TwoViews(config.image_size, config.crop_min, config.preset, config.views)
    cell = _SIDE + _GAP
    width = cell * (1 + 2 * _PAIRS) + (1 + _PAIRS) * 2 * _GAP
    sheet = Image.new("RGB", (width, _TOP + _ROWS * cell), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 4), "picture", fill="black")
    for pair in range(_PAIRS):
        pen.text((_left(pair, 0), 4), f"views 1 and 2 (epoch {pair})", fill="black")
    row = 0
    for index in scattered(len(source), 4 * _ROWS).tolist():
        if row == _ROWS:
            break
        try:
            data = source.read(index)
            whole = _shown(Picture(data, config.preset.reading).pixels()[0])
            made = [views(data, seed=0, epoch=epoch, index=index) for epoch in range(_PAIRS)]
        except (DecodeError, OSError):
            continue
        top = _TOP + row * cell
        sheet.paste(ImageOps.contain(whole, (_SIDE, _SIDE)), (_GAP, top))
        for pair, both in enumerate(made):
            for number, pixels in enumerate(both):
                resized = _shown(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
                sheet.paste(resized, (_left(pair, number), top))
        row += 1
    try:
        sheet.crop((0, 0, width, _TOP + row * cell)).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written ({error.strerror or error})") from None
    return row


def _shown(pixels: np.ndarray) -> Image.Image:
    """One channel as grey, of many the first three."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., np.arange(3) % pixels.shape[2]]))


def _left(pair: int, number: int) -> int:
    cell = _SIDE + _GAP
    return cell + 3 * _GAP + pair * (2 * cell + 2 * _GAP) + number * cell
