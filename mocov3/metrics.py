"""Numbers of a run: meters of the log line, the schema of ``metrics.jsonl``, effective statistics of features."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # torch takes seconds to import

JsonLine = dict[str, Any]
"""An object of JSON: a line of a file of lines, or what is printed."""

SCHEMA_VERSION = 1
QUALITY = "quality.jsonl"
"""Judgements without labels of a run, by epoch (``mocov3.pretraining.label_free_evaluation``)."""
GUARD = "guard.jsonl"
"""Judgements of a run's network against its start, by epoch (``mocov3.pretraining.against_start``)."""
_NOT_MEASURED = ("step", "epoch", "iteration", "loss", "task", "version")


@dataclass
class Meter:
    """A value and its running average, printed as ``Loss 9.87e+00 (9.99e+00)``."""

    name: str
    format: str
    value: float = 0.0
    total: float = 0.0
    count: int = 0

    def update(self, value: float, n: int = 1) -> None:
        """Record ``value`` as the average of ``n`` samples."""
        self.value = value
        self.total += value * n
        self.count += n

    @property
    def average(self) -> float:
        """Mean of all recorded values."""
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        return f"{self.name} {self.value:{self.format}} ({self.average:{self.format}})"


@dataclass
class Progress:
    """The reference's log line: ``Epoch: [0][ 10/312]`` or ``Test: [ 10/49]``, then the meters, tab-separated."""

    iterations: int
    meters: list[Meter] = field(default_factory=list)

    def line(self, epoch: int | None, iteration: int) -> str:
        """The line of one iteration; of a test where there is no epoch."""
        digits = len(str(self.iterations))
        head = "Test: " if epoch is None else f"Epoch: [{epoch}]"
        head += f"[{iteration:{digits}d}/{self.iterations}]"
        return "\t".join([head, *map(str, self.meters)])


@dataclass(frozen=True)
class MetricsLine:
    """One line of ``metrics.jsonl``. ``None`` where a quantity was not measured at this step."""

    step: int
    """Optimisation steps completed before this one; counts on over resumes."""
    epoch: int
    iteration: int
    loss: float
    """Mean over ranks of this step's loss."""
    loss_start: float
    loss_floor: float
    retrieval_accuracy: float
    """Share of queries, both directions, whose nearest key in the batch is their own."""
    lr: float
    momentum: float
    feature_std: float
    """Mean over dimensions of the standard deviation of the normalised queries, times √dim: 1 spread, 0 collapsed."""
    grad_norm_first: float
    """Euclidean norm of the gradient of the first trainable weight of the backbone."""
    grad_norm_last: float
    """The same of the backbone's last weight before the projector."""
    images_per_second: float
    data_wait: float
    """Share of the time since the last line spent waiting for images."""
    skipped: int
    """Steps so far whose loss or gradient was not finite and which changed nothing."""
    resumed: int
    """How often the run was resumed."""
    corrupt: int
    """Distinct unreadable images met so far."""
    effective_rank: float | None = None
    """Directions that the batch's queries use: exp of the entropy of their normalised singular values, 1 to dim."""
    knn: float | None = None
    """k-NN accuracy in %, at the end of an epoch of ``--knn-every``."""
    drift: float | None = None
    """Mean cosine distance of the batch's features to the starting network's, of ``--preserve``: 0 (none) to 2."""
    version: int = SCHEMA_VERSION

    def as_dict(self) -> JsonLine:
        """Name → value, for JSON."""
        return plain(asdict(self))


def plain(values: Mapping[str, object]) -> JsonLine:
    """The values with ``None`` for numbers that are not finite, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def measured(line: object) -> dict[str, float]:
    """Every number of a line of metrics under its name, for loggers; without its place and what was not measured.

    The loss is left out as well: loggers are given that of every step.

    Args:
        line: an instance of ``MetricsLine`` or of another dataclass of numbers.
    """
    values = {name: value for name, value in vars(line).items() if name not in _NOT_MEASURED}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def correct_at(
    scores: Float[Tensor, "batch classes"], target: Int[Tensor, "batch"], ks: Sequence[int]
) -> Int[Tensor, "ks"]:
    """How many rows have their target among the k highest scores, for every k: counts, to be summed over ranks.

    Exact where scores are equal: the class with the lower number comes first. A row whose target's score is NaN is
    never correct.
    """
    target_score = scores.gather(1, target[:, None].long())
    number = scores.new_ones(scores.shape[1]).cumsum(0) - 1
    before = (scores > target_score) | ((scores == target_score) & (number < target[:, None]))
    rank = before.sum(1) + (target_score != target_score).squeeze(1) * scores.shape[1]
    return (rank[:, None] < target.new_tensor(list(ks))).sum(0)
