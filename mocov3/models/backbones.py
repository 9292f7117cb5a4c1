"""Backbones by name. Every encoder has ``features(x)``, a projector in place of its classifier, ``num_features``.

ResNets are torchvision's with zero-initialised last gains (Goyal et al. 2017); ``timm/NAME`` takes any backbone of
timm. Names are listed in ``mocov3.config.archs``.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torchvision.models as tv
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mocov3.config.archs import CONV_VITS, check_arch
from mocov3.errors import UserError, nearest
from mocov3.models.products import use_fast_products
from mocov3.models.small_maps import use_whole_maps

if TYPE_CHECKING:
    from mocov3.models.vit import VisionTransformer


class ResNet(tv.ResNet):
    """torchvision's ResNet with a call for the features, optional widths and a stem for small images.

    The last gain of every block starts at 0, as in the reference, except in ResNet-10: its stages have one block, and
    starting with all of them closed costs more than a short run can make up (measured: docs/demo.md).
    """

    projector_name = "fc"
    fc: nn.Module
    conv1: nn.Conv2d

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: list[int],
        *,
        width: int = 64,
        stem: str = "imagenet",
        zero_init_residual: bool = True,
        in_chans: int = 3,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__(block, layers, 1000, zero_init_residual, groups, width_per_group)
        if width != 64:
            self._narrow(block, layers, width)
        if in_chans != 3 or stem != "imagenet":
            self._replace_stem(stem, in_chans)
        use_whole_maps(self)
        self.num_features: int = width * 2 ** (len(layers) - 1) * block.expansion

    def _narrow(self, block: type[BasicBlock] | type[Bottleneck], layers: list[int], width: int) -> None:
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, depth in enumerate(layers):
            layer = self._make_layer(block, width * 2**i, depth, stride=1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", layer)
        self.fc = nn.Linear(width * 2 ** (len(layers) - 1) * block.expansion, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _replace_stem(self, stem: str, in_chans: int) -> None:
        # CIFAR's stems (He et al. 2016, §4.2): 3×3, no pooling; stride 2 halves the cost of 28 px images again
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small_stride2": (3, 2)}[stem]
        width = self.conv1.out_channels
        self.conv1 = nn.Conv2d(in_chans, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem != "imagenet":
            self.maxpool = nn.Identity()

    def feature_map(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """Output of the last stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return maps

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Globally averaged output of the last stage."""
        pooled: Tensor = self.avgpool(self.feature_map(x))
        return pooled.flatten(1)

    def features_and_mean(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
        """Features, twice: they are the mean over places."""
        features = self.features(x)
        return features, features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out"]:
        """Features through the last layer (the projector, or a classifier)."""
        out: Tensor = self.fc(self.features(x))
        return out


class TimmEncoder(nn.Module):
    """Any backbone of timm, with the projector beside it (keys ``backbone.*`` and ``projector.*``)."""

    projector_name = "projector"

    def __init__(self, name: str, image_size: int, **kwargs: Any) -> None:
        super().__init__()
        import timm

        self.backbone: Any
        if not timm.is_model(name):
            raise UserError(
                f"--arch timm/{name}: timm {timm.__version__} has no such model; "
                f"{nearest(name, timm.list_models())[:300]}"
            )
        try:
            self.backbone = timm.create_model(name, num_classes=0, img_size=image_size, **kwargs)
        except TypeError:  # convolutional networks take any size and know no img_size
            self.backbone = timm.create_model(name, num_classes=0, **kwargs)
        except (AssertionError, ValueError) as error:
            raise _cannot_take(name, image_size, error) from None
        _try(self.backbone, name, image_size, int(kwargs.get("in_chans", 3)))
        use_fast_products(self.backbone)
        self.num_features = int(getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features)
        self.projector: nn.Module = nn.Identity()

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """timm's pooled features before its classifier."""
        pooled: Tensor = self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True)
        return pooled

    def features_and_mean(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch place_dim"]]:
        """Pooled features, and the mean of the features of all places (of a ViT: of its patches)."""
        unpooled = self.backbone.forward_features(x)
        return self.backbone.forward_head(unpooled, pre_logits=True), places_of(self.backbone, unpooled).mean(1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out"]:
        """Features through the projector."""
        out: Tensor = self.projector(self.features(x))
        return out


def places_of(backbone: Any, unpooled: Tensor) -> Float[Tensor, "batch places dim"]:
    """Features of all places, row by row, of what a backbone makes before it pools; a ViT's other tokens left out."""
    if unpooled.ndim == 4:  # a map, channels first unless said otherwise
        last = str(getattr(backbone, "output_fmt", "NCHW")).upper().endswith("NHWC")
        return unpooled.flatten(1, 2) if last else unpooled.flatten(2).transpose(1, 2)
    return unpooled[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]


def _try(backbone: nn.Module, name: str, side: int, channels: int, flag: str = "--image-size") -> None:
    """Refuse a network of timm that stumbles over images of a size: on shapes only, which costs milliseconds."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    # a copy: some networks keep what they computed last
    shapes = copy.deepcopy(backbone, {id(tensor): tensor.to("meta") for tensor in tensors}).eval()
    try:
        with torch.no_grad():
            shapes(torch.empty(1, channels, side, side, device="meta"))
    except NotImplementedError:  # an operation without shapes: the first batch will tell
        pass
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _cannot_take(name, side, error, flag) from None


def check_local_views(encoder: nn.Module, arch: str, side: int, channels: int) -> None:
    """Refuse local views that a network of timm stumbles over: many of its ViTs take images of one size only.

    Raises:
        UserError: naming both.
    """
    if isinstance(encoder, TimmEncoder):
        _try(encoder.backbone, arch.removeprefix("timm/"), side, channels, "--local-views")


def _cannot_take(name: str, side: int, error: Exception, flag: str = "--image-size") -> UserError:
    return UserError(
        f"--arch timm/{name}: cannot take images of {side} px ({str(error)[:100]}); give another {flag}, or "
        "another network"
    )


if TYPE_CHECKING:
    Encoder = ResNet | VisionTransformer | TimmEncoder
else:
    Encoder = nn.Module  # timm takes a second to import, and ResNets do without it

_TORCHVISION: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": [2, 2, 2, 2]},
    "resnet34": {"block": BasicBlock, "layers": [3, 4, 6, 3]},
    "resnet50": {"block": Bottleneck, "layers": [3, 4, 6, 3]},
    "resnet101": {"block": Bottleneck, "layers": [3, 4, 23, 3]},
    "resnet152": {"block": Bottleneck, "layers": [3, 8, 36, 3]},
    "resnext50_32x4d": {"block": Bottleneck, "layers": [3, 4, 6, 3], "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"block": Bottleneck, "layers": [3, 4, 23, 3], "groups": 32, "width_per_group": 8},
    "resnext101_64x4d": {"block": Bottleneck, "layers": [3, 4, 23, 3], "groups": 64, "width_per_group": 4},
    "wide_resnet50_2": {"block": Bottleneck, "layers": [3, 4, 6, 3], "width_per_group": 128},
    "wide_resnet101_2": {"block": Bottleneck, "layers": [3, 4, 23, 3], "width_per_group": 128},
}
_RESNET10: dict[str, Any] = {"block": BasicBlock, "layers": [1, 1, 1, 1], "zero_init_residual": False}
_SMALL: dict[str, dict[str, Any]] = {
    "resnet10": _RESNET10,
    **{f"resnet10_w{width}": {**_RESNET10, "width": width, "stem": "small_stride2"} for width in (16, 32, 48, 64)},
}
_VITS: dict[str, dict[str, Any]] = {
    "vit_micro": {"embed_dim": 128, "depth": 6, "num_heads": 4},  # ours, for small images on CPUs
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},  # DeiT's Ti; not in the reference
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 12},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},  # the paper's; not in the reference
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},  # with --patch-size 14, as in the paper
    "vit_conv_micro": {"embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_conv_tiny": {"embed_dim": 192, "depth": 11, "num_heads": 3},  # not in the reference
    "vit_conv_small": {"embed_dim": 384, "depth": 11, "num_heads": 12},
    "vit_conv_base": {"embed_dim": 768, "depth": 11, "num_heads": 12},
}


class Settings(TypedDict, total=False):
    """What a file or a user says of a backbone besides its arch: arguments of ``build_backbone``."""

    image_size: int
    patch_size: int
    small_stem: bool
    in_chans: int
    num_heads: int


def blocks_of_third_stage(arch: str) -> int:
    """Blocks of a ResNet's third stage, in which ResNets of different depths differ."""
    return int({**_TORCHVISION, **_SMALL}[arch]["layers"][2])


def build_backbone(
    arch: str,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    stop_grad_conv1: bool = False,
    small_stem: bool = False,
    in_chans: int = 3,
    **dims: float,
) -> Encoder:
    """A freshly initialised backbone whose last layer is still to be replaced.

    Args:
        arch: a name of ``mocov3.config.archs`` or ``timm/NAME``.
        image_size: side of the images in pixels (ViT: sets the position table).
        patch_size: side of a ViT's patches in pixels.
        stop_grad_conv1: freeze the patch projection of the plain ViTs.
        small_stem: 3×3 stride-1 stem without pooling (ResNets).
        in_chans: channels of the images.
        **dims: other dimensions of the family's constructor (ViT: ``embed_dim``, ``depth``, ``num_heads``).

    Raises:
        UserError: if the name is not known.
    """
    check_arch(arch)
    if in_chans != 3:
        dims["in_chans"] = in_chans
    if arch.startswith("timm/"):
        return TimmEncoder(arch.removeprefix("timm/"), image_size, **dims)
    if arch in _VITS:
        from mocov3.models.vit import ConvStem, VisionTransformer

        settings = {**_VITS[arch], **({"embed_layer": ConvStem} if arch in CONV_VITS else {}), **dims}
        return VisionTransformer(
            img_size=image_size, patch_size=patch_size, stop_grad_conv1=stop_grad_conv1, **settings
        )
    settings = {**{**_TORCHVISION, **_SMALL}[arch], **dims}
    if small_stem:
        settings["stem"] = "small"
    return ResNet(**settings)


def build_encoder(arch: str, projector: Callable[[int], nn.Module], **settings: Any) -> Encoder:
    """A backbone with ``projector(num_features)`` in place of its classifier; settings as ``build_backbone``."""
    encoder = build_backbone(arch, **settings)
    setattr(encoder, encoder.projector_name, projector(encoder.num_features))
    return encoder


def linear_classifier(arch: str, classes: int, **settings: Any) -> Encoder:
    """A frozen backbone with a linear classifier: weights N(0, 0.01), bias 0 (the reference's linear evaluation)."""

    def classifier(width: int) -> nn.Module:
        layer = nn.Linear(width, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer

    model = build_encoder(arch, classifier, **settings)
    model.requires_grad_(False)
    getattr(model, model.projector_name).requires_grad_(True)
    return model
