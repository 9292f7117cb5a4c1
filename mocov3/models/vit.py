"""The Vision Transformer of MoCo v3 on timm's blocks (arXiv 2104.02057, §4.1–4.2 and appendix).

What differs from timm's own: a fixed 2-D sine-cosine position table, 12 heads at width 384, Xavier-uniform
initialisation with q, k, v as three matrices, and a patch projection that can be kept as initialised. The
``vit_conv_*`` variants replace the patch projection by four strided convolutions (Xiao et al. 2021).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Attention, Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from mocov3.config.archs import STEM_PARTS
from mocov3.models.attention import attend
from mocov3.models.gelu import use_fused_gelu
from mocov3.models.patches import patch_maps, resized_kernel, sincos_of_places, use_patch_products
from mocov3.models.positions import sincos_position_embedding
from mocov3.models.products import token_linear, use_fast_products


class ConvStem(nn.Module):
    """3×3 stride-2 convolutions with batch norm and ReLU, then 1×1.

    Four of widths D/8 … D make patches of 16 pixels; for patches of 8 and 4 there are the last three or two of them.
    """

    def __init__(
        self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **_: object
    ) -> None:
        super().__init__()
        if patch_size not in STEM_PARTS:
            raise ValueError(f"the convolutional stem makes patches of 4, 8 or 16 pixels, not {patch_size}")
        parts = STEM_PARTS[patch_size]
        if embed_dim % parts[0]:
            raise ValueError(f"the convolutional stem needs a width divisible by {parts[0]}, not {embed_dim}")
        side = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (side, side)
        self.num_patches = side * side
        layers: list[nn.Module] = []
        width = in_chans
        for out in (embed_dim // part for part in parts):
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
            width = out
        layers.append(nn.Conv2d(width, embed_dim, 1))
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Images → tokens in row-major order."""
        maps: Tensor = self.proj(x)
        return maps.flatten(2).transpose(1, 2)


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
        use_fast_products(self.blocks)
        use_fused_gelu(self.blocks)
        use_patch_products(self.patch_embed.proj)
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
        """The cls token after the last norm, of images or of strips (``mocov3.data.device.token_strips``).

        Images of another size than the network was built for, as local views are, have their places in its grid.
        """
        normed: Tensor = self.norm(_first_token(self.blocks[-1], self._before_last_block(x)))
        return normed[:, 0]

    def features_and_mean(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """The cls token, as ``features``, and the mean of the patches' tokens after the last norm."""
        normed: Tensor = self.norm(self.blocks[-1](self._before_last_block(x)))
        return normed[:, 0], normed[:, 1:].mean(1)

    def _before_last_block(self, x: Tensor) -> Tensor:
        if self._is_strip(x):
            tokens = self._tokens_of_strip(x)
        elif tuple(x.shape[-2:]) != self.patch_embed.img_size:
            tokens = self.patch_drop(self._tokens_of_size(x))
        else:
            tokens = self.patch_drop(self._pos_embed(self.patch_embed(x)))
        tokens = self.norm_pre(tokens)
        blocks = self.blocks[:-1]
        if self.grad_checkpointing:
            tokens = checkpoint_seq(blocks, tokens)
        else:
            for block in blocks:
                tokens = block(tokens)
        before: Tensor = tokens
        return before

    def _is_strip(self, x: Tensor) -> bool:
        projection = self.patch_embed.proj
        return isinstance(projection, nn.Conv2d) and x.shape[1] == projection.in_channels + 2

    def _tokens_of_strip(self, x: Tensor) -> Tensor:
        side, projection = x.shape[-2], self.patch_embed.proj
        weight = projection.weight
        if side != weight.shape[-1]:
            weight = resized_kernel(weight, side)
        patches = patch_maps(x[:, :-2], weight, projection.bias).flatten(2).transpose(1, 2)
        return self._placed(patches, x[:, -2:, 0, ::side])

    def _tokens_of_size(self, x: Tensor) -> Tensor:
        maps: Tensor = self.patch_embed.proj(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        # as in strips: the middles of the patches, in the grid of full views
        row, column = (
            (torch.arange(count, device=x.device, dtype=wide) + 0.5) * grid / count - 0.5
            for count, grid in zip(maps.shape[-2:], self.patch_embed.grid_size, strict=True)
        )
        places = torch.stack(torch.meshgrid(row, column, indexing="ij")).flatten(1)
        return self._placed(maps.flatten(2).transpose(1, 2), places[None])

    def _placed(self, patches: Tensor, places: Tensor) -> Tensor:
        """Patches with the table's numbers at any (row, column), (batch or 1, 2, tokens), after the cls token."""
        # as for whole views: under autocast patches have 16 bits, and the sum with their places has those of the table
        table = sincos_of_places(places, self.embed_dim).to(self.pos_embed.dtype)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens: Tensor = self.pos_drop(torch.cat([cls, patches + table], dim=1))
        return tokens

    def forward(  # type: ignore[override]  # timm's masks have no use here
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out"]:
        """Features through the head (the projector, or a classifier)."""
        out: Tensor = self.head(self.features(x))
        return out


def _first_token(block: Any, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 dim"]:
    """What a block makes of the first token: all tokens are attended to, but the others' outputs are not needed."""
    attention = block.attn
    plain = type(block) is Block and type(attention) is Attention
    if not plain or getattr(attention, "gate", None) is not None:
        tokens: Tensor = block(x)
        return tokens[:, :1]
    y, first = block.norm1(x), x[:, :1]
    n, width = x.shape[0], attention.qkv.in_features
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = F.linear(y[:, :1], weight[:width], None if bias is None else bias[:width])
    kv = token_linear(y, weight[width:], None if bias is None else bias[width:])
    q = q.view(n, 1, attention.num_heads, -1).transpose(1, 2)
    k, v = kv.view(n, x.shape[1], 2, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
    out = attend(attention, attention.q_norm(q), attention.k_norm(k), v)
    out = attention.proj_drop(attention.proj(attention.norm(out.transpose(1, 2).reshape(n, 1, width))))
    first = first + block.drop_path1(block.ls1(out))
    result: Tensor = first + block.drop_path2(block.ls2(block.mlp(block.norm2(first))))
    return result


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(width, **{"eps": 1e-6, **kwargs})
