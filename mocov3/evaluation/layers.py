"""Which of a network's numbers are an image's feature; and pixels, which need no network."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mocov3.errors import UserError
from mocov3.models.backbones import ResNet, TimmEncoder, places_of


class Pixels(nn.Module):
    """No network: the pixels themselves, averaged down to at most 32×32. The baseline of small images."""

    projector_name = "head"

    def __init__(self, image_size: int, channels: int = 3) -> None:
        super().__init__()
        self.side = min(image_size, 32)
        self.num_features = channels * self.side**2
        self.head: nn.Module = nn.Identity()

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Pixels as one row an image."""
        return nn.functional.adaptive_avg_pool2d(x, self.side).flatten(1)


def layer_of(network: Any, arch: str, layer: str) -> Callable[[Tensor], Tensor]:
    """What ``--layer`` asks for, as a call.

    Raises:
        UserError: if the network has no such layer.
    """
    if layer in ("", "projector"):
        features: Callable[[Tensor], Tensor] = network if layer else network.features
        return features
    if isinstance(network, Pixels):
        raise UserError(f"--layer {layer}: pixels have no layers")
    body = network.backbone if isinstance(network, TimmEncoder) else network
    if layer == "cls":
        if not int(getattr(body, "num_prefix_tokens", 0)):
            raise UserError(f"--layer cls: {arch} has no cls token; use mean")
        return lambda x: body.forward_features(x)[:, 0]

    def patches(x: Tensor) -> Tensor:
        return places_of(body, body.feature_map(x) if isinstance(body, ResNet) else body.forward_features(x))

    return patches if layer == "patches" else lambda x: patches(x).mean(1)
