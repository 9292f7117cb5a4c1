"""k-nearest-neighbour accuracy and nearest centroids of features."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

K, TEMPERATURE = 20, 0.07
_CHUNK = 1024


def knn_predict(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> Int[Tensor, "queries"]:
    """Classes by weighted vote of the k nearest by cosine, weights exp(similarity / temperature) (Wu et al. 2018)."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie between 1 and the bank's {len(bank)} pictures, not {k}")
    classes = int(bank_labels.max()) + 1
    bank = F.normalize(bank, dim=1)
    predicted = []
    for part in queries.split(_CHUNK):
        similarity, nearest = (F.normalize(part, dim=1) @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), classes, dtype=similarity.dtype, device=part.device)
        # weights relative to the nearest: the vote is the same, and small temperatures cannot overflow
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, bank_labels[nearest].long(), weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_accuracy(
    bank: Float[Tensor, "bank dim"],
    bank_labels: Int[Tensor, "bank"],
    queries: Float[Tensor, "queries dim"],
    labels: Int[Tensor, "queries"],
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy in % of ``knn_predict``; k is at most the size of the bank."""
    k = min(k, len(bank))
    predicted = knn_predict(bank, bank_labels, queries, k=k, temperature=temperature)
    return 100 * int((predicted == labels).sum()) / len(labels)


def centroid_predict(
    labelled: Float[Tensor, "labelled dim"],
    labels: Int[Tensor, "labelled"],
    queries: Float[Tensor, "queries dim"],
    *,
    centre: Float[Tensor, "dim"],
) -> Int[Tensor, "queries"]:
    """Classes by the nearest class mean, by cosine after ``centre`` is subtracted."""
    labelled = F.normalize(labelled - centre, dim=1)
    classes = int(labels.max()) + 1
    sums = torch.zeros(classes, labelled.shape[1], dtype=labelled.dtype).index_add_(0, labels.long(), labelled)
    return (F.normalize(queries - centre, dim=1) @ F.normalize(sums, dim=1).T).argmax(1)
