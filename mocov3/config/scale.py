"""Flags for batches larger than the memory, and for networks larger than one device."""

from dataclasses import dataclass

from mocov3.config.fields import flag
from mocov3.config.own import OwnFlags


def images_or_auto(text: str | int) -> int | str:
    """``auto``, or a number.

    Raises:
        ValueError: if it is neither.
    """
    return "auto" if text == "auto" else int(text)


@dataclass(frozen=True)
class ScaleFlags(OwnFlags):
    """How a step is fitted into memory; the defaults change nothing, and the batch stays --batch-size."""

    micro_batch: int | str = flag(
        0,
        "most images of a process in a pass: loss and gradients stay those of the whole batch, in less memory, for a "
        "quarter more time (auto: the most that fit; 0: all). Exact for backbones without batch norm; others "
        "normalise by each micro-batch",
        kind=images_or_auto,
        result=False,
        group="ranks and devices",
        metavar="N|auto",
        low=0,
    )
    fsdp: bool = flag(
        False,
        "shard weights, gradients and optimizer states over the processes (FSDP2), for networks larger than a "
        "device; files are the same",
        result=False,
        group="ranks and devices",
    )
