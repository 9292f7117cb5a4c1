"""The Vision Transformer of MoCo v3 on timm's blocks (arXiv 2104.02057, §4.1–4.2 and appendix).

What differs from timm's own: a fixed 2-D sine-cosine position table, 12 heads at width 384, Xavier-uniform
initialisation with q, k, v as three matrices, and a patch projection that can be kept as initialised. The
``vit_conv_*`` variants replace the patch projection by four strided convolutions (Xiao et al. 2021).
"""

import math
from typing import Any

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from mocov3.models.positions import sincos_position_embedding


class ConvStem(nn.Module):
    """Four 3×3 stride-2 convolutions with batch norm and ReLU (widths D/8 … D), then 1×1: patches of 16 pixels."""

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **_: Any
    ) -> None:
        super().__init__()
        if patch_size != 16:
            raise ValueError(f"the convolutional stem makes patches of 16 pixels, not {patch_size}")
        if embed_dim % 8:
            raise ValueError(f"the convolutional stem needs a width divisible by 8, not {embed_dim}")
        side = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        layers: list[nn.Module] = []
        width = in_chans
        for out in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [
                nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(True),
            ]
            width = out
        layers.append(nn.Conv2d(width, embed_dim, 1))
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Pictures → tokens in row-major order."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(TimmVisionTransformer):
    """timm's Vision Transformer with MoCo v3's position table, initialisation and frozen patch projection."""

    projector_name = "head"
    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(self, *, stop_grad_conv1: bool = False, **kwargs: Any) -> None:
        super().__init__(norm_layer=_LayerNorm, num_classes=0, **kwargs)
        rows, columns = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(sincos_position_embedding(rows, columns, self.embed_dim), requires_grad=False)
        self._initialise()
        if stop_grad_conv1 and isinstance(self.patch_embed.proj, nn.Conv2d):
            # the convolutional stem is trained all the same, as in the reference
            self.patch_embed.proj.requires_grad_(False)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("qkv"):  # q, k and v are three square matrices
                    bound = math.sqrt(6.0 / (module.in_features + module.out_features // 3))
                    nn.init.uniform_(module.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        projection = self.patch_embed.proj
        if isinstance(projection, nn.Conv2d):
            fan_in = projection.in_channels * math.prod(projection.kernel_size)
            bound = math.sqrt(6.0 / (fan_in + self.embed_dim))
            nn.init.uniform_(projection.weight, -bound, bound)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """The cls token after the last norm."""
        return self.forward_features(x)[:, 0].clone()  # a view would keep all tokens in memory

    def forward(  # type: ignore[override]  # timm's masks have no use here
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out"]:
        """Features through the head (the projector, or a classifier)."""
        return self.head(self.features(x))


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, **{"eps": 1e-6, **kwargs})
