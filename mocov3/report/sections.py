"""Sections 2 to 4 of the page: which charts there are, and how each is to be read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mocov3.report.charts import Chart, Curves, Level, chart, line, sampled
from mocov3.report.curves import smooth, thin
from mocov3.report.runs import Run


def learning(runs: Sequence[Run]) -> list[Chart]:
    """Section 2: does it learn, and what does it cost."""
    curves = Curves(runs)
    charts = [_loss(runs, curves)]
    charts.append(
        curves.chart(
            "retrieval",
            "Own view retrieved",
            "Share of queries whose nearest key of the whole batch is their own image's other view. Chance is one in "
            "the batch size. It rises while the loss falls, and can be compared between temperatures.",
            "retrieval_accuracy",
            y="found, %",
            scale=100,
            smoothed=True,
            yaxis={"rangemode": "tozero"},
        )
    )
    charts += _knn(runs, curves)
    charts += _quality(runs)
    charts += [
        curves.chart("lr", "Learning rate", "Linear warm-up, then a half cosine to 0.", "lr", y="learning rate"),
        _momentum(runs),
        curves.chart(
            "speed",
            "Images a second",
            "Over all ranks; a fall that lasts is worth a look at the machine.",
            "images_per_second",
            y="images a second",
            smoothed=True,
            yaxis={"rangemode": "tozero"},
        ),
        curves.chart(
            "wait",
            "Waiting for images",
            "Share of the time in which the network had nothing to do. Below a tenth is fine; above three tenths the "
            "loader, not the network, sets the pace.",
            "data_wait",
            y="waiting, %",
            scale=100,
            smoothed=True,
            yaxis={"rangemode": "tozero", "range": [0, 100]},
            levels=[Level(30, "starved above 30 %")],
        ),
    ]
    return charts + _faults(runs, curves)


def _knn(runs: Sequence[Run], curves: Curves) -> list[Chart]:
    first = next((run for run in runs if len(run.knn)), None)
    if first is None:
        return []
    return [
        chart(
            "knn",
            "k-NN accuracy",
            "Labelled images judged by their nearest training images (k 20), on the backbone's features: the "
            "plainest test of what has been learned. Marked dips recover later; see the gradients below.",
            curves.knn(),
            y="k-NN, %",
            table=sampled(["step", "epoch", "k-NN, %"], list(first.knn.T)),
        )
    ]


def _loss(runs: Sequence[Run], curves: Curves) -> Chart:
    if not curves.alone:
        shares = [_share(run, i) for i, run in enumerate(runs)]
        return chart(
            "loss",
            "Loss, from start (0 %) to floor (100 %)",
            "Runs of different batch sizes and temperatures have different losses; their way from start to floor can "
            "be compared roughly. No run reaches the floor: other images are not unrelated.",
            shares,
            y="way to the floor, %",
        )
    run = runs[0]
    start, floor = _levels(run)
    return chart(
        "loss",
        "Loss between start and floor",
        "It starts near 4τ·ln N, where all keys look alike, and cannot fall below the floor, where each "
        "image is found "
        "and all others are unrelated. Where it settles depends on batch and temperature: judge it between the two "
        "lines only.",
        curves.of("loss", "loss", smoothed=True),
        y="loss",
        table=curves.table("loss", "loss"),
        levels=[Level(start, f"start {start:.2f}"), Level(floor, f"floor {floor:.2f}", below=True)],
        yaxis={"range": _range(run.columns["loss"], start, floor)},
        shapes=_resumes(run),
    )


def highest(values: np.ndarray) -> float:
    """The largest count of a column, 0 where there is none."""
    return float(np.nan_to_num(values).max(initial=0))


def _levels(run: Run) -> tuple[float, float]:
    return float(run.columns["loss_start"][-1]), float(run.columns["loss_floor"][-1])


def _range(loss: np.ndarray, start: float, floor: float) -> list[float] | None:
    finite = [*loss[np.isfinite(loss)].tolist(), start, floor]
    if not finite or not np.isfinite(finite).all():
        return None
    high = min(max(finite), start + 1.0 * (start - floor))  # a first value far off would flatten all others
    room = 0.06 * (high - min(finite)) or 1.0
    return [min(finite) - room, high + room]


def _share(run: Run, colour: int) -> Chart:
    way = way_to_floor(run)
    at = thin(run.columns["step"], way)
    return line(run.columns["step"][at], way[at], run.name, colour, epochs=run.columns["epoch_done"][at], unit=" %")


def way_to_floor(run: Run) -> np.ndarray:
    """The loss as its way from start to floor, in %, smoothed."""
    c = run.columns
    with np.errstate(invalid="ignore", divide="ignore"):
        return smooth(100 * (c["loss_start"] - c["loss"]) / (c["loss_start"] - c["loss_floor"]))


def _resumes(run: Run) -> list[dict[str, object]]:
    """A dotted line where a run was resumed."""
    count = run.columns["resumed"]
    at = run.columns["step"][np.flatnonzero(np.diff(count) > 0) + 1]
    return [
        {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot", "width": 1}}
        for x in at.tolist()[:200]
    ]


def _momentum(runs: Sequence[Run]) -> Chart:
    return Curves(runs).chart(
        "momentum",
        "Momentum of the key encoder",
        "How much of the old key encoder each step keeps; with --moco-m-cos it rises to 1, so that keys come to rest.",
        "momentum",
        y="momentum",
    )


def _quality(runs: Sequence[Run]) -> list[Chart]:
    charts = []
    names = (
        (
            "found",
            "retrieval",
            "Quality without labels: images retrieved, %",
            "Unseen images retrieved among all others from views of kinds that were never trained on. The higher "
            "the better; it goes along with k-NN best of all measures that need no labels.",
        ),
        (
            "rankme",
            "rankme",
            "Quality without labels: effective rank (RankMe)",
            "How many directions the features of unseen images use. A fall while the share found falls too is a "
            "warning.",
        ),
    )
    for id, key, title, about in names:
        data, levels = [], []
        for i, run in enumerate(runs):
            lines = [q for q in run.quality if q.get("name") == "epoch"]
            if lines:
                x, y = [q["epoch"] for q in lines], [float(q.get(key, np.nan)) for q in lines]
                data.append(line(x, y, title if len(runs) == 1 else run.name, i, mode="lines+markers"))
            if len(runs) == 1 and key == "retrieval":
                levels = [Level(q[key], q["name"]) for q in run.quality if q.get("name") in ("start", "pixels")]
        if data:
            table = sampled(["epoch", key], [np.array(data[0]["x"], float), np.array(data[0]["y"], float)])
            charts.append(chart(id, title, about, data, x="epoch", levels=levels, table=table))
    return charts


def _faults(runs: Sequence[Run], curves: Curves) -> list[Chart]:
    data = []
    for name, label, colour in (
        ("skipped", "skipped steps", 3),
        ("corrupt", "unreadable images", 4),
        ("resumed", "resumes", 0),
    ):
        if any(highest(run.columns[name]) > 0 for run in runs):
            traces = curves.of(name, label, colour=colour)
            for trace, run in zip(traces, runs, strict=True):
                trace["line"] = {"shape": "hv"}
                trace["name"] = trace["name"] if curves.alone else f"{trace['name']}: {label}"
                trace["hovertemplate"] = "%{y}<br>step %{x}<extra></extra>"
                if highest(run.columns[name]) > 0:
                    data.append(trace)
    if not data:
        return []
    about = (
        "Counts so far. A skipped step had a loss or gradient that was not finite, or a spike, and "
        "changed nothing; "
        "an unreadable image was replaced by another."
    )
    return [chart("faults", "Skips, resumes, unreadable images", about, data, y="count")]


def stability(runs: Sequence[Run]) -> list[Chart]:
    """Section 3: gradients of the first and last layer, with k-NN below on the same steps."""
    curves = Curves(runs)
    first = curves.spiked("grad_norm_first", "first layer", 0)
    last = [{**t, "legendgroup": t["name"]} for t in curves.of("grad_norm_last", "last layer", colour=1)]
    about = (
        "Norms of the gradient, logarithmic. In Vision Transformers spikes begin in the first layer and reach the last "
        "some dozens of steps later; k-NN dips and recovers (arXiv 2104.02057, fig. 4). A triangle marks a norm over "
        "three times the medians before and after it."
    )
    if not curves.alone:
        return [
            chart("first", "Gradient norm, first layer", about, first, y="norm", yaxis={"type": "log"}),
            chart(
                "last",
                "Gradient norm, last layer",
                "The same of the backbone's last layer.",
                last,
                y="norm",
                yaxis={"type": "log"},
            ),
        ]
    run = runs[0]
    layout: dict[str, Any]
    data, layout, height = first + last, {"yaxis": {"type": "log", "title": {"text": "gradient norm"}}}, 340
    if len(run.knn) > 1:
        below = [{**t, "yaxis": "y2"} for t in curves.knn()]
        layout = {
            "yaxis": {"type": "log", "title": {"text": "gradient norm"}, "domain": [0.42, 1]},
            "yaxis2": {"title": {"text": "k-NN, %"}, "domain": [0, 0.32], "anchor": "x"},
            "xaxis": {"anchor": "y2"},
        }
        data, height = data + below, 480
    c = run.columns
    table = sampled(["step", "first layer", "last layer"], [c["step"], c["grad_norm_first"], c["grad_norm_last"]])
    return [
        chart("gradients", "Gradients of the first and last layer", about, data, table=table, height=height, **layout)
    ]


def collapse(runs: Sequence[Run], spectra: Sequence[tuple[str, np.ndarray]]) -> list[Chart]:
    """Section 4: whether features are alike or use few directions.

    Args:
        runs: the runs.
        spectra: (name, variances of the principal components) of networks.
    """
    curves = Curves(runs)
    charts = [
        curves.chart(
            "feature_std",
            "Spread of the queries",
            "Standard deviation of the normalised queries over the batch, times √dim: 1 when they are spread "
            "evenly, 0 when "
            "all are the same (collapsed).",
            "feature_std",
            y="spread",
            yaxis={"range": [0, 1.1]},
            levels=[Level(1, "even", below=True)],
        )
    ]
    if any(np.isfinite(run.columns["effective_rank"]).any() for run in runs):
        charts.append(
            curves.chart(
                "rank",
                "Effective rank of the queries",
                "How many directions a batch's queries use, by the entropy of their singular values (Garrido et al. "
                "2023): from 1, all on a line, to the width of the embedding, or the number of queries where that is "
                "smaller.",
                "effective_rank",
                y="effective rank",
                yaxis={"rangemode": "tozero"},
            )
        )
    if any(np.isfinite(run.columns["drift"]).any() for run in runs):
        charts.append(
            curves.chart(
                "drift",
                "Distance to the starting network",
                "Mean cosine distance of the batch's features to those of the network that the run started from "
                "(--preserve): 0 where nothing has moved, 1 where they have nothing in common.",
                "drift",
                y="cosine distance",
                yaxis={"rangemode": "tozero"},
            )
        )
    return charts + _spectrum(spectra)


def _spectrum(spectra: Sequence[tuple[str, np.ndarray]]) -> list[Chart]:
    if not spectra:
        return []
    data = []
    for i, (name, v) in enumerate(spectra):
        shown = np.where(v > 1e-8 * v[:1], v, np.nan)  # the rest is rounding
        data.append(line(np.arange(1, len(v) + 1), shown, name, i))
    for trace in data:
        trace["hovertemplate"] = f"component %{{x}}: %{{y:.3~%}} of the variance<extra>{trace['name']}</extra>"
    return [
        chart(
            "spectrum",
            "Spectrum of the features",
            "Share of the variance of each principal component of the backbone's features, largest first. A "
            "cliff means "
            "that few directions carry everything (dimensional collapse).",
            data,
            x="component",
            y="share of variance",
            xaxis={"type": "log"},
            yaxis={"type": "log"},
            table=sampled(["component", "share of variance"], [np.arange(1, len(spectra[-1][1]) + 1), spectra[-1][1]]),
        )
    ]
