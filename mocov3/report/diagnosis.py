"""The diagnosis of a run, in words, from stated rules over its metrics. numpy alone; thresholds are held to real runs.

``tests/recorded/diagnoses.json`` has the metrics of runs made to learn, collapse, spike and starve
(``benchmarks/diagnoses.py``).
"""

import math
from dataclasses import dataclass, field

import numpy as np

from mocov3.config.archs import is_vit
from mocov3.report.curves import SPIKE, dips, smooth, spikes
from mocov3.report.runs import Run

LATE = 0.2
"""The last part of a run that is judged; at least five lines."""
FEW_LINES, ENOUGH_LINES = 10, 30
FEATURE_STD, RANK_SHARE, RANK_FALL = 0.3, 0.15, 0.3
PROGRESS, ABOVE_CHANCE = 0.05, 2.0
SPIKE_SHARE, SPIKE_COUNT, FELL_BACK, SKIPPED_SHARE = 0.03, 3, 0.15, 0.005
WAITING = 0.3

RULES = [
    ("too early", f"fewer than {FEW_LINES} lines of metrics, or the warm-up is not over and nothing is wrong"),
    (
        "collapsed",
        f"late in the run (its last fifth) the queries' spread is below {FEATURE_STD}; or their effective "
        f"rank is below {RANK_SHARE:.0%} of what the embedding allows and below {RANK_FALL:.0%} of what it was at the "
        f"start; or, on {ENOUGH_LINES} lines or more, after learning or after the warm-up, the loss is back at its "
        "start and own images are retrieved no more often than by chance",
    ),
    (
        "unstable",
        f"{SPIKE_COUNT} gradient spikes or more (a norm {SPIKE:.0f} times the medians before and after it), "
        f"{SPIKE_SHARE:.0%} of the lines at least; or {SKIPPED_SHARE:.1%} of the steps skipped; or, on {ENOUGH_LINES} "
        f"lines or more, the loss has fallen back by {FELL_BACK:.0%} of the way from start to floor",
    ),
    ("starved of data", f"late in the run more than {WAITING:.0%} of the time goes into waiting for images"),
    (
        "learning",
        f"the loss has come {PROGRESS:.0%} of the way from start to floor, and own images are retrieved "
        f"{ABOVE_CHANCE:.0f} times as often as by chance",
    ),
    ("not learning yet", "none of these"),
]
"""Diagnoses and their rules, in the order in which the first that holds gives the headline; others are listed too."""

_WORDS = {
    "early": "too early to tell",
    "collapsed": "collapsed",
    "unstable": "unstable",
    "starved": "starved of data",
    "learning": "learning",
    "stalled": "not learning yet",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    kind: str
    """``collapsed``, ``unstable``, ``starved``, ``learning``, ``stalled`` or ``early``."""
    reason: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis: the worst finding gives the headline."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The headline's kind."""
        return self.findings[0].kind

    @property
    def word(self) -> str:
        """The headline in a word or three."""
        return _WORDS[self.state]

    @property
    def title(self) -> str:
        """The headline, with what else holds."""
        others = [f.kind for f in self.findings[1:] if f.kind != self.state]
        if self.state == "collapsed":
            return "Collapsed: the features say little about an image"
        if self.state in ("unstable", "starved"):
            learning = "learning" in others
            what = "unstable" if self.state == "unstable" else "starved of data"
            if self.state == "unstable" and "starved" in others:
                what += " and starved of data"
            return f"Learning, but {what}" if learning else f"{what[0].upper()}{what[1:]}"
        return {"learning": "Learning", "early": "Too early to tell", "stalled": "Not learning yet"}[self.state]


@dataclass(frozen=True)
class _Facts:
    """Numbers the rules look at."""

    run: Run
    late: slice
    progress: float
    """Way from start to floor late in the run, 0–1."""
    best: float
    retrieval: float
    """Share of own images retrieved, late."""
    chance: float
    warm: bool
    """Whether the warm-up is over."""


def diagnose(run: Run) -> Diagnosis:
    """The diagnosis of a run."""
    facts = _facts(run)
    trouble = [f for rule in (_collapsed, _unstable, _starved) if (f := rule(facts)) is not None]
    learning = _learning(facts)
    if trouble and trouble[0].kind == "collapsed":
        return Diagnosis(trouble)
    if len(run) < FEW_LINES:
        return Diagnosis([_early(facts)])
    if learning is not None:
        return Diagnosis([*trouble, learning])
    if not facts.warm:
        return Diagnosis([*trouble, _early(facts)])
    return Diagnosis(
        [
            *trouble,
            Finding(
                "stalled",
                f"The loss has come {_percent(facts.progress)} of the way to its floor, and "
                f"{_percent(facts.retrieval)} of "
                f"queries retrieve their own image (chance {_percent(facts.chance)}).",
                "Give it time: the first epochs move little. If it stays so, try a higher --lr (or a lower one if the "
                "loss jumps), "
                "and look at the views below: they may hide what tells images apart.",
            ),
        ]
    )


def _facts(run: Run) -> _Facts:
    c, n = run.columns, len(run)
    late = slice(min(n - max(round(LATE * n), 5), n - 1) if n > 5 else 0, None)
    with np.errstate(invalid="ignore", divide="ignore"):
        way = (c["loss_start"] - c["loss"]) / (c["loss_start"] - c["loss_floor"])
    smoothed = smooth(way)
    config = run.config
    chance = 1 / config.batch_size if config is not None else float("nan")
    warm = config is None or run.epochs_done >= min(config.warmup_epochs + 1, config.epochs) - 1e-6
    best = float(np.nanmax(smoothed)) if np.isfinite(smoothed).any() else float("nan")
    return _Facts(run, late, _median(way[late]), best, _median(c["retrieval_accuracy"][late]), chance, warm)


def _collapsed(f: _Facts) -> Finding | None:
    c = f.run.columns
    if len(f.run) < 3:
        return None
    feature_std = _median(c["feature_std"][f.late])
    advice = _collapse_advice(f)
    if feature_std < FEATURE_STD:
        return Finding(
            "collapsed", f"The queries' spread is {feature_std:.2f} (1: even, 0: all images look the same).", advice
        )
    rank, first = _median(c["effective_rank"][f.late]), _median(c["effective_rank"][:3])
    config = f.run.config
    width = min(config.moco_dim, 2 * config.batch_size) if config is not None else float("nan")
    if rank < RANK_SHARE * width and rank < RANK_FALL * first:
        return Finding(
            "collapsed",
            f"The queries use {rank:.1f} of {width:.0f} directions (effective rank; "
            f"{first:.1f} at the "
            "start): dimensional collapse.",
            advice,
        )
    if math.isnan(f.chance) or len(f.run) < ENOUGH_LINES:
        return None
    lost = f.progress < 0.01 and f.retrieval < 1.5 * f.chance
    if lost and (f.best > PROGRESS or f.warm):
        before = f"after {_percent(f.best)}" if f.best > PROGRESS else "and has never left it"
        return Finding(
            "collapsed",
            f"The loss is at its start ({_percent(f.progress)} of the way, {before}) and "
            f"{_percent(f.retrieval)} of queries retrieve their own image (chance {_percent(f.chance)}): all keys "
            "are alike.",
            advice,
        )
    return None


def _collapse_advice(f: _Facts) -> str:
    config = f.run.config
    hints = []
    if config is not None:
        hints.append(f"a tenth of the learning rate (--lr {config.lr / 10:g})")
        if config.moco_m < 0.9:
            hints.append(f"a key encoder that moves slowly (--moco-m .99, not {config.moco_m:g})")
        if config.weight_decay * config.peak_lr > 0.01 and config.optimizer in ("adamw", "muon"):
            hints.append(f"a smaller weight decay (--wd .1, not {config.weight_decay:g})")
        if config.warmup_epochs < 1:
            hints.append("a warm-up (--warmup-epochs)")
    hints = hints or ["a lower --lr, a longer --warmup-epochs, --moco-m .99"]
    return f"Restart from an earlier checkpoint, or from scratch, with {', '.join(hints)}."


def _unstable(f: _Facts) -> Finding | None:
    c, n = f.run.columns, len(f.run)
    if n < FEW_LINES:
        return None
    reasons = []
    spiked = {where: int(spikes(c[f"grad_norm_{where}"]).sum()) for where in ("first", "last")}
    where, count = max(spiked.items(), key=lambda item: item[1])
    if count >= max(SPIKE_COUNT, SPIKE_SHARE * n):
        reasons.append(f"{count} of {n} lines have a spike in the {where} layer's gradient")
    steps = f.run.columns["step"]
    skipped, done = float(np.nan_to_num(c["skipped"]).max(initial=0)), float(steps[-1]) + 1
    if skipped >= max(2, SKIPPED_SHARE * done):
        reasons.append(f"{skipped:.0f} of {done:.0f} steps were skipped")
    if n >= ENOUGH_LINES and f.best - f.progress > FELL_BACK:
        reasons.append(
            f"the loss has fallen back from {_percent(f.best)} of the way to its floor to {_percent(f.progress)}"
        )
    if not reasons:
        return None
    if len(low := dips(f.run.knn[:, 2])):
        reasons.append(f"k-NN dipped {len(low)} time(s)")
    return Finding("unstable", f"{_sentence('; '.join(reasons))}.", _stability_advice(f))


def _stability_advice(f: _Facts) -> str:
    config = f.run.config
    hints = []
    if config is not None:
        if is_vit(config.arch) and not config.stop_grad_conv1 and not config.arch.startswith("vit_conv"):
            hints.append(
                "keep the patch projection as initialised (--stop-grad-conv1), the paper's cure for these spikes"
            )
        hints.append(f"a lower learning rate (--lr {config.lr / 2:g})")
        hints.append(f"a longer warm-up (--warmup-epochs {max(2 * config.warmup_epochs, 5)})")
        if not config.skip_spikes:
            hints.append("--skip-spikes 10 to leave out the worst steps")
    return f"Try {'; '.join(hints) or 'a lower --lr and a longer --warmup-epochs'}."


def _starved(f: _Facts) -> Finding | None:
    if len(f.run) < 3:
        return None
    waits = f.run.columns["data_wait"]
    half = waits[len(waits) // 2 :]
    wait = _median(half)
    if not wait > WAITING:
        return None
    config = f.run.config
    hints = ["mocov3 check says how fast images can be read"]
    if config is not None and config.views == "pillow":
        hints.insert(0, "--views fast")
    hints.insert(
        0, "more loader processes (-j), smaller copies of large images, a local disk, or --views-on device on a GPU"
    )
    return Finding(
        "starved",
        f"{_percent(wait)} of the time goes into waiting for images: the loader sets the pace, not the network.",
        f"Try {'; '.join(hints)}.",
    )


def _learning(f: _Facts) -> Finding | None:
    above = math.isnan(f.chance) or f.retrieval >= ABOVE_CHANCE * f.chance
    if not (f.progress >= PROGRESS and above):
        return None
    reason = (
        f"The loss has come {_percent(f.progress)} of the way from start to floor, and "
        f"{_percent(f.retrieval)} of queries "
        f"find their own image among the keys (chance {_percent(f.chance)})."
    )
    knn = f.run.knn
    if len(knn):
        reason += f" k-NN accuracy {knn[-1, 2]:.1f} % (best {knn[:, 2].max():.1f} %)."
    judged = [q for q in f.run.quality if q.get("name") == "epoch"]
    base = {q.get("name"): q["retrieval"] for q in f.run.quality}
    if judged and "start" in base:
        reason += f" Unseen images retrieved: {judged[-1]['retrieval']:.1f} % (at the start {base['start']:.1f} %)."
    advice = ""
    if judged and "start" in base and judged[-1]["retrieval"] <= base["start"]:
        advice = "The loss falls, but unseen images are retrieved no better than at the start: look at the views below."
    return Finding("learning", reason, advice)


def _early(f: _Facts) -> Finding:
    config = f.run.config
    warming = config is not None and not f.warm
    why = (
        f"the warm-up ends after {config.warmup_epochs} epochs" if warming and config else "a diagnosis needs ten lines"
    )
    return Finding(
        "early",
        f"{len(f.run)} lines of metrics, {f.run.epochs_done:.1f} epochs: {why}.",
        "Look again later: mocov3 report rebuilds this page at any time.",
    )


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _percent(share: float) -> str:
    if math.isnan(share):
        return "–"
    return f"{100 * share:.1f} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
