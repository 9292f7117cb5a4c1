"""The page: sections 1 to 7 put together, with plotly.js packed into it. One file that asks no host for anything."""

import base64
import dataclasses
import gzip
import json
import math
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.resources import files
from string import Template

import numpy as np

from mocov3.config import PretrainConfig
from mocov3.config.recipes import RECIPES
from mocov3.errors import UserError
from mocov3.metrics import JsonLine
from mocov3.report import sections
from mocov3.report.charts import Chart
from mocov3.report.curves import BUCKETS, spikes
from mocov3.report.diagnosis import RULES, Diagnosis, diagnose
from mocov3.report.html_parts import figures, notes, table, text, tiles
from mocov3.report.panels import Panel
from mocov3.report.runs import Run
from mocov3.version import __version__

_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_NAMED = ("recipe", "output_dir", "data")  # told apart from the settings
_SECTIONS = ("Diagnosis", "Learning", "Stability", "Collapse", "What it sees", "What it learned", "The run")


@dataclasses.dataclass
class Shown:
    """A run, its diagnosis, and what was found by its checkpoint and images."""

    run: Run
    views: str = ""
    """Section 5 as HTML."""
    panel: Panel | None = None
    spectra: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)
    facts: JsonLine = dataclasses.field(default_factory=dict)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The diagnosis."""
        return diagnose(self.run)


def render(shown: Sequence[Shown]) -> str:
    """The page of one run or several.

    Raises:
        UserError: if plotly is not installed.
    """
    library, version = packed_plotly()
    runs = [s.run for s in shown]
    spectra = [(name if len(shown) == 1 else f"{s.run.name}, {name}", v) for s in shown for name, v in s.spectra]
    learning, stable, collapsed = sections.learning(runs), sections.stability(runs), sections.collapse(runs, spectra)
    for c in (*learning, *stable, *collapsed):
        if c["layout"]["xaxis"]["title"]["text"] == "step":
            c["steps"] = True
    charts: list[Chart] = [*learning, *stable, *collapsed, *(c for s in shown if s.panel for c in s.panel.charts)]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"
    parts = [
        "".join(_diagnosis(s, alone=len(shown) == 1) for s in shown),
        figures(learning),
        _stability(runs) + figures(stable, wide=["gradients"]),
        figures(collapsed, wide=["spectrum"] if len(collapsed) % 2 else []),
        "".join(_named(s, len(shown) > 1, s.views) for s in shown),
        "".join(_named(s, len(shown) > 1, (s.panel.html if s.panel else "") + notes(s.remarks)) for s in shown),
        _settings(shown),
    ]
    parts[0] = (
        f'<div class="cards">{parts[0]}</div>{"".join(_tiles(s) for s in shown) if len(shown) == 1 else ""}{_rules()}'
    )
    body = "".join(
        f'<section id="s{i}"><h2>{i}. {name}</h2>{part}</section>'
        for i, (name, part) in enumerate(zip(_SECTIONS, parts, strict=True), 1)
    )
    data = {
        "charts": {c["id"]: {k: c[k] for k in ("data", "layout", "steps", "map") if k in c} for c in charts},
        "sets": {f"r{i}": s.panel.set for i, s in enumerate(shown) if s.panel},
    }
    return Template(_asset("page.html")).substitute(
        policy=_POLICY,
        title=text(title),
        style=_asset("page.css") + "".join(s.panel.style for s in shown if s.panel),
        time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        links="".join(f'<a href="#s{i}">{name}</a>' for i, name in enumerate(_SECTIONS, 1)),
        body=body,
        twice_buckets=f"{2 * BUCKETS:,}",
        buckets=f"{BUCKETS:,}",
        plotly_version=text(version),
        data=_json(data),
        plotly=library,
        script=_asset("page.js"),
    )


@lru_cache
def packed_plotly() -> tuple[str, str]:
    """plotly.js as the Python package brings it, gzipped, in base64; and its version.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs, get_plotlyjs_version
    except ImportError:
        raise UserError(
            "the report draws its charts by plotly, which is not installed; pip install 'mocov3[report]'"
        ) from None
    packed = gzip.compress(get_plotlyjs().encode(), 9, mtime=0)
    return base64.b64encode(packed).decode(), str(get_plotlyjs_version())


def _asset(name: str) -> str:
    return files("mocov3.report").joinpath(name).read_text(encoding="utf-8")


def _finite(data: object) -> object:
    """``data`` with ``None`` for numbers that JSON does not have."""
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _json(data: object) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    written = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _named(s: Shown, several: bool, content: str) -> str:
    return f"<h3>{text(s.run.name)}</h3>{content}" if several else content


def _diagnosis(s: Shown, *, alone: bool) -> str:
    d = s.diagnosis
    points = "".join(
        f"<li>{text(f.reason)}{f' <span class=try>{text(f.advice)}</span>' if f.advice else ''}</li>"
        for f in d.findings
    )
    name = "" if alone else f"<h3>{text(s.run.name)}</h3>"
    word = "" if d.title.lower() == d.word else f'<span class="word">{text(d.word)}</span>'
    return (
        f'<div class="diagnosis {d.state}">{name}{word}'
        f"<p>{text(d.title)}</p><ul>{points}</ul>{'' if alone else _tiles(s)}</div>"
    )


def _rules() -> str:
    rows = table(RULES, ("diagnosis", "when"))
    below = "<p>The first that holds gives the headline.</p>"
    return f"<details><summary>How this was judged</summary>{rows}{below}</details>"


def _tiles(s: Shown) -> str:
    run, c = s.run, s.run.columns
    late = max(len(run) // 10, 1)
    mean = lambda name: float(np.nanmean(c[name][-late:])) if np.isfinite(c[name][-late:]).any() else math.nan  # noqa: E731
    way = sections.way_to_floor(run)[-1]
    start, floor = c["loss_start"][-1], c["loss_floor"][-1]
    items = [("Loss", f"{mean('loss'):.3f}", f"{way:.0f} % of the way from {start:.2f} to {floor:.2f}")]
    chance = f"chance {100 / run.config.batch_size:.2g} %" if run.config else ""
    items.append(("Own image found", f"{100 * mean('retrieval_accuracy'):.1f} %", chance))
    if len(run.knn):
        best = run.knn[np.argmax(run.knn[:, 2])]
        items.append(("k-NN", f"{run.knn[-1, 2]:.1f} %", f"best {best[2]:.1f} % after epoch {best[1]:.0f}"))
    judged = [q for q in run.quality if q.get("name") == "epoch"]
    if judged:
        base = {q.get("name"): q["retrieval"] for q in run.quality}
        items.append(
            (
                "Unseen images retrieved",
                f"{judged[-1]['retrieval']:.1f} %",
                f"start {base.get('start', math.nan):.1f}, pixels {base.get('pixels', math.nan):.1f}",
            )
        )
    count = {name: sections.highest(c[name]) for name in ("skipped", "corrupt", "resumed")}
    of = f" of {run.config.epochs}" if run.config else ""
    items += [
        ("Epochs", f"{run.epochs_done:.1f}{of}", f"{c['step'][-1] + 1:.0f} steps"),
        ("Speed", f"{mean('images_per_second'):.0f} img/s", f"{100 * mean('data_wait'):.0f} % waiting for images"),
        (
            "Faults",
            f"{count['skipped']:.0f} skipped",
            f"{count['corrupt']:.0f} unreadable images, {count['resumed']:.0f} resumes",
        ),
    ]
    return tiles(items)


def _stability(runs: Sequence[Run]) -> str:
    said = []
    for run in runs:
        count = {w: int(spikes(run.columns[f"grad_norm_{w}"]).sum()) for w in ("first", "last")}
        name = "" if len(runs) == 1 else f"{run.name}: "
        said.append(
            f"{name}{count['first']} spikes in the first layer, {count['last']} in the last, on {len(run)} lines"
        )
        if run.config is not None:
            said[-1] += _projection(run.config, sum(count.values()))
    return notes(said)


def _projection(config: PretrainConfig, spike_count: int) -> str:
    """The frozen patch projection explained, where it is about this network."""
    if not config.arch.startswith("vit"):
        return ""
    if config.arch.startswith("vit_conv"):
        return ". The convolutional stem is trained; it is the other cure for spikes that the paper names"
    if config.stop_grad_conv1:
        return (
            ". The patch projection is kept as initialised (--stop-grad-conv1), so the first layer here "
            "is the first one "
            "that is trained. The paper found spikes to begin in the projection, and that freezing a random one "
            "steadies training and costs nothing"
        )
    helps = "it is the first thing to try here" if spike_count else "worth knowing should spikes come"
    return (
        ". The patch projection is trained. In the paper spikes begin there and reach the last layer some "
        "dozens of steps "
        f"later; keeping the projection as initialised (--stop-grad-conv1) prevents most of them: "
        f"{helps}"
    )


def _settings(shown: Sequence[Shown]) -> str:
    parts = []
    configs = [s.run.config for s in shown]
    if len(shown) > 1 and all(configs):
        rows = []
        for f in dataclasses.fields(PretrainConfig):
            values = [getattr(c, f.name) for c in configs]
            if len({str(v) for v in values}) > 1:
                rows.append((_flag(f.name), *values))
        parts.append("<h4>What differs between the runs</h4>" + table(rows, ("setting", *(s.run.name for s in shown))))
    for s in shown:
        parts.append(_named(s, len(shown) > 1, _one_run(s)))
    return "".join(parts)


def _one_run(s: Shown) -> str:
    parts, config = [], s.run.config
    if config is not None:
        recipe = config.recipe or "defaults"
        base = {**PretrainConfig().__dict__, **(RECIPES[recipe].settings if recipe in RECIPES else {})}
        values = [(f, getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in _NAMED]
        differing = [(f, v) for f, v in values if v != base[f.name]]
        result = [(_flag(f.name), base[f.name], v) for f, v in differing if f.metadata["result"]]
        rest = [(_flag(f.name), base[f.name], v) for f, v in differing if not f.metadata["result"]]
        head = ("setting", f"recipe {recipe}", "this run")
        parts.append(
            f"<h4>What differs from the recipe {text(recipe)}</h4>"
            + (table(result, head) if result else notes(["nothing that changes results"]))
        )
        if rest:
            others = "Settings that do not change results"
            parts.append(f"<details><summary>{others}</summary>{table(rest, head)}</details>")
        everything = [(_flag(f.name), getattr(config, f.name)) for f in dataclasses.fields(config)]
        parts.append(f"<details><summary>All settings</summary>{table(everything)}</details>")
    facts = [("folder", s.run.folder), *([("data", config.data_title)] if config else []), *_facts(s.facts)]
    parts.append("<h4>Origin</h4>" + table(facts))
    if s.run.machines:
        parts.append("<h4>Machine and versions</h4>" + _machines(s.run.machines))
    else:
        parts.append(notes(["machine and versions: not recorded (a run of an older version)"]))
    return "".join(parts) + notes(s.run.remarks)


def _facts(facts: JsonLine) -> list[tuple[str, object]]:
    names = {
        "checkpoint": "checkpoint",
        "epochs": "epochs in it",
        "step": "steps in it",
        "seed": "seed",
        "run": "run",
        "pictures": "images",
        "data_digest": "digest of the images",
        "origin": "origin of the weights",
        "licence": "licence of the weights",
    }
    return [(title, facts[key]) for key, title in names.items() if facts.get(key) is not None]


def _machines(machines: Sequence[JsonLine]) -> str:
    """Starts, newest last; columns in the order in which they were written."""
    names = list(dict.fromkeys(k for m in machines for k in m))
    rows = [(name, *(m.get(name, "–") for m in machines[-6:])) for name in names]
    more = "" if len(machines) <= 6 else notes([f"the last 6 of {len(machines)} starts"])
    return table(rows, ("", *(f"start {i}" for i in range(max(len(machines) - 5, 1), len(machines) + 1)))) + more


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-") if name != "data" else name
