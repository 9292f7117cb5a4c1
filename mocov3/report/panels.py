"""Sections 5 and 6 of the page: what the network sees, and what it has learned, as HTML and maps."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mocov3.config import PretrainConfig
from mocov3.data import Source
from mocov3.data.views.draws import Draw, pad_pixels
from mocov3.output.sheet import Seen, seen
from mocov3.report.charts import Chart, Table, chart, numbers, plain
from mocov3.report.html_parts import figures, notes, text, thumb
from mocov3.report.images import THUMB, boxed, encoded

if TYPE_CHECKING:
    from mocov3.report.learned import Learned
else:
    Learned = object  # with torch, which takes seconds to import

_IMAGES, _EPOCHS, _SIDE = 6, 2, 128
_BOXES = ("#e07b00", "#00a3c4")
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_MOST_COLOURED = 20


def views(source: Source, config: PretrainConfig) -> str:
    """Images with the views of two epochs, as this run's seed draws them."""
    rows = list(seen(source, config, _IMAGES, _EPOCHS, seed=config.seed or 0))
    if not rows:
        return notes(["none of the images tried can be read"])
    cells = "".join(f"<figure>{_row(row, config)}</figure>" for row in rows)
    return (
        f'<p class="lead">Two views of each image, as this run draws them in its first {_EPOCHS} epochs '
        f"(preset {text(config.view_preset)}, crops of {config.crop_min:g}–1 of the area, {config.image_size} "
        "px). The boxes "
        'are the crops of epoch 0: <b class="box1">view 1</b>, <b class="box2">view 2</b>. If you can no '
        "longer tell that "
        "both views show the same thing, the network can't either; if nothing changes, it learns nothing.</p>"
        f'<div class="views">{cells}</div>'
    )


def _row(row: Seen, config: PretrainConfig) -> str:
    pad = pad_pixels(config.preset, row.image.width, row.image.height)
    padded = (row.image.width + 2 * pad, row.image.height + 2 * pad)
    boxes = [(d.left - pad, d.top - pad, d.left - pad + d.width, d.top - pad + d.height) for d in row.draws[0]]
    enlarged = row.image
    if max(enlarged.size) < _SIDE:  # so that boxes of two pixels can be told apart on small images
        scale = _SIDE / max(enlarged.size)
        enlarged = enlarged.resize(
            (round(enlarged.width * scale), round(enlarged.height * scale)), Image.Resampling.BICUBIC
        )
        boxes = [tuple(v * scale for v in box) for box in boxes]  # type: ignore[misc]
    cells = [
        _cell(boxed(enlarged, boxes, _BOXES, _SIDE), f"{row.name}, {row.image.width}×{row.image.height}", row.name)
    ]
    for epoch, (pixels, draws) in enumerate(zip(row.views, row.draws, strict=True)):
        for number, (view, draw) in enumerate(zip(pixels, draws, strict=True)):
            shown = view.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            words = f"Epoch {epoch}, view {number + 1}: {described(draw, padded)}"
            cells.append(_cell(shown, words, f"view {number + 1} of {row.name} in epoch {epoch}"))
    return f'<div class="seen">{"".join(cells)}</div>'


def _cell(image: Image.Image, caption: str, alt: str) -> str:
    return f'<figure><img src="{encoded(image)}" alt="{text(alt)}"><figcaption>{text(caption)}</figcaption></figure>'


def described(draw: Draw, size: tuple[int, int]) -> str:
    """A draw in words, for an image of (padded) ``size``."""
    parts = [f"crop {100 * draw.width * draw.height / (size[0] * size[1]):.0f} %"]
    if draw.jitter is not None:
        order, *factors = draw.jitter
        strongest = max(order, key=lambda i: abs(factors[i] - (i < 3)))
        parts.append(f"jitter (most: {_OPERATIONS[strongest]})")
    parts += ["grey"] * draw.gray
    if draw.blur_sigma is not None:
        parts.append(f"blur σ {draw.blur_sigma:.1f}")
    parts += ["solarised"] * draw.solarize + ["flipped"] * draw.flip + ["upside down"] * draw.flip_vertical
    return ", ".join(parts + [f"turned {90 * draw.turns}°"] * bool(draw.turns))


@dataclasses.dataclass
class Panel:
    """Section 6 of one run: HTML, its charts by place, and the set of thumbnails they use."""

    html: str
    charts: list[Chart]
    set: dict[str, Any]
    style: str


def learned(content: Learned, key: str) -> Panel:
    """What a run has learned.

    Args:
        content: of its checkpoint and images.
        key: of this run on the page, for names.
    """
    sheet = f"sheet-{key}"
    names = [n.title for n in content.networks]
    maps = [_map(content, i, f"map-{key}-{i}", key) for i in reversed(range(len(content.networks)))]
    charts = [*maps]
    parts = [f'<p class="lead">Looked at: {text(content.pool)}.</p>', _neighbours(content, sheet)]
    parts.append("<h4>A map of the features</h4>" + figures(maps, wide=[maps[0]["id"]] if len(maps) == 1 else []))
    correct = [n.correct for n in content.networks if n.correct is not None]
    if content.labels is not None and correct:
        bars = _classes(content, content.labels, correct, f"classes-{key}")
        charts.append(bars)
        parts.append("<h4>Class by class</h4>" + figures([bars], wide=[bars["id"]]))
    if content.attention:
        parts.append(_attention(content))
    thumbs = {
        "sheet": sheet,
        "columns": content.columns,
        "side": THUMB,
        "names": content.names,
        "labels": None if content.labels is None else [int(v) for v in content.labels],
        "classes": content.classes,
    }
    style = f'.{sheet}{{background-image:url("{encoded(content.sprite, 78)}")}}'
    ranks = ", ".join(f"{n.rankme:.1f} {t}" for n, t in zip(content.networks, names, strict=True))
    parts.append(f'<p class="about">Effective rank of the features (RankMe): {text(ranks)}.</p>')
    return Panel("".join(parts), charts, thumbs, style)


def _neighbours(content: Learned, sheet: str) -> str:
    rows = []
    for row, query in enumerate(content.queries.tolist()):
        name = content.names[query]
        label = f" ({content.classes[content.labels[query]]})" if content.labels is not None else ""
        cells = [
            f'<td class="name">{text(name)}{text(label)}</td>',
            f"<td>{thumb(sheet, content.columns, query, name)}</td>",
        ]
        for network in content.networks:
            near = network.neighbours[row].tolist()
            other = [content.labels is not None and content.labels[i] != content.labels[query] for i in near]
            shown = "".join(
                thumb(sheet, content.columns, i, content.names[i], other=bool(o))
                for i, o in zip(near, other, strict=True)
            )
            cells.append(f"<td>{shown}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th scope=col>nearest, {text(n.title)}</th>" for n in content.networks)
    red = " Outlined in red: another class." if content.labels is not None else ""
    return (
        f'<h4>Nearest neighbours</h4><p class="about">Each image with those whose features are most like '
        "its own, among the "
        f'images looked at.{red}</p><div class="scroll" tabindex="0"><table class="near"><thead><tr><th '
        "scope=col>image"
        f"</th><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _map(content: Learned, which: int, id: str, key: str) -> Chart:
    network = content.networks[which]
    groups: list[tuple[str, np.ndarray]] = [("images", np.arange(len(content.names)))]
    if content.labels is not None and len(np.unique(content.labels)) <= _MOST_COLOURED:
        groups = [(content.classes[c], np.flatnonzero(content.labels == c)) for c in np.unique(content.labels).tolist()]
    symbols = itertools.chain(["circle"] * 10, itertools.repeat("diamond"))
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": plain(name),
            "x": numbers(network.map[at, 0], 4),
            "y": numbers(network.map[at, 1], 4),
            "customdata": at.tolist(),
            "hoverinfo": "none",
            "marker": {"size": 6, "opacity": 0.75, "symbol": symbol},
            "meta": {"colour": i},
        }
        for i, ((name, at), symbol) in enumerate(zip(groups, symbols, strict=False))
    ]
    about = (
        "The first two principal components of the normalised features; images that lie together look "
        "alike to the "
        "network. Point at one to see it; zoom in until few are visible to see all of them."
    )
    scatter = chart(
        id,
        f"Map, {network.title}",
        about,
        data,
        x="first component",
        y="second component",
        height=420,
        showlegend=len(data) > 1,
    )
    return scatter | {"map": key}


def _classes(content: Learned, labels: np.ndarray, correct: Sequence[np.ndarray], id: str) -> Chart:
    """Which images of each class their nearest others vote for, by network."""
    present = np.unique(labels)
    data, rows = [], []
    last = [100 * correct[-1][labels == c].mean() for c in present]
    order = np.argsort(last)
    shown = order if len(order) <= 40 else np.concatenate([order[:20], order[-20:]])
    names = [plain(f"{content.classes[present[i]]} ({int((labels == present[i]).sum())})") for i in shown]
    for i, (network, right) in enumerate(zip(content.networks, correct, strict=True)):
        share = [100 * float(right[labels == present[j]].mean()) for j in shown]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plain(network.title),
                "x": numbers(share, 4),
                "y": names,
                "meta": {"colour": 8 if i + 1 < len(content.networks) else 0},
                "hovertemplate": "%{x:.1f} %<extra></extra>",
            }
        )
        rows.append(share)
    overall = "; ".join(
        f"{n.title} {100 * right.mean():.1f} %" for n, right in zip(content.networks, correct, strict=True)
    )
    more = "" if len(shown) == len(order) else f" Of {len(order)} classes, the twenty worst and the twenty best."
    table: Table = {
        "head": ["class (images)", *(n.title for n in content.networks)],
        "rows": [[content.classes[present[j]], *(f"{r[i]:.1f}" for r in rows)] for i, j in enumerate(shown)],
    }
    about = (
        f"Each image judged by its nearest others among those looked at (k 20, leave-one-out). All "
        "classes together: "
        f"{overall}. Few images: compare networks within this page only.{more}"
    )
    return chart(
        id,
        "k-NN accuracy by class",
        about,
        data,
        x="correct, %",
        table=table,
        height=max(26 * len(shown) + 110, 200),
        barmode="group",
        yaxis={"automargin": True, "title": None},
        xaxis={"range": [0, 100]},
        hovermode="closest",
    )


def _attention(content: Learned) -> str:
    cells = []
    for name, mean, heads in content.attention:
        each = "".join(f'<img src="{h}" alt="head {i + 1}" width="56" height="56">' for i, h in enumerate(heads))
        cells.append(
            f'<figure><img src="{mean}" alt="attention on {text(name)}" width="112" height="112">'
            f'<div class="heads">{each}</div><figcaption '
            f'class="about">{text(name)}</figcaption></figure>'
        )
    return (
        '<h4>Attention of the cls token</h4><p class="about">Where the last block looks, averaged over heads '
        "(large) and by "
        "head (small): dark least, yellow most, each scaled to itself. Trained networks tend to look at things, not at "
        f'backgrounds.</p><div class="looks">{"".join(cells)}</div>'
    )


def unlike(runs: Sequence[str]) -> list[str]:
    """Names of runs, made different where they are the same."""
    return [f"{name} ({i + 1})" if list(runs).count(name) > 1 else name for i, name in enumerate(runs)]
