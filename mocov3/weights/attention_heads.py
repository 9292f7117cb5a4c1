"""How many attention heads a ViT's weights are of: decided here, for everything that reads weights.

Shapes do not tell. Any number of heads that divides the width fits the same weights and computes other features: width
384 has 12 heads in MoCo v3 (arXiv 2104.02057, appendix) and 6 in DeiT, DINO and timm. At other widths all agree.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from mocov3.config.archs import HEADS, OTHERS_HEADS, WIDTHS, is_vit, unlikely_heads
from mocov3.errors import UserError
from mocov3.models.positions import is_sincos_position_embedding
from mocov3.weights import Contents, our_entry, trained_with


class Known(NamedTuple):
    """A number of attention heads, and what tells it; ``None`` where nothing does."""

    number: int | None = None
    by: str = ""


def width_of(state: dict[str, Tensor]) -> int | None:
    """The width of a ViT's tokens by its weights; ``None`` for other networks, and for ``timm/…`` of ours."""
    cls, qkv = state.get("cls_token"), state.get("blocks.0.attn.qkv.weight")
    return int(cls.shape[-1]) if cls is not None and cls.ndim == 3 and qkv is not None else None


def told(contents: Contents, arch: str | None, kind: str, state: dict[str, Tensor], where: str) -> Known:
    """The attention heads that a weights file tells by itself.

    Args:
        contents: of the file.
        arch: that it names.
        kind: what ``convert.find_backbone`` calls it.
        state: the backbone in it.
        where: the file, for messages.

    Raises:
        UserError: if it names a number that cannot be.
    """
    width, entry = width_of(state), our_entry(contents)
    if width is None or (arch or "").startswith("timm/"):
        return Known()  # the network of that name has its own
    if entry:
        count = trained_with(contents).get("heads")
        if count is None:  # as built unless told otherwise
            return Known(HEADS.get(width), "as mocov3 builds it")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1 or width % count:
            raise UserError(
                f"{where}: its configuration is damaged ({str(count)[:40]!r} attention heads of a ViT of "
                f"width {width}); use another file"
            )
        return Known(count, "as the file says")
    if kind.startswith("pre-training"):
        return Known(HEADS.get(width), "a pre-training checkpoint of MoCo v3")
    if "patch_embed.proj.0.weight" in state:
        return Known(HEADS.get(width), "by its convolutional stem, MoCo v3's")
    table = state.get("pos_embed")  # of a single patch it tells nothing: all rows' and columns' channels look alike
    if table is not None and table.ndim == 3 and table.shape[1] > 2 and is_sincos_position_embedding(table):
        return Known(HEADS.get(width), "by its position table, MoCo v3's")
    return Known()


def assumed(state: dict[str, Tensor], beside: Iterable[str], arch: str | bool | None) -> Known:
    """What is taken, and said, where neither the file nor the user tells and its family has one number.

    Args:
        state: the backbone.
        beside: keys that stand beside it in its file.
        arch: ours that the user names for a file in another library's terms.
    """
    width = width_of(state)
    if width not in OTHERS_HEADS:
        return Known()
    if any("decoder_" in key or "mask_token" in key for key in beside):
        return Known(OTHERS_HEADS[width], "64 channels each, as in MAE's networks")
    return Known(HEADS[width], f"{arch}'s") if arch else Known()


def settled(known: Known, asked: int | None, width: int | None, where: str) -> Known:
    """What is known, or else what the user asked for.

    Raises:
        UserError: if the two differ, or no such ViT can be.
    """
    if asked is None:
        return known
    if width is None:
        raise UserError(f"{where}: --heads {asked} is for our ViTs, these weights are of another network; leave it out")
    if asked < 1:
        raise UserError(f"--heads must be at least 1, not {asked}")
    if asked != known.number and (reason := unlikely_heads(asked, width)):
        raise UserError(f"{where}: {reason}")
    if known.number not in (None, asked):
        raise UserError(
            f"{where}: has {known.number} attention heads ({known.by}), not {asked}; leave --heads out, or "
            f"give --heads {known.number}"
        )
    return Known(asked, "--heads")


def choices(width: int | None) -> str:
    """The flags to choose from where only the user can know; '' where nothing is to be asked."""
    if width not in OTHERS_HEADS:
        return ""
    return f"--heads {HEADS[width]} (MoCo v3's) or --heads {OTHERS_HEADS[width]} (DeiT's, DINO's, timm's)"


def to_build(known: Known, arch: str, state: dict[str, Tensor], where: str) -> int | None:
    """The heads to build ``arch`` with for a backbone; ``None`` for networks whose name tells all.

    Raises:
        UserError: if it is not known which of two networks it is.
    """
    if not is_vit(arch):
        return None
    width = width_of(state)
    if width != WIDTHS[arch]:  # does not fit at all: loading says where
        return None
    if known.number is None and (asked := choices(width)):
        raise _nobody_says(width, asked, where)
    return known.number or HEADS[WIDTHS[arch]]


def _nobody_says(width: int | None, asked: str, where: str) -> UserError:
    return UserError(f"{where}: a ViT of width {width} that does not record its attention heads; give {asked}")


def heads_of(network: object) -> int | None:
    """Attention heads of a network that is built; ``None`` for networks without."""
    blocks = getattr(getattr(network, "backbone", network), "blocks", None)
    try:
        count = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks is not None else None
    except (TypeError, IndexError, KeyError):
        return None
    return count if isinstance(count, int) else None


def check_built(network: object, known: Known, state: dict[str, Tensor], where: str) -> None:
    """Refuse weights of other attention heads than the network has that they are to be loaded into.

    Raises:
        UserError: if they differ, or it is not known which of two networks the weights are of.
    """
    built, width = heads_of(network), width_of(state)
    if built is None or width is None or width != getattr(getattr(network, "backbone", network), "embed_dim", None):
        return
    if known.number is None:
        if not hasattr(network, "backbone") and (asked := choices(width)):  # timm's by name has its own
            raise _nobody_says(width, asked, where)
    elif built != known.number:
        raise UserError(
            f"{where}: has {known.number} attention heads ({known.by}), the network to load it into has "
            f"{built}: the same shapes, other features; take one of our ViTs (--arch)"
        )
