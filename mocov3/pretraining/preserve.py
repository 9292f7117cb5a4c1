"""``--preserve``: the query backbone is held near the network it started from, by its features of the first view.

Training on new images moves what a network made of old ones. The distance is the cosine distance between the features
that both networks make of the same view, averaged over the feature that is used (cls token, or what the network pools)
and the mean over patches. It costs one more forward pass of a backbone over one view, 9 passes instead of 8 (a backward
pass counts as two), and the last block's other tokens of that view.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mocov3.losses import at_least_float32
from mocov3.models import Encoder


class Preservation:
    """The starting network, and the weight of the distance to it. No module: nothing of it is trained or saved.

    Args:
        start: the backbone as the run began, on this rank's device.
        weight: of the mean distance beside the contrastive loss.
        by_batch: whether the batch norms of the backbone that is trained normalise by the batch.
    """

    def __init__(self, start: Encoder, weight: float, *, by_batch: bool = True) -> None:
        self.start, self.weight = start.requires_grad_(False).eval(), weight
        for module in start.modules():
            # normalised as the query backbone is, so that equal weights have no distance
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(by_batch)
        start.training = True  # what is compiled is what trains (``mocov3.models.compiled``)

    def distances(
        self,
        x: Float[Tensor, "images channels height width"],
        features: Float[Tensor, "images dim"],
        patches: Float[Tensor, "images dim"],
    ) -> Float[Tensor, "images"]:
        """Distance of every image's features to those of the start, from 0 (same direction) to 2.

        Args:
            x: the view.
            features: of the query backbone (``features_and_mean``), with gradient.
            patches: the mean of its patches' features, likewise.
        """
        encoder: Any = self.start
        with torch.no_grad():
            targets = encoder.features_and_mean(x)
        cosines = [
            F.cosine_similarity(at_least_float32(a), at_least_float32(b), dim=1)
            for a, b in zip((features, patches), targets, strict=True)
        ]
        return 1 - (cosines[0] + cosines[1]) / 2
