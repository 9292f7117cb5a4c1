"""What is random on the device: erasing, mixing, stochastic depth. Each draw belongs to (seed, epoch, image).

Erasing and mixing are timm's, with the generators they draw from seeded; stochastic depth (Huang et al. 2016) reads
its draws from the batch instead of a generator.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath
from torch import Tensor, nn

from mocov3.data.device.sending import send
from mocov3.data.loading.supervised import key, seeded

_ERASE, _MIX, _DEPTH = 9, 10, 11  # streams of the seed


def erase(
    x: Float[Tensor, "batch channels height width"], indices: np.ndarray, *, probability: float, seed: int, epoch: int
) -> None:
    """Random erasing (Zhong et al. 2017) of normalised images in place, by noise, as DeiT's ``--remode pixel``.

    Args:
        x: images.
        indices: of the images, with repetitions.
        probability: of each image.
        seed: of the run.
        epoch: of the run.
    """
    if not probability:
        return
    # noise from the CPU's generator: the same on every device, to which it is sent at once
    erasing = RandomErasing(probability, mode="pixel", max_count=1, device="cpu")
    noises, erased = [], []
    noise = torch.full(x.shape[1:], torch.nan, dtype=x.dtype)
    for place, index in enumerate(indices.tolist()):
        with seeded(key(seed, _ERASE, epoch, index)):
            erasing(noise)
        if not noise.isnan().all():
            noises.append(noise)
            erased.append(place)
            noise = torch.full_like(noise, torch.nan)
    if erased:
        rows, new = send(np.array(erased), x.device), send(torch.stack(noises).numpy(), x.device)
        x[rows] = torch.where(new.isnan(), x[rows], new)


class Mixer:
    """Mixup and cutmix of a batch with itself reversed (Zhang et al. 2018, Yun et al. 2019), targets smoothed.

    Args:
        mixup: α of mixup.
        cutmix: α of cutmix.
        probability: share of batches mixed.
        switch_probability: share of cutmix where both are enabled.
        smoothing: of the targets.
        classes: number of them.
        seed: of the run.
    """

    def __init__(
        self,
        *,
        mixup: float,
        cutmix: float,
        probability: float,
        switch_probability: float,
        smoothing: float,
        classes: int,
        seed: int,
    ) -> None:
        self.seed = seed
        self.mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=probability,
            switch_prob=switch_probability,
            label_smoothing=smoothing,
            num_classes=classes,
        )

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"], *, epoch: int, index: int
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]:
        """Mixed images and soft targets; the draw is that of the batch's first image, ``index``."""
        with seeded(key(self.seed, _MIX, epoch, index)):
            return self.mixup(x, labels)


class Depth:
    """Stochastic depth whose choices are functions of (seed, epoch, image).

    Replaces every ``DropPath`` of timm in ``model``; call it with the images of a batch before its forward pass.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.seed = seed
        self.layers: list[_Layer] = []
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DropPath):
                    layer = _Layer(float(child.drop_prob or 0.0), child.scale_by_keep)
                    setattr(parent, name, layer)
                    self.layers.append(layer)

    def __call__(self, indices: np.ndarray, *, epoch: int, device: torch.device) -> None:
        """Draw for a batch."""
        if not self.layers:
            return
        rows = [
            np.random.Philox(key=[self.seed, _DEPTH], counter=[0, 0, index, epoch]).random_raw(len(self.layers))
            for index in indices.tolist()
        ]
        uniform = (np.stack(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        for layer, column in zip(self.layers, send(uniform.astype(np.float32), device).unbind(1), strict=True):
            layer.uniform = column


class _Layer(nn.Module):
    """A residual branch that is left out for the images whose number is not below the chance of keeping it."""

    def __init__(self, probability: float, scale: bool) -> None:
        super().__init__()
        self.keep, self.scale = 1.0 - probability, scale
        self.uniform: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep == 1.0:
            return x
        assert self.uniform is not None, "draws are missing: call Depth before the forward pass"
        mask = (self.uniform < self.keep).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x * (mask / self.keep if self.scale and self.keep > 0 else mask)
