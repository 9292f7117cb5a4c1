"""Charts as data: what plotly.js draws, without colours of a theme (the page adds those).

A chart is a dict: ``id``, ``title``, ``about`` (how to read it), ``data`` and ``layout`` for plotly, ``table``
(the same
numbers to read). Texts that come from files are escaped by ``plain``, for plotly reads some HTML.
"""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from mocov3.errors import printable
from mocov3.report.curves import dips, smooth, spikes, thin
from mocov3.report.runs import Run

Chart = dict[str, Any]
Numbers = np.ndarray | Sequence[float]
_ROWS = 12  # of a chart's table


def plain(text: str) -> str:
    """``text`` for plotly's labels, shown as it is."""
    return html.escape(printable(text))


def numbers(values: Numbers, digits: int = 5) -> list[float | None]:
    """Floats for JSON, of so many significant digits; ``None`` where not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def line(
    x: Numbers, y: Numbers, name: str, colour: int, *, epochs: Numbers | None = None, unit: str = "", **more: object
) -> Chart:
    """A curve; hovering shows step, epoch and value."""
    where = "epoch %{customdata:.2f}, step %{x}" if epochs is not None else "%{x}"
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": numbers(x, 9),
        "y": numbers(y),
        "name": plain(name),
        "meta": {"colour": colour},
        "hovertemplate": f"%{{y}}{unit}<br>{where}<extra>{plain(name)}</extra>",
    }
    if epochs is not None:
        trace["customdata"] = numbers(epochs)
    return trace | more


def marks(x: Numbers, y: Numbers, name: str, colour: int, **more: Any) -> Chart:
    """Points."""
    return line(x, y, name, colour, mode="markers", **more)


class Level(NamedTuple):
    """A dashed line across the chart, with its name."""

    y: float
    text: str
    below: bool = False


class Table(TypedDict):
    """The same numbers to read."""

    head: list[str]
    rows: list[list[str]]


def chart(
    id: str,
    title: str,
    about: str,
    data: Sequence[Chart],
    *,
    x: str = "step",
    y: str = "",
    table: Table | None = None,
    levels: Sequence[Level] = (),
    height: int = 300,
    **layout: Any,
) -> Chart:
    """A chart; ``layout`` goes to plotly."""
    shapes, notes = list(layout.pop("shapes", [])), list(layout.pop("annotations", []))
    for at in (at for at in levels if math.isfinite(at.y)):
        log = layout.get("yaxis", {}).get("type") == "log"
        shapes.append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": at.y,
                "y1": at.y,
                "line": {"dash": "dash", "width": 1},
            }
        )
        notes.append(
            {
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": math.log10(at.y) if log else at.y,
                "yanchor": "top" if at.below else "bottom",
                "text": plain(at.text),
                "showarrow": False,
            }
        )
    for axis, text in (("xaxis", x), ("yaxis", y)):
        layout[axis] = {"title": {"text": text}, **layout.get(axis, {})}
    return {
        "id": id,
        "title": title,
        "about": about,
        "data": [d for d in data if d["x"] or d.get("visible")],
        "layout": {"height": height, "shapes": shapes, "annotations": notes, **layout},
        "table": table,
    }


def sampled(head: Sequence[str], columns: Sequence[np.ndarray]) -> Table:
    """A table of a few evenly spaced rows of ``columns``."""
    n = min((len(c) for c in columns), default=0)
    rows = np.unique(np.linspace(0, n - 1, min(n, _ROWS)).round().astype(int)) if n else np.empty(0, int)
    body = [[_cell(float(c[i])) for c in columns] for i in rows.tolist()]
    return {"head": list(head), "rows": body}


def _cell(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"


class Curves:
    """Charts over steps of one run or several, one colour a run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.alone = len(runs) == 1

    def of(self, name: str, label: str, *, scale: float = 1.0, smoothed: bool = False, colour: int = 0) -> list[Chart]:
        """Curves of a column; with ``smoothed`` the values are faint under their running mean."""
        traces = []
        for i, run in enumerate(self.runs):
            x, epochs, y = run.columns["step"], run.columns["epoch_done"], run.columns[name] * scale
            at, trace_colour = thin(x, y), i if not self.alone else colour
            title = label if self.alone else run.name
            smoothed = smoothed and len(at) > 10
            faint: dict[str, Any] = {"opacity": 0.35, "line": {"width": 1}} if smoothed else {}
            group: dict[str, Any] = {"legendgroup": f"{i}{label}"} if not self.alone else {}
            if smoothed and not self.alone:
                faint["showlegend"] = False
            traces.append(line(x[at], y[at], title, trace_colour, epochs=epochs[at], **faint, **group))
            if smoothed:
                # drawn on the thinned points' places, computed on all
                mean = smooth(y)
                few = thin(x, mean, 250)
                more = f"{label}, running mean" if self.alone else title
                traces.append(line(x[few], mean[few], more, trace_colour, epochs=epochs[few], **group))
        return traces

    def chart(
        self,
        id: str,
        title: str,
        about: str,
        name: str,
        *,
        y: str,
        scale: float = 1.0,
        smoothed: bool = False,
        **more: Any,
    ) -> Chart:
        """A chart of one column."""
        return chart(
            id,
            title,
            about,
            self.of(name, y, scale=scale, smoothed=smoothed),
            y=y,
            table=self.table(name, y, scale),
            **more,
        )

    def table(self, name: str, label: str, scale: float = 1.0) -> Table:
        """Some values of a column, of the first run where there are several."""
        run = self.runs[0]
        head = ["step", "epoch", label if self.alone else f"{label}, {printable(run.name)}"]
        return sampled(head, [run.columns["step"], run.columns["epoch_done"], run.columns[name] * scale])

    def knn(self) -> list[Chart]:
        """k-NN accuracies at the ends of epochs, and their dips."""
        traces = []
        for i, run in enumerate(self.runs):
            if len(run.knn):
                x, epochs, y = run.knn.T
                name = "k-NN" if self.alone else run.name
                traces.append(
                    line(x, y, name, i if not self.alone else 2, epochs=epochs, unit=" %", mode="lines+markers")
                )
                if len(low := dips(y)):
                    traces.append(
                        marks(
                            x[low],
                            y[low],
                            f"{name}: dips",
                            3,
                            epochs=epochs[low],
                            unit=" %",
                            marker={"symbol": "triangle-down", "size": 11},
                        )
                    )
        return traces

    def spiked(self, name: str, label: str, colour: int) -> list[Chart]:
        """Gradient norms, and where they are spikes."""
        traces = self.of(name, label, colour=colour)
        for run in self.runs:
            x, epochs, y = run.columns["step"], run.columns["epoch_done"], run.columns[name]
            high = np.flatnonzero(spikes(y))
            if len(high) > 300:  # the highest tell enough
                high = np.sort(high[np.argsort(y[high])[-300:]])
            title = f"{label}: spikes" if self.alone else f"{run.name}: spikes"
            traces.append(
                marks(x[high], y[high], title, 3, epochs=epochs[high], marker={"symbol": "triangle-up", "size": 9})
            )
        return traces
