"""Memory of a training step, counted without training: what the network keeps for its backward pass, an image.

The network is built without storage (torch's meta device and fake tensors), so that a ViT-Huge is counted on a laptop;
what autograd would keep is summed by its saved-tensor hooks. ``benchmarks/footprint.py`` compares with measured peaks.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mocov3.config.local_views import LocalViews
from mocov3.errors import UserError
from mocov3.models import Encoder, MoCo, shapes_only
from mocov3.pretraining.sharded_lars import blocks

KEPT_FREE = 0.05
"""Share of the memory that ``fitting`` leaves."""
_HELD = 1.12
"""What allocators hold for a byte asked for: pieces between tensors, scratch of libraries (measured on CPU)."""
_STATES = {"lars": 1, "adamw": 2, "muon": 1}
_TRANSIENT = 3
"""Largest tensors alive at once beside what is kept: a layer's output, its gradient, its input's."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one step of one process, without the process itself (torch and its libraries)."""

    weights: int
    """Parameters and buffers: query encoder, momentum encoder, predictor."""
    trained: int
    """Trained parameters: so much again as gradients, and for every state of the optimizer."""
    heads_trained: int
    """The part of ``trained`` in projector and predictor."""
    states: int
    """Tensors the optimizer keeps for a parameter: 1 (LARS, Muon), 2 (AdamW)."""
    backbone: float
    """Kept for the backward pass of the backbone, an image and view."""
    heads: float
    """Kept for the backward pass of projector and predictor, an image and view."""
    largest: float
    """The largest tensor in the backbone, an image and view."""
    view: float
    """A normalised view of an image."""
    unit: int
    """The largest block of weights that a sharded run gathers."""
    local_views: int = 0
    local_backbone: float = 0.0
    """Kept for the backward pass of the backbone, an image and local view; the heads keep as much as of a view."""
    local_largest: float = 0.0
    local_view: float = 0.0

    def peak(self, images: int, micro_batch: int = 0, shards: int = 1) -> float:
        """Most bytes alive at once.

        Args:
            images: batch of one process.
            micro_batch: images in a pass; 0: all in one.
            shards: processes that share weights, gradients and states (``--fsdp``).
        """
        held = (self.weights + self.states * self.trained) / shards + (2 * self.unit if shards > 1 else 0)
        gradients = self.trained / shards
        views = 2 + self.local_views
        if micro_batch and micro_batch < images:
            whole = views * images * self.heads
            part = micro_batch * max(
                self.backbone + self.view + _TRANSIENT * self.largest,
                self.local_backbone + self.local_view + _TRANSIENT * self.local_largest,
            )
            if shards > 1:  # one reduction: gradients stay whole until the last part
                gradients = self.trained
            return _HELD * (held + max(whole, gradients + part))
        inputs = images * (2 * self.view + self.local_views * self.local_view)
        backbone = images * (2 * self.backbone + self.local_views * self.local_backbone)
        for_backward = backbone + views * images * self.heads
        on_the_way = backbone + self.heads_trained / shards
        largest = max(self.largest, self.local_views * self.local_largest)  # local views are one pass
        return _HELD * (held + max(inputs + max(for_backward, on_the_way) + _TRANSIENT * images * largest, gradients))

    def fitting(self, images: int, memory: float, shards: int = 1) -> int:
        """The most images in a pass that fit ``memory`` bytes: ``images``, less, or 0 where not even one fits."""
        limit = (1 - KEPT_FREE) * memory
        if self.peak(images, 0, shards) <= limit:
            return images
        sizes = sorted({-(-images // parts) for parts in range(2, images + 1)}, reverse=True)
        return next((size for size in sizes if self.peak(images, size, shards) <= limit), 0)


def footprint(
    build: Callable[[], MoCo],
    image_size: int,
    *,
    optimizer: str,
    channels: int = 3,
    local: LocalViews | None = None,
    sixteen_bits: bool = False,
    grad_checkpoint: bool = False,
    preserve: bool = False,
) -> Footprint:
    """Count what training a model needs.

    Args:
        build: makes the model.
        image_size: side of the views in pixels.
        optimizer: lars, adamw or muon.
        channels: of the views.
        local: local views, if there are any.
        sixteen_bits: whether networks run under autocast.
        grad_checkpoint: whether blocks are computed again in the backward pass.
        preserve: whether the starting network is held beside (``--preserve``); both views are counted as the first,
            of which the last block makes all tokens.
    """
    with shapes_only():
        model = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        backbone, heads, largest = _kept_of_an_image(model, channels, image_size, sixteen_bits, preserve)
        small = (0.0, 0.0, 0.0)
        if local is not None:
            small = _kept_of_an_image(model, channels, local.pixels, sixteen_bits, False)
    if grad_checkpoint:
        area = (local.pixels / image_size) ** 2 if local is not None else 0.0
        backbone = _with_recomputed_blocks(model.base_encoder, backbone, 1.0)
        small = (_with_recomputed_blocks(model.base_encoder, small[0], area), 0.0, small[2])
    projector = getattr(model.base_encoder, model.base_encoder.projector_name)
    units = [projector, model.predictor, *blocks(model.base_encoder)]
    start = _bytes([*model.base_encoder.parameters()]) - _bytes([*projector.parameters()]) if preserve else 0
    return Footprint(
        weights=_bytes([*model.parameters(), *model.buffers()]) + start,
        trained=_bytes([p for p in model.parameters() if p.requires_grad]),
        heads_trained=_bytes([*projector.parameters(), *model.predictor.parameters()]),
        states=_STATES[optimizer],
        backbone=backbone,
        heads=heads,
        largest=largest,
        view=channels * image_size**2 * 4.0,
        unit=max(_bytes(list(block.parameters())) for block in units),
        local_views=local.count if local is not None else 0,
        local_backbone=small[0],
        local_largest=small[2],
        local_view=channels * local.pixels**2 * 4.0 if local is not None else 0.0,
    )


def _kept_of_an_image(
    model: MoCo, channels: int, side: int, sixteen_bits: bool, preserve: bool
) -> tuple[float, float, float]:
    """As ``_kept``, an image and view."""
    # what does not grow with the batch (weights in 16 bits) falls out of the difference
    few, many = (_kept(model, (n, channels, side, side), sixteen_bits, preserve) for n in (4, 8))
    backbone, heads, largest = ((b - a) / 4 for a, b in zip(few, many, strict=True))
    return backbone, heads, largest


def _kept(model: MoCo, shape: tuple[int, ...], sixteen_bits: bool, preserve: bool) -> tuple[int, int, int]:
    """Bytes kept for the backward pass of one view in the backbone and in the heads; the largest of the former."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # a storage that is freed may give its number to another

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            alive.append(storage)
            sizes[storage._cdata] = storage.nbytes()
        return t

    x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=sixteen_bits),
    ):
        features = model.base_encoder.features_and_mean(x)[0] if preserve else model.features(x)
        sizes.pop(x.untyped_storage()._cdata, None)
        backbone, largest = sum(sizes.values()), max(sizes.values())
        sizes.clear()
        model.queries(features)
    return backbone, sum(sizes.values()), largest


def _with_recomputed_blocks(encoder: Encoder, for_backward: float, area: float) -> float:
    """Every block's input, and one block's inside, of views of a part of the full area."""
    inner: Any = getattr(encoder, "backbone", encoder)
    count = len(blocks(encoder))
    tokens = int(inner.patch_embed.num_patches) * area + 1
    return for_backward / count + count * tokens * encoder.num_features * 4.0


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, or a cautious guess.

    On CUDA what its cache holds counts as free, and a limit set for the process counts
    (``torch.cuda.set_per_process_memory_fraction``; torch tells it from 2.8 on).
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
        return int(min(free + cached - used, limit * total - used))
    free = 8 << 30
    with suppress(OSError, ValueError, AttributeError):  # not Linux, or no such figure
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    with suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # a container's limit
    return free


def choose_micro_batch(counted: Footprint, images: int, memory: float, shards: int = 1) -> int:
    """The micro-batch of ``--micro-batch auto``: 0 where the whole batch fits in one pass.

    Raises:
        UserError: if not even one image fits beside weights and heads.
    """
    size = counted.fitting(images, memory, shards)
    if not size:
        need = counted.peak(images, 1, shards)
        raise UserError(
            f"--micro-batch auto: weights, optimizer and heads of {images} images need {need / 1e9:.1f} GB, "
            f"{memory / 1e9:.1f} GB are free; take a smaller --batch-size or --arch, or more processes"
        )
    return 0 if size == images else size
