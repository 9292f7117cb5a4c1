"""Low-rank pairs in files: added to their matrices where weights are read, or kept apart in an adapter's file.

An adapter holds what a run with ``--lora`` trained of a backbone (pairs, norms, whole blocks) and its buffers, under
the backbone's names, and the digest of the weights that stood still: those it belongs to.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mocov3 import models
from mocov3.config.archs import HEAD_KEYS, HEADS
from mocov3.config.fields import Fields
from mocov3.errors import UserError, printable
from mocov3.models.lora import DOWN, UP, add_pairs
from mocov3.weights import Contents, attention_heads, checkpoint, trained_with
from mocov3.weights.find import BackboneWeights, summed
from mocov3.weights.origin import origin_of

_FORMAT = "mocov3 adapter 1"


def write_adapter(file: Path, output: Path) -> str:
    """Write the adapter of a checkpoint of ``--lora``; returns what to say of it.

    Raises:
        UserError: if it is no such checkpoint, or its starting weights were changed for other channels.
    """
    contents = checkpoint.read(file)
    config, where = trained_with(contents), str(file)
    rank = config.get("lora")
    if not isinstance(rank, int) or not rank:
        raise UserError(f"{where}: was not trained with --lora, so it has no adapter; export it --to a format")
    if config.get("channels", 3) != 3:
        raise UserError(f"{where}: --channels changed the first weights of its start; export it --to a format")
    prefix = f"{checkpoint.PREFIX}base_encoder."
    state = {k.removeprefix(prefix): v for k, v in contents["state_dict"].items() if k.startswith(prefix)}
    state = {k: v for k, v in state.items() if not k.startswith(HEAD_KEYS)}
    arch = str(contents["arch"])
    with models.shapes_only():
        network = models.build_backbone(arch)
        add_pairs(network, rank, _whole_blocks(config))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    trained |= {name for name, _ in network.named_buffers()}
    adapter = {_plain(k): v.contiguous() for k, v in state.items() if k in trained}
    about = {
        "format": _FORMAT,
        "arch": arch,
        "rank": str(rank),
        "base": digest_of(state, without=adapter),
        **origin_of(contents),
    }
    about["config"] = json.dumps(config)
    try:
        safetensors.torch.save_file(adapter, output, about)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    size = sum(value.numel() * value.element_size() for value in adapter.values())
    return f"{output}: adapter of rank {rank} for {arch}, {size / 1e6:.1f} MB; use it beside the starting weights"


class Adapter(NamedTuple):
    """What an adapter's file holds."""

    file: str
    about: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def contents(self) -> Contents:
        """The settings of the run that trained it, as a checkpoint's contents hold them."""
        return {"mocov3": {"config": json.loads(self.about["config"])}}


def with_adapter(weights: BackboneWeights, adapter: Adapter, where: str) -> BackboneWeights:
    """Starting weights as an adapter's run trained them.

    Args:
        weights: those that the run started from.
        adapter: what that run trained.
        where: the weights, for messages.

    Raises:
        UserError: if the adapter is one of other weights.
    """
    file, about, tensors = adapter
    state = {_plain(key): value for key, value in weights.state.items()}
    if any(key.endswith((DOWN, UP)) for key in state) or digest_of(state, without=tensors) != about.get("base"):
        raise UserError(
            f"--adapter {file}: was trained on other weights ({about['arch']}) than {where}; give its start"
        )
    prefix = next(iter(weights.state)).removesuffix(next(iter(state)))
    merged = {prefix + key: value for key, value in summed({**state, **tensors}).items()}
    heads = weights.heads
    if heads.number is None:
        stated = trained_with(adapter.contents).get("heads")
        heads = attention_heads.Known(stated or HEADS.get(attention_heads.width_of(state) or 0), "the adapter's")
    return dataclasses.replace(weights, state=merged, arch=weights.arch or about["arch"], heads=heads)


def read_adapter(file: str) -> Adapter:
    """The adapter in a file.

    Raises:
        UserError: if there is none.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except Exception as error:  # whatever the reader raises on other bytes
        raise UserError(f"--adapter {file}: cannot be read as safetensors ({printable(str(error))[:100]})") from None
    if about.get("format") != _FORMAT:
        raise UserError(f"--adapter {file}: is no adapter of mocov3; make one by mocov3 export CKPT --adapter")
    return Adapter(file, about, tensors)


def _whole_blocks(config: Fields) -> int:
    """Blocks that a run trained whole (``--unfreeze-last``)."""
    value = config.get("unfreeze_last")
    return value if isinstance(value, int) else 0


def _plain(key: str) -> str:
    """timm's own name of a weight: in our networks it lies in ``backbone``."""
    return key.removeprefix("backbone.")


def digest_of(state: Mapping[str, Tensor], *, without: Collection[str] = ()) -> str:
    """sha256 of a backbone's weights and their plain names; position tables apart, which follow the images' size.

    Args:
        state: the weights.
        without: plain names of weights that are left out.
    """
    whole = hashlib.sha256()
    plain = {_plain(key): value for key, value in state.items()}
    for key in sorted(set(plain) - set(without)):
        if not key.endswith("pos_embed"):
            value = plain[key].detach().cpu().contiguous()
            whole.update(f"{key} {tuple(value.shape)} {value.dtype}\0".encode())
            whole.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
