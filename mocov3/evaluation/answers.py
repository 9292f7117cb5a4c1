"""What labelled images say of a network's features: each is answered by its nearest others, none by its own group."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mocov3.errors import UserError
from mocov3.evaluation import measures
from mocov3.evaluation.intervals import interval_of, resamplings
from mocov3.evaluation.neighbours import TEMPERATURE, nearest_others, shares, vote
from mocov3.evaluation.paired import Paired
from mocov3.metrics import JsonLine

_DRAWS = 200


@dataclass(frozen=True)
class Answers:
    """Of one network."""

    truth: np.ndarray
    """(images,) classes, or (images, findings) 1, 0 or −1."""
    scores: np.ndarray
    """(images, classes or findings): shares of the vote."""
    groups: np.ndarray | None
    names: list[str]
    """Of classes or findings."""
    voted: np.ndarray
    """(images,): the class that is voted for; of findings empty."""

    @property
    def right(self) -> np.ndarray:
        """Whether each image's class is answered rightly."""
        right: np.ndarray = self.voted == self.truth
        return right

    def line(self, *, further: bool) -> JsonLine:
        """Accuracy, or of findings AUROC, in % with its 95 % interval; with ``further`` the other measures."""
        n = len(self.truth)
        line: JsonLine = {"labelled": n}
        if self.groups is not None:
            line["labelled_groups"] = len(np.unique(self.groups))
        if self.truth.ndim == 1:
            low, high = interval_of(self.right, self.groups)
            line |= {"knn": 100 * int(self.right.sum()) / n, "knn_low": low, "knn_high": high}
            if further:
                line["measures"] = measures.of_classes(self.scores, self.truth, self.groups, self.voted)
            return line
        found = measures.of_findings(self.scores, self.truth, self.names, self._resampled)
        if found["auroc"] is None:
            raise UserError("--labels: no finding has labelled images with it and without it to judge by")
        low, high = found.get("auroc_interval", (float("nan"), float("nan")))
        return line | {"auroc": found["auroc"], "auroc_low": low, "auroc_high": high, "measures": found}

    def against(self, first: "Answers") -> JsonLine | None:
        """What changed since another network; ``None`` where it has answered other images."""
        if len(first.truth) != len(self.truth):
            return None
        if self.truth.ndim == 1:
            pair = Paired.of(torch.from_numpy(first.right), torch.from_numpy(self.right), self.groups)
            return pair.as_dict()
        before, after = (100 * np.nanmean(measures.auroc(a.scores, a.truth)) for a in (first, self))
        drops = [100 * _drop(first, self, weights) for weights in resamplings(self._resampled, _DRAWS)]
        least, most = np.nanpercentile(drops, [5, 95]).tolist()
        return {"auroc_before": before, "auroc": after, "drop": before - after, "least": least, "most": most}

    @property
    def _resampled(self) -> np.ndarray:
        return np.arange(len(self.truth)) if self.groups is None else self.groups


def _drop(first: Answers, second: Answers, weights: np.ndarray) -> float:
    """Mean over findings that both tell."""
    before, after = (measures.auroc(a.scores, a.truth, weights) for a in (first, second))
    return float(np.nanmean(before - after)) if not np.isnan(before - after).all() else float("nan")


def answered(
    features: Float[Tensor, "images dim"],
    truth: np.ndarray,
    names: list[str],
    groups: np.ndarray | None,
    device: torch.device | None = None,
) -> Answers:
    """Every image answered by the vote of its nearest others (k 20, τ .07), its own group left out.

    ``device`` is where they are searched for.

    Raises:
        UserError: if all images are of one group.
    """
    labels = torch.as_tensor(truth, dtype=torch.long)
    found, k = nearest_others(features, groups, device=device)
    if labels.ndim == 2:
        return Answers(truth, shares(found, labels, k, TEMPERATURE).numpy(), groups, names, np.empty(0))
    voted = vote(found, labels, [k], [TEMPERATURE], classes=len(names))[k, TEMPERATURE]
    scores = shares(found, F.one_hot(labels, len(names)), k, TEMPERATURE)
    return Answers(truth, scores.numpy(), groups, names, voted.numpy())
