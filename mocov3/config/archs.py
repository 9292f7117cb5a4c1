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

VITS = ["vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
CONV_VITS = ["vit_conv_micro", "vit_conv_tiny", "vit_conv_small", "vit_conv_base"]
SMALL_VITS = ["vit_micro", "vit_conv_micro"]
"""Those of the ViTs that are for small images on CPUs (ours)."""
STEM_PARTS = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (2, 1)}
"""Patch size → what the width is divided by in the strided convolutions of a convolutional stem: half a side each."""

BUILT_IN_ARCHS = RESNETS + SMALL_RESNETS + VITS + CONV_VITS

WIDTHS = {
    "vit_micro": 128,
    "vit_tiny": 192,
    "vit_small": 384,
    "vit_base": 768,
    "vit_large": 1024,
    "vit_huge": 1280,
    "vit_conv_micro": 128,
    "vit_conv_tiny": 192,
    "vit_conv_small": 384,
    "vit_conv_base": 768,
}
"""ViT → width of its tokens."""
HEADS = {128: 4, 192: 3, 384: 12, 768: 12, 1024: 16, 1280: 16}
"""Width → attention heads, as MoCo v3 has them (192: DeiT's; 128: ours)."""
OTHERS_HEADS = {384: 6}
"""Width → attention heads in DeiT, DINO and timm, where these differ: the same shapes, another network."""


def check_arch(arch: str) -> None:
    """Refuse an architecture's name that cannot be built (``timm/…`` names are checked when timm is loaded)."""
    if arch in BUILT_IN_ARCHS or (arch.startswith("timm/") and len(arch) > len("timm/")):
        return
    raise UserError(f"--arch {arch!r} is not known; {nearest(arch, BUILT_IN_ARCHS)} (or timm/NAME)")


CLASSIFIER_KEYS = ("fc.", "head.")
"""How keys of a classifier begin: in ResNets and in ViTs."""
HEAD_KEYS = (*CLASSIFIER_KEYS, "projector.")
"""How keys of whatever follows a backbone begin; timm's backbones have their projector beside them."""


def is_resnet(arch: str) -> bool:
    """Whether ``arch`` is one of our ResNets (their stem can be made small; their heads are shorter)."""
    return arch in RESNETS or arch in SMALL_RESNETS


def is_vit(arch: str) -> bool:
    """Whether ``arch`` is one of our Vision Transformers (their image side must divide into patches)."""
    return arch in VITS or arch in CONV_VITS


def takes_pairs(arch: str) -> bool:
    """Whether ``--lora`` works with an arch, by its name: it has blocks of attention and MLP."""
    return is_vit(arch) or arch.startswith(("timm/vit_", "timm/deit_", "timm/deit3_"))


def check_heads(heads: int | None, arch: str) -> None:
    """Refuse a number of attention heads that ``arch`` cannot have; of an arch that is not known yet ('') any above 0.

    Raises:
        UserError: naming what is allowed.
    """
    if heads is None:
        return
    if arch and not is_vit(arch):
        kind = "heads are those of its name" if arch.startswith("timm/") else "it has no attention"
        raise UserError(f"--heads {heads} is for our ViTs ({', '.join(WIDTHS)}), not {arch}: {kind}; leave it out")
    if heads < 1:
        raise UserError(f"--heads must be at least 1, not {heads}")
    if arch and (reason := unlikely_heads(heads, WIDTHS[arch])):
        raise UserError(f"{reason} (width of {arch})")


def unlikely_heads(heads: int, width: int) -> str:
    """Why ViTs of a width do not have so many heads, which are of 32 to 128 numbers each; empty where they may."""
    likely = [n for n in range(1, width + 1) if width % n == 0 and 32 <= width // n <= 128]
    if heads in likely or (not likely and width % heads == 0):  # narrower networks are toys: whatever divides
        return ""
    reason = f"does not divide the width {width}" if width % heads else f"makes heads of {width // heads} numbers"
    return f"--heads {heads} {reason}; likely: {', '.join(map(str, likely))}"


def stored_heads(heads: int | None, arch: str, asked: int | None) -> int | None:
    """Attention heads as a configuration keeps them: only where they were asked for or are not the arch's own."""
    return heads if is_vit(arch) and (asked is not None or heads != HEADS[WIDTHS[arch]]) else None
