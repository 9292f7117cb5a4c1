"""The contrastive loss of MoCo v3 (arXiv 2104.02057, eq. 1 and algorithm 1) and what its numbers mean; classifiers'.

Every row is compared with the keys of the whole batch, over all ranks; the positive of row i is key i. The loss
of one direction is 2τ times the cross-entropy, and both directions are added.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """What a network gave, in float32, or in float64 where the network computes in that."""
    return x if x.dtype == torch.float64 else x.float()


def logits(
    q: Float[Tensor, "batch dim"], k: Float[Tensor, "keys dim"], temperature: float
) -> Float[Tensor, "batch keys"]:
    """Cosine similarities of queries and keys divided by the temperature, in at least float32."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = at_least_float32(q), at_least_float32(k)
        return F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature


def contrastive_loss(
    scores: Float[Tensor, "batch keys"], target: Int[Tensor, "batch"], temperature: float
) -> Float[Tensor, ""]:
    """2τ · cross-entropy of one direction. ``target[i]`` is the column of row i's positive key."""
    return 2 * temperature * F.cross_entropy(scores, target)


def answers_loss(scores: Float[Tensor, "batch columns"], target: Int[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """Sum over images of a classifier's loss: cross-entropy of one class an image; of findings binary cross-entropy.

    Findings (1, 0, or −1 where it is not known) count 1/columns of an image each, those that are not known 0: so the
    sums of several ranks and batches add up to that of all, whatever is known where.
    """
    if target.ndim == 1:
        return F.cross_entropy(scores, target, reduction="sum")
    known = (target >= 0).to(scores.dtype)
    truth = target.clamp(min=0).to(scores.dtype)
    total = F.binary_cross_entropy_with_logits(scores, truth, weight=known, reduction="sum")
    return total / scores.shape[1]


def retrieved(scores: Float[Tensor, "batch keys"], target: Int[Tensor, "batch"]) -> Int[Tensor, ""]:
    """How many queries find their own image's other view before all other keys."""
    return (scores.argmax(1) == target).sum()


def loss_start(temperature: float, batch: int) -> float:
    """Expected first loss: all keys look alike, so each cross-entropy is ln N."""
    return 4 * temperature * math.log(batch)


def loss_floor(temperature: float, batch: int) -> float:
    """Loss when positives agree fully (cosine 1) and negatives are orthogonal (cosine 0)."""
    # ln(e^(1/τ) + N − 1) − 1/τ, written so that small τ does not overflow
    return 4 * temperature * math.log1p((batch - 1) * math.exp(-1 / temperature))
