"""How good features are, judged without labels: measures from the literature, as functions of features alone.

Features are rows of float tensors; everything is computed in float64 on the CPU.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-7
_FIRST_RANK, _LAST_RANK = 3, 100
"""Eigenvalues that α-ReQ fits: the first ones follow no power law, the last ones are noise."""
_LEAST_TREE = 64
"""Points below which trees say nothing of a dimension."""


def rankme(features: Float[Tensor, "images dim"]) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, eq. 3).

    From 1 (all features on a line) to min(images, dim).
    """
    return _effective_rank(torch.linalg.svdvals(_double(features)))


def rank_of_gram(gram: Float[Tensor, "dim dim"]) -> float:
    """``rankme`` of features from xᵀx (any multiple of it), which can be summed over ranks."""
    return _effective_rank(torch.linalg.eigvalsh(_double(gram)).clamp(min=0).sqrt())


def alpha_req(features: Float[Tensor, "images dim"]) -> float:
    """Exponent α of the decay λ_j ∝ j^−α of the covariance's eigenvalues (Agrawal et al. 2022).

    By least squares over ranks 3–100 in double logarithms, weights 1/j, so that every octave counts alike. About 1 is
    what the authors found best; larger means few directions carry everything. NaN where there are too few directions.
    """
    centred = _double(features) - _double(features).mean(0)
    values = torch.linalg.svdvals(centred) ** 2
    values = values[values > 1e-12 * values[:1].clamp(min=1e-300)][_FIRST_RANK - 1 : _LAST_RANK]
    if len(values) < 3:
        return float("nan")
    rank = torch.arange(_FIRST_RANK, _FIRST_RANK + len(values), dtype=torch.float64)
    x, y, w = rank.log(), values.log(), 1 / rank
    x, y = x - (w * x).sum() / w.sum(), y - (w * y).sum() / w.sum()
    return float(-(w * x * y).sum() / (w * x * x).sum())


def lidar(views: Float[Tensor, "images views dim"], delta: float = 1e-4) -> float:
    """Effective rank of linear discriminant analysis with every image as a class of its views (Thilak et al. 2023).

    Σ_b between images, Σ_w within plus δ·I; the entropy is of the eigenvalues of Σ_w^−½ Σ_b Σ_w^−½. From 1 to
    min(images − 1, dim).
    """
    x = _double(views)
    means = x.mean(1)
    between = means - means.mean(0)
    within = (x - means[:, None]).flatten(0, 1)
    covariance = within.T @ within / len(within) + delta * torch.eye(x.shape[2], dtype=torch.float64)
    # whitening by the Cholesky factor: the eigenvalues are those of the symmetric form
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # features so large that δ is lost beside them
        values, vectors = torch.linalg.eigh(covariance)
        whitened = (between @ vectors / values.clamp(min=delta).sqrt()).T
    else:
        whitened = torch.linalg.solve_triangular(factor, between.T, upper=False)
    return _effective_rank(torch.linalg.svdvals(whitened) ** 2)


def alignment(first: Float[Tensor, "images dim"], second: Float[Tensor, "images dim"]) -> float:
    """Mean squared distance of the normalised features of two views of an image (Wang & Isola 2020); 0 best, ≤ 4."""
    return float((_unit(first) - _unit(second)).square().sum(1).mean())


def uniformity(features: Float[Tensor, "images dim"]) -> float:
    """log of the mean of exp(−2·squared distance) over pairs of normalised features (Wang & Isola 2020).

    0 when all are the same, towards −4 when spread over the sphere.
    """
    x = _unit(features)
    n = len(x)
    total = torch.zeros((), dtype=torch.float64)
    for part in x.split(1024):
        total += (2 - 2 * part @ x.T).clamp(min=0).mul(-2).exp().sum()
    return float(((total - n) / max(n * (n - 1), 1)).log())


def tree_dimension(features: Float[Tensor, "images dim"], seed: int = 0) -> float:
    """Intrinsic dimension by the growth of minimum spanning trees (IdEst, Mordacq et al. 2026, arXiv 2606.03338).

    The length of the tree of n points of a d-dimensional set grows like n^((d−1)/d); the exponent is the slope of
    log length over log n, by least squares over nested draws of an eighth to all of the images. The authors found
    better linear probes where it is smaller. Infinite where trees grow as fast as the images' number, NaN below 64
    images.
    """
    x = _double(features).numpy()
    if len(x) < _LEAST_TREE:
        return float("nan")
    x = x[np.random.Generator(np.random.PCG64(seed)).permutation(len(x))]
    squares = (x * x).sum(1)
    squared_distances = squares + squares[:, None] - 2 * (x @ x.T)
    sizes = np.unique(np.geomspace(len(x) / 8, len(x), 8).astype(int))
    lengths = [_tree_length(squared_distances[:n, :n]) for n in sizes]
    if min(lengths) <= 0:
        return 0.0  # all the same
    slope = float(np.polyfit(np.log(sizes), np.log(lengths), 1)[0])
    return 1 / (1 - slope) if slope < 1 else float("inf")


def _tree_length(squared_distances: np.ndarray) -> float:
    """Length of the minimum spanning tree, by Prim's algorithm.

    scipy's is for sparse graphs: it sorts all n² edges, which takes thirty times as long, and drops those of length 0.
    """
    left, at, total = np.arange(1, len(squared_distances)), 0, 0.0
    nearest = np.full(len(left), np.inf)
    while len(left):
        nearest = np.minimum(nearest, squared_distances[at, left])
        best = int(nearest.argmin())
        at, total = left[best], total + max(float(nearest[best]), 0.0) ** 0.5
        left[best], nearest[best] = left[-1], nearest[-1]
        left, nearest = left[:-1], nearest[:-1]
    return total


def retrieval(
    queries: Float[Tensor, "images dim"], keys: Float[Tensor, "images dim"], groups: np.ndarray | None = None
) -> float:
    """Share in % of images whose other view is the nearest of all keys by cosine; ties count as missed.

    Other images of an image's own of the ``groups`` are no keys to it.
    """
    q, k = _unit(queries), _unit(keys)
    of = torch.arange(len(q)) if groups is None else torch.as_tensor(groups, dtype=torch.long)
    hits = 0
    for start in range(0, len(q), 1024):
        scores = q[start : start + 1024] @ k.T
        rows = torch.arange(len(scores))
        positive = scores[rows, start + rows].clone()
        scores.masked_fill_(of[start : start + 1024, None] == of, -torch.inf)
        hits += int((positive > scores.max(1).values).sum())
    return 100 * hits / len(q)


def _effective_rank(values: Tensor) -> float:
    p = values / values.sum().clamp(min=1e-300) + _EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_double(x), dim=1)
