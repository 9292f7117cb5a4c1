"""Tables from our backbones' keys to those of torchvision and transformers, both ways; timm's and DeiT's are ours.

A table is a list of (pattern, target). Every key of a state dict must match exactly one row, so nothing is lost or
passed on unnoticed. Three targets split a matrix into q, k and v.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Rows = Sequence[tuple[str, str | tuple[str, str, str]]]
"""Pattern of our key → target, with the pattern's groups; or three targets for a stacked q, k, v."""

_P = r"(weight|bias)"
_LAYER = "encoder.layers.encoder_layer_"
_CONV_STEM: Rows = [
    *[(rf"patch_embed\.proj\.{3 * i}\.(.+)", rf"conv_proj.conv_bn_relu_{i}.0.\1") for i in range(4)],
    *[(rf"patch_embed\.proj\.{3 * i + 1}\.(.+)", rf"conv_proj.conv_bn_relu_{i}.1.\1") for i in range(4)],
    (rf"patch_embed\.proj\.12\.{_P}", r"conv_proj.conv_last.\1"),
]

VIT_TORCHVISION: Rows = [
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
    (rf"patch_embed\.proj\.{_P}", r"conv_proj.\1"),
    *_CONV_STEM,
    (rf"blocks\.(\d+)\.norm1\.{_P}", rf"{_LAYER}\1.ln_1.\2"),
    (rf"blocks\.(\d+)\.attn\.qkv\.{_P}", rf"{_LAYER}\1.self_attention.in_proj_\2"),
    (rf"blocks\.(\d+)\.attn\.proj\.{_P}", rf"{_LAYER}\1.self_attention.out_proj.\2"),
    (rf"blocks\.(\d+)\.norm2\.{_P}", rf"{_LAYER}\1.ln_2.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc1\.{_P}", rf"{_LAYER}\1.mlp.0.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc2\.{_P}", rf"{_LAYER}\1.mlp.3.\2"),
    (rf"norm\.{_P}", r"encoder.ln.\1"),
    (rf"head\.{_P}", r"heads.head.\1"),
]
"""``torchvision.models.VisionTransformer`` (0.29), its convolutional stem included."""

# the names on disk since transformers 3; later versions rename while loading
VIT_TRANSFORMERS: Rows = [
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    (rf"patch_embed\.proj\.{_P}", r"embeddings.patch_embeddings.projection.\1"),
    (rf"blocks\.(\d+)\.norm1\.{_P}", r"encoder.layer.\1.layernorm_before.\2"),
    (
        rf"blocks\.(\d+)\.attn\.qkv\.{_P}",
        (
            r"encoder.layer.\1.attention.attention.query.\2",
            r"encoder.layer.\1.attention.attention.key.\2",
            r"encoder.layer.\1.attention.attention.value.\2",
        ),
    ),
    (rf"blocks\.(\d+)\.attn\.proj\.{_P}", r"encoder.layer.\1.attention.output.dense.\2"),
    (rf"blocks\.(\d+)\.norm2\.{_P}", r"encoder.layer.\1.layernorm_after.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc1\.{_P}", r"encoder.layer.\1.intermediate.dense.\2"),
    (rf"blocks\.(\d+)\.mlp\.fc2\.{_P}", r"encoder.layer.\1.output.dense.\2"),
    (rf"norm\.{_P}", r"layernorm.\1"),
]
"""``transformers.ViTModel``."""

RESNET_TRANSFORMERS: Rows = [
    (r"conv1\.weight", "embedder.embedder.convolution.weight"),
    (r"bn1\.(.+)", r"embedder.embedder.normalization.\1"),
    *[
        row
        for stage in range(4)
        for row in (
            *[
                (
                    rf"layer{stage + 1}\.(\d+)\.conv{k + 1}\.weight",
                    rf"encoder.stages.{stage}.layers.\1.layer.{k}.convolution.weight",
                )
                for k in range(3)
            ],
            *[
                (
                    rf"layer{stage + 1}\.(\d+)\.bn{k + 1}\.(.+)",
                    rf"encoder.stages.{stage}.layers.\1.layer.{k}.normalization.\2",
                )
                for k in range(3)
            ],
            (
                rf"layer{stage + 1}\.(\d+)\.downsample\.0\.weight",
                rf"encoder.stages.{stage}.layers.\1.shortcut.convolution.weight",
            ),
            (
                rf"layer{stage + 1}\.(\d+)\.downsample\.1\.(.+)",
                rf"encoder.stages.{stage}.layers.\1.shortcut.normalization.\2",
            ),
        )
    ],
]
"""``transformers.ResNetModel``."""

RESNET_SEQUENTIAL: Rows = [
    (r"conv1\.(.+)", r"0.\1"),
    (r"bn1\.(.+)", r"1.\1"),
    *[(rf"layer{stage}\.(.+)", rf"{stage + 3}.\1") for stage in range(1, 5)],
]
"""``torch.nn.Sequential`` of a ResNet's children, as lightly's examples build it."""

ALL = (VIT_TORCHVISION, VIT_TRANSFORMERS, RESNET_TRANSFORMERS, RESNET_SEQUENTIAL)
"""Those by which files are read."""


def translate(state: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """``state`` under the names of a table; tensors are shared, q, k, v are views.

    Raises:
        KeyError: for a key that no row, or more than one, accounts for.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        matches = [(match, target) for pattern, target in rows if (match := re.fullmatch(pattern, key))]
        if len(matches) != 1:
            raise KeyError(f"{key}: {len(matches)} rows of the table account for it")
        match, target = matches[0]
        if isinstance(target, tuple):
            out.update({match.expand(t): part for t, part in zip(target, value.chunk(3), strict=True)})
        else:
            out[match.expand(target)] = value
    return out
