"""The names of the backbones, known without importing torch.

The builders of these names are in ``mocov3.models.backbones``; a test holds the two lists equal.
"""

from mocov3.errors import UserError, nearest

RESNETS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
"""torchvision's ResNet family."""

SMALL_RESNETS = ["resnet10", "resnet10_w16", "resnet10_w32", "resnet10_w48", "resnet10_w64"]
"""ResNet-10 (one basic block a stage): torchvision's widths and stem, or narrower with a 3×3 stem (``_wN``)."""

VITS = ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
CONV_VITS = ["vit_conv_small", "vit_conv_base"]

BUILT_IN_ARCHS = RESNETS + SMALL_RESNETS + VITS + CONV_VITS


def check_arch(arch: str) -> None:
    """Refuse an architecture's name that cannot be built (``timm/…`` names are checked when timm is loaded)."""
    if arch in BUILT_IN_ARCHS or (arch.startswith("timm/") and len(arch) > len("timm/")):
        return
    raise UserError(f"--arch {arch!r} is not known; {nearest(arch, BUILT_IN_ARCHS)} (or timm/NAME)")


def is_resnet(arch: str) -> bool:
    """Whether ``arch`` is one of our ResNets (their stem can be made small; their heads are shorter)."""
    return arch in RESNETS or arch in SMALL_RESNETS


def is_vit(arch: str) -> bool:
    """Whether ``arch`` is one of our Vision Transformers (their picture side must divide into patches)."""
    return arch in VITS or arch in CONV_VITS
