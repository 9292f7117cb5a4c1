"""Measures of the field beside top-1 accuracy, by scikit-learn: of one class an image, or of several findings an image.

AUROC, average precision, balanced accuracy, macro-F1 and the confusion table (``--measures``; findings need the first
two always). Scores and truth are of all ranks, gathered on the host, so the number of ranks does not show. Where images
are in groups, 95 % intervals come from resampling whole groups.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from mocov3.errors import UserError, printable
from mocov3.evaluation.intervals import resamplings
from mocov3.metrics import JsonLine

UNKNOWN = -1
"""In a table of findings: not known."""
_DRAWS = 200
_MOST_CLASSES = 20  # whose AUROC is resampled: scikit-learn takes milliseconds for each
_MOST_SHOWN = 20  # classes of a confusion table that is printed

Weights = np.ndarray | None


def require(why: str) -> None:
    """Refuse where scikit-learn is not installed.

    Raises:
        UserError: saying how to install it, after ``why`` it is needed.
    """
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) else f" (here it fails: {error})"
        raise UserError(f"{why} needs scikit-learn: pip install 'mocov3[measures]'{reason}") from None


def of_classes(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, answers: np.ndarray | None = None
) -> JsonLine:
    """Measures of one class an image.

    Args:
        scores: (images, classes), the higher the likelier.
        labels: (images,), int.
        groups: (images,), int.
        answers: (images,), int; those of the highest score unless given.

    Returns:
        In %: ``auroc`` and ``average_precision`` (one class against the rest, mean over classes that some but not all
        images have; of two classes those of the second), ``accuracy``, ``balanced_accuracy`` (mean recall over classes
        that have images), ``macro_f1`` (mean over classes that images or answers have); each with ``…_interval`` where
        there are groups. ``confusion``: counts, a row a true class, a column an answer.
    """
    from sklearn.metrics import confusion_matrix, f1_score

    count, answers = scores.shape[1], scores.argmax(1) if answers is None else answers
    truth = (labels[:, None] == np.arange(count)).astype(np.int8)
    judged = slice(1, 2) if count == 2 else slice(0, count)

    def balanced(weights: Weights) -> float:
        table = confusion_matrix(labels, answers, labels=np.arange(count), sample_weight=weights)
        present = table.sum(1) > 0
        return float((table.diagonal()[present] / table.sum(1)[present]).mean())

    def macro_f1(weights: Weights) -> float:
        return float(f1_score(labels, answers, average="macro", zero_division=0, sample_weight=weights))

    def over_classes(measure: Callable[..., np.ndarray]) -> Callable[[Weights], float]:
        return lambda weights: _mean(measure(scores[:, judged], truth[:, judged], weights))

    def accuracy(weights: Weights) -> float:
        return float(np.average(answers == labels, weights=weights))

    whole: dict[str, Callable[[Weights], float]] = {
        "accuracy": accuracy,
        "balanced_accuracy": balanced,
        "macro_f1": macro_f1,
    }
    ranking = {"auroc": over_classes(auroc), "average_precision": over_classes(average_precision)}
    found = {name: measure(None) for name, measure in {**ranking, **whole}.items()}
    resampled = {**ranking, **whole} if count <= _MOST_CLASSES else whole
    table = confusion_matrix(labels, answers, labels=np.arange(count)).tolist()
    return {**_in_percent(found, _intervals(resampled, groups)), "confusion": table}


def of_findings(
    scores: np.ndarray, truth: np.ndarray, names: Sequence[str], groups: np.ndarray | None = None
) -> JsonLine:
    """Measures of several findings an image: what is not known is left out, finding by finding.

    Args:
        scores: (images, findings), the higher the likelier.
        truth: (images, findings), 1, 0, or ``UNKNOWN``.
        names: of the findings.
        groups: (images,), int.

    Returns:
        In %: ``auroc`` and ``average_precision``, the means over findings that some but not all images have, each with
        ``…_interval`` where there are groups; and ``findings``: name → its own two (``None`` where it has none), how
        many images have it (``positive``), and of how many it is known (``known``).
    """
    measures = {"auroc": auroc, "average_precision": average_precision}
    single = {name: measure(scores, truth, None) for name, measure in measures.items()}
    means = {name: _mean(values) for name, values in single.items()}

    def mean_of(measure: Callable[..., np.ndarray]) -> Callable[[Weights], float]:
        return lambda weights: _mean(measure(scores, truth, weights))

    resampled = {name: mean_of(measure) for name, measure in measures.items()}
    intervals = _intervals(resampled, groups if len(names) <= _MOST_CLASSES else None)
    findings = {
        finding: {
            **{name: None if np.isnan(values[i]) else 100 * float(values[i]) for name, values in single.items()},
            "positive": int((truth[:, i] == 1).sum()),
            "known": int((truth[:, i] != UNKNOWN).sum()),
        }
        for i, finding in enumerate(names)
    }
    return {**_in_percent(means, intervals), "findings": findings}


def auroc(scores: np.ndarray, truth: np.ndarray, weights: Weights = None) -> np.ndarray:
    """Area under the ROC curve of each column, 0 to 1; NaN where a column is all of one kind."""
    from sklearn.metrics import auc, roc_curve

    def area(truth: np.ndarray, scores: np.ndarray, sample_weight: Weights) -> float:
        # what roc_auc_score does, without its checks, which take as long again
        false, true, _ = roc_curve(truth, scores, sample_weight=sample_weight)
        return float(auc(false, true))

    return _by_column(area, scores, truth, weights)


def average_precision(scores: np.ndarray, truth: np.ndarray, weights: Weights = None) -> np.ndarray:
    """Average precision of each column, 0 to 1; NaN where a column is all of one kind."""
    from sklearn.metrics import average_precision_score

    return _by_column(average_precision_score, scores, truth, weights)


def _by_column(measure: Callable[..., float], scores: np.ndarray, truth: np.ndarray, weights: Weights) -> np.ndarray:
    values = np.full(truth.shape[1], np.nan)
    for i in range(truth.shape[1]):
        rows = truth[:, i] != UNKNOWN if weights is None else (truth[:, i] != UNKNOWN) & (weights > 0)
        known = truth[rows, i]
        if len(known) and known.min() < known.max():
            values[i] = measure(known, scores[rows, i], sample_weight=None if weights is None else weights[rows])
    return values


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _intervals(
    measures: dict[str, Callable[[Weights], float]], groups: np.ndarray | None
) -> dict[str, tuple[float, float]]:
    if groups is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that a resampling lacks
        draws = [[measure(weights) for measure in measures.values()] for weights in resamplings(groups, _DRAWS)]
    low, high = np.nanpercentile(np.array(draws), [2.5, 97.5], axis=0).tolist()
    return {name: (low[i], high[i]) for i, name in enumerate(measures)}


def _in_percent(values: dict[str, float], intervals: dict[str, tuple[float, float]]) -> JsonLine:
    line: JsonLine = {}
    for name, value in values.items():
        line[name] = None if np.isnan(value) else 100 * value
        if name in intervals:
            line[f"{name}_interval"] = [100 * bound for bound in intervals[name]]
    return line


_TITLES = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
}


def described(measures: JsonLine, classes: Sequence[str]) -> list[str]:
    """The measures for people, a line each; the confusion table where it is small."""
    lines = []
    for name, title in _TITLES.items():
        if name in measures:
            low_high = measures.get(f"{name}_interval")
            more = f"  (95 % {low_high[0]:.1f}–{low_high[1]:.1f}, by groups)" if low_high else ""
            lines.append(f"{title:<18} {_shown(measures[name])}{more}")
    if findings := measures.get("findings"):
        width = min(max(len(printable(name)) for name in findings), 30)
        lines.append(f"  {'finding':<{width}}   AUROC      AP  positive    known")
        for name, one in findings.items():
            numbers = f"{_shown(one['auroc'])} {_shown(one['average_precision'])}"
            lines.append(f"  {printable(name)[:width]:<{width}} {numbers} {one['positive']:>9} {one['known']:>8}")
    if "confusion" in measures and len(classes) <= _MOST_SHOWN:
        lines += _confusion(measures["confusion"], classes)
    return lines


def _shown(value: float | None) -> str:
    return "      –" if value is None else f"{value:7.2f}"


def _confusion(table: list[list[int]], classes: Sequence[str]) -> list[str]:
    width = max(len(str(max(map(max, table)))), len(str(len(classes)))) + 1
    lines = ["confusion: a row a true class, a column an answer"]
    for i, row in enumerate(table):
        lines.append("".join(f"{n:>{width}}" for n in row) + f"  {i} {printable(classes[i])}")
    return lines
