"""Pieces of HTML. Every text that is not ours goes through ``text``: nothing that a file says can become markup."""

import html
from collections.abc import Iterable, Sequence

from mocov3.errors import printable
from mocov3.report.charts import Chart


def text(value: object) -> str:
    """``value`` as text of a page."""
    return html.escape(printable(str(value)))


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = (), *, kind: str = "") -> str:
    """A table of texts; the first cell of each row names it."""
    top = f"<thead><tr>{''.join(f'<th scope=col>{text(h)}</th>' for h in head)}</tr></thead>" if head else ""
    body = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{text(c)}</th>" if i == 0 and not kind else f"<td>{text(c)}</td>" for i, c in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    kinds = f' class="{kind}"' if kind else ""
    return f'<div class="scroll" tabindex="0"><table{kinds}>{top}<tbody>{body}</tbody></table></div>'


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Figures: (name, value, small print)."""
    parts = (f"<div><dt>{text(n)}</dt><dd>{text(v)}<small>{text(s)}</small></dd></div>" for n, v, s in items)
    return f'<dl class="tiles">{"".join(parts)}</dl>'


def figure(chart: Chart, *, wide: bool = False) -> str:
    """A chart's place: title, how to read it, the plot, its numbers."""
    numbers = chart.get("table")
    below = ""
    if numbers and numbers["rows"]:
        rows = table(numbers["rows"], numbers["head"], kind="data")
        below = f"<details><summary>Some of its numbers</summary>{rows}</details>"
    label = f"Chart: {chart['title']}. Arrow keys move, plus and minus zoom, 0 shows all."
    return (
        f"<figure{' class=wide' if wide else ''}><h3>{text(chart['title'])}</h3><p "
        f'class="about">{text(chart["about"])}</p>'
        f'<div class="plot" id="{text(chart["id"])}" tabindex="0" role="img" aria-label="{text(label)}" '
        f'style="min-height:{int(chart["layout"]["height"])}px"></div>{below}</figure>'
    )


def figures(charts: Sequence[Chart], wide: Sequence[str] = ()) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">{"".join(figure(c, wide=c["id"] in wide) for c in charts)}</div>'


def thumb(sheet: str, columns: int, index: int, name: str, *, other: bool = False) -> str:
    """A thumbnail out of a sheet of many; ``other`` marks one of another class."""
    x, y = index % columns, index // columns
    mark = " other" if other else ""
    return (
        f'<span class="thumb {sheet}{mark}" role="img" aria-label="{text(name)}" title="{text(name)}" '
        f'style="--cols:{columns};--x:{x};--y:{y}"></span>'
    )


def notes(remarks: Iterable[str]) -> str:
    """Remarks, a paragraph each."""
    return "".join(f'<p class="note">{text(remark)}.</p>' for remark in remarks)
