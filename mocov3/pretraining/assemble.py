"""The model that a configuration describes, on this rank's device."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from mocov3 import models
from mocov3.config import PretrainConfig
from mocov3.config.archs import is_vit, stored_heads
from mocov3.distributed import World, synchronise_batch_norm
from mocov3.distributed.batch_norm import freeze_statistics
from mocov3.distributed.sharding import is_sharded
from mocov3.errors import UserError
from mocov3.models import MoCo, shapes_only
from mocov3.models.backbones import check_local_views
from mocov3.models.compiled import compile_features, pays
from mocov3.models.lora import add_pairs
from mocov3.models.precision import Precision, resolve_precision
from mocov3.optim import build_optimizer
from mocov3.output.log import warn, warn_once
from mocov3.pretraining.footprint import Footprint, choose_micro_batch, footprint, free_memory
from mocov3.pretraining.groups import freeze_until, parameter_groups
from mocov3.pretraining.preserve import Preservation
from mocov3.pretraining.sharded_lars import shard_model, sharded_optimizer
from mocov3.pretraining.starting_network import backbone_settings, check_start, start_network
from mocov3.pretraining.step import Step
from mocov3.weights import Contents, our_entry, trained_with
from mocov3.weights.find import BackboneWeights, find_backbone
from mocov3.weights.start import load_start, starting_weights


@dataclasses.dataclass
class Parts:
    """What a run trains, on this rank's device."""

    model: MoCo
    optimizer: torch.optim.Optimizer
    step: Step
    micro_batch: int
    """Images in a pass; 0: all in one."""
    compiled: bool
    start: str = ""
    """Digest of the network of ``--init``, where the run compares with it."""


def completed(config: PretrainConfig, world: World, resume_from: tuple[Path, Contents] | None) -> PretrainConfig:
    """The configuration with its seed (that of the checkpoint to resume from, else drawn) and its attention heads."""
    saved = our_entry(resume_from[1]).get("seed") if resume_from else None
    drawn = secrets.randbelow(2**31) if config.seed is None else config.seed
    seed = saved if isinstance(saved, int) else world.broadcast(drawn)
    return dataclasses.replace(with_heads(config, resume_from), seed=seed)


def build(
    config: PretrainConfig, world: World, resume_from: tuple[Path, Contents] | None, *, script_door: bool
) -> Parts:
    """Networks drawn from the seed, their optimizer and their step.

    Raises:
        UserError: if they cannot be built as the flags say.
    """
    c = config
    arithmetic = resolve_precision(c.precision, world.device, script_door=script_door)
    micro_batch = resolve_micro_batch(c, world, arithmetic)  # of the memory that is free before there is a model
    torch.manual_seed(int(c.seed or 0))
    precision = Precision(arithmetic, world.device)
    model = build_model(c, world)
    precision.suit(model)
    check_micro_batch(micro_batch, c, world, model)
    preservation, start = _start(c, world, resume_from)
    compiled = resolve_compile(c, world, micro_batch, resume_from)
    if compiled:
        say = warn_once if world.main else lambda _: None  # once, not for every backbone of every rank
        model.compile_backbones(say=say)
        if preservation is not None:
            compile_features([model.base_encoder, preservation.start], method="features_and_mean", say=say)
    groups = parameter_groups(model, c.layer_decay, staged=c.freeze_epochs > 0)
    optimizer = optimizer_of(model, groups, c, world)
    step = Step(
        model,
        optimizer,
        world=world,
        precision=precision,
        micro_batch=micro_batch,
        spike_factor=c.skip_spikes,
        preservation=preservation,
    )
    return Parts(model, optimizer, step, micro_batch, compiled, start)


def _start(
    config: PretrainConfig, world: World, resume_from: tuple[Path, Contents] | None
) -> tuple[Preservation | None, str]:
    """What ``--preserve`` asks for, and the digest of the starting network."""
    if not config.compares_with_start:
        return None, ""
    start = start_network(config)
    digest = check_start(start, config, resume_from)
    if not config.preserve:
        return None, digest
    if world.size > 1:
        synchronise_batch_norm(start)
    start.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Preservation(start, config.preserve, by_batch=not config.lora), digest


def build_model(config: PretrainConfig, world: World) -> MoCo:
    """The model of a configuration on this rank's device, in training mode."""
    c = config
    model = plain_model(dataclasses.replace(c, lora=0))
    if c.init:
        load_start(c.init, [model.base_encoder, model.momentum_encoder], c.arch, c.heads, c.adapter)
    if c.lora:
        add_pairs(model.base_encoder, c.lora, c.unfreeze_last)
    if c.freeze_until:
        freeze_until(model.base_encoder, c.freeze_until)
    if c.grad_checkpoint:
        backbone: Any = getattr(model.base_encoder, "backbone", model.base_encoder)
        if not hasattr(backbone, "set_grad_checkpointing"):
            raise UserError(f"--grad-checkpoint: {c.arch} cannot recompute its blocks")
        if model.views_meet and not is_vit(c.arch):  # a ViT's convolutional stem is not recomputed
            raise UserError(f"--grad-checkpoint would update the batch statistics of {c.arch} twice")
        backbone.set_grad_checkpointing(True)
    if world.size > 1:
        synchronise_batch_norm(model)
    sharded = c.fsdp and world.size > 1
    # channels-last is the layout convolutions are fastest in, names and values are the same; FSDP2 cannot cut it up
    layout = torch.contiguous_format if sharded else torch.channels_last
    model.to(device=world.device, memory_format=layout)  # type: ignore[call-overload]
    if sharded:
        shard_model(model, world)
    if c.lora:  # what stays as it starts includes a stem's statistics: those of other images would be another network
        for encoder in (model.base_encoder, model.momentum_encoder):
            freeze_statistics(encoder, but=getattr(encoder, encoder.projector_name))
    return model.train()


def with_heads(
    config: PretrainConfig, resume_from: tuple[Path, Contents] | None = None, weights: BackboneWeights | None = None
) -> PretrainConfig:
    """The configuration with its ViT's attention heads: of the checkpoint to resume from, else those of ``--init``.

    ``weights`` are those of ``--init`` where they are read already.

    Raises:
        UserError: if it is not known which of two networks these weights are of, or ``--heads`` says another.
    """
    c = config
    if not is_vit(c.arch) or not (resume_from or c.init):
        return c
    if resume_from:
        where, weights = (
            f"--resume {resume_from[0]}",
            find_backbone(resume_from[1], f"--resume {resume_from[0]}", heads=c.heads),
        )
    else:
        where, weights = f"--init {c.init}", weights or starting_weights(c.init, c.heads, c.arch)
    heads = weights.sizes(c.arch, where).get("num_heads", c.heads)
    return dataclasses.replace(c, heads=stored_heads(heads, c.arch, c.heads))


def plain_model(c: PretrainConfig) -> MoCo:
    """The model of a configuration as it is initialised, on the current device."""
    heads: dict[str, Any] = {
        "dim": c.moco_dim,
        "mlp_dim": c.moco_mlp_dim,
        "temperature": c.moco_t,
        "local_weight": c.local_weight,
    }
    model = models.build(c.arch, **heads, stop_grad_conv1=c.stop_grad_conv1, **backbone_settings(c))
    if c.local is not None:
        check_local_views(model.base_encoder, c.arch, c.local.pixels, c.channels)
    if c.lora:
        add_pairs(model.base_encoder, c.lora, c.unfreeze_last)
    return model


def resolve_compile(
    config: PretrainConfig, world: World, micro_batch: int, resume_from: tuple[Path, Contents] | None
) -> bool:
    """Whether the backbones are compiled: as ``--compile`` says, else as the run to resume was, else where it pays.

    It pays on CUDA, but for the smallest images. A resumed run stays with its arithmetic, since the last bits depend
    on it, unless it goes on beside a flag that rules compiling out. Recomputed backbones are compiled when asked for.
    """
    c = config
    if c.compile is not None:
        return c.compile
    ruled_out = "--fsdp" if c.fsdp else "--deterministic" if c.deterministic else ""
    if resume_from:
        before = bool(trained_with(resume_from[1]).get("compile"))
        if before and ruled_out and world.main:
            warn(f"the run was compiled so far; beside {ruled_out} it goes on eagerly, and its last bits are others")
        return before and not ruled_out
    plain = not (ruled_out or c.grad_checkpoint)
    return world.device.type == "cuda" and plain and pays(micro_batch or c.batch_size // world.size, c.image_size)


def optimizer_of(model: MoCo, params: ParamsT, config: PretrainConfig, world: World) -> torch.optim.Optimizer:
    """The optimizer of a configuration over ``params`` of the model."""
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, "momentum": config.momentum}
    if is_sharded(model):
        return sharded_optimizer(params, config.optimizer, world=world, **settings)
    return build_optimizer(params, config.optimizer, **settings)


def count_memory(config: PretrainConfig, *, sixteen_bits: bool) -> Footprint:
    """What a step of a configuration needs, counted without building it."""
    return footprint(
        lambda: plain_model(config),
        config.image_size,
        optimizer=config.optimizer,
        channels=config.channels,
        local=config.local,
        sixteen_bits=sixteen_bits,
        grad_checkpoint=config.grad_checkpoint,
        preserve=config.preserve > 0,
    )


def count_norms(config: PretrainConfig) -> int:
    """Channels of all batch norms of a configuration's networks, momentum encoder included."""
    with shapes_only():
        model = plain_model(config)
    return sum(m.num_features for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))


def resolve_micro_batch(config: PretrainConfig, world: World, precision: str) -> int:
    """Images of this rank in a pass, the same on every rank; 0: all in one. Call it before the model is built.

    Raises:
        UserError: if not even one image fits (``--micro-batch auto``).
    """
    local = config.batch_size // world.size
    asked = config.micro_batch
    if isinstance(asked, int):
        return asked if asked < local else 0
    # half of what a computer has free, since others use it too; a GPU is ours
    memory = free_memory(world.device) * (1.0 if world.device.type == "cuda" else 0.5 / world.local_size)
    counted = count_memory(config, sixteen_bits=precision != "fp32")
    size = choose_micro_batch(counted, local, memory, shards=world.size if config.fsdp else 1)
    smallest = min(proposal or local for proposal in world.gather(size))
    return smallest if smallest < local else 0


def check_micro_batch(size: int, config: PretrainConfig, world: World, model: MoCo) -> None:
    """Refuse micro-batches in which batch norm would meet one image, whose statistics may be of a single number.

    Raises:
        UserError: naming the smallest that serve.
    """
    local = config.batch_size // world.size

    def fewest(micro_batch: int) -> int:
        return local // -(-local // micro_batch) * world.size  # parts are of nearly equal size

    if size and model.views_meet and fewest(size) < 2:
        enough = next(n for n in range(size, local + 1) if fewest(n) >= 2)
        raise UserError(
            f"--micro-batch {config.micro_batch}: cuts the {local} images of a process so that the batch norm of "
            f"{config.arch} meets one at a time; give {'0 (none)' if enough == local else f'{enough} or more'}"
        )


def describe_micro_batch(size: int, config: PretrainConfig, world: World, model: MoCo) -> str:
    """What micro-batches do to this run, in one line."""
    c, local = config, config.batch_size // world.size
    if not size:
        return f"--micro-batch {c.micro_batch}: the {local} images of a process fit in one pass"
    text = f"micro-batches of {size}: loss and gradients are those of all {c.batch_size} images"
    if not model.views_meet:
        return f"{text}, as in one pass but for rounding"
    where = "" if world.size == 1 else f" of each of the {world.size} processes"
    return (
        f"{text}, exactly for the heads; the backbone of {c.arch} has batch norm, which normalises by {size} images"
        f"{where} at a time: not what one pass computes (backbones without batch norm, as vit_small, are exact)"
    )
