"""What a fine-tuning run is made of: network, optimizer, schedule, average, step; built from a configuration."""

from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3

from mocov3.config import FinetuneConfig, ViewPreset
from mocov3.data import Source
from mocov3.data.loading.filling import Transform
from mocov3.data.loading.labelled import CropView
from mocov3.data.loading.supervised import TRANSFER_CROP, DeitAugment
from mocov3.distributed import World, synchronise_batch_norm
from mocov3.errors import UserError
from mocov3.finetuning import files
from mocov3.finetuning.mixing import Depth, Mixer
from mocov3.finetuning.model import build_classifier, build_criterion, build_optimizer, build_schedule, parameter_groups
from mocov3.finetuning.recorder import TuneCounters
from mocov3.finetuning.step import TuneStep
from mocov3.models import Encoder
from mocov3.models.precision import Precision, precision_of
from mocov3.weights import Contents, checkpoint, our_entry


@dataclass
class Parts:
    """The parts of a run on this rank's device."""

    model: Encoder
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    ema: ModelEmaV3 | None
    depth: Depth
    mixer: Mixer | None
    precision: Precision
    step: TuneStep
    fresh: list[str]
    """Keys that did not come from the starting weights."""


def build(start: files.Start, classes: int, world: World, *, script_door: bool) -> Parts:
    """All parts, weights loaded where the run starts from some.

    Raises:
        UserError: if the weights do not fit.
    """
    c = start.config
    torch.manual_seed(c.seed)
    model = build_classifier(
        c.arch,
        classes,
        image_size=c.image_size,
        patch_size=c.patch_size,
        small_stem=bool(c.small_stem),
        drop_path=c.drop_path,
        heads=c.heads,
    )
    fresh: list[str] = []
    if start.weights is not None:
        fresh = files.start_from(
            model, start.weights, start.where, arch=c.arch, classes=classes, keep_head=c.eval, heads=c.heads
        )
    if world.size > 1:
        synchronise_batch_norm(model)
    cuda = world.device.type == "cuda"
    layout = torch.channels_last if cuda else torch.preserve_format
    model.to(world.device, memory_format=layout).train()  # type: ignore[call-overload]
    precision = precision_of(c.precision, world.device, script_door=script_door)
    precision.suit(model)
    depth = Depth(model, c.seed)
    optimizer = build_optimizer(
        parameter_groups(model, weight_decay=c.weight_decay, layer_decay=c.layer_decay),
        lr=c.lr * total_batch(c, world) / 512,  # linear scaling, as DeiT's
        fused=cuda,
    )
    schedule = build_schedule(
        optimizer, epochs=c.epochs, warmup_epochs=c.warmup_epochs, warmup_lr=c.warmup_lr, min_lr=c.min_lr
    )
    ema = ModelEmaV3(model, decay=c.model_ema_decay) if c.model_ema else None
    step = TuneStep(
        model,
        optimizer,
        build_criterion(mixes=c.mixes, smoothing=c.smoothing),
        world=world,
        precision=precision,
        accumulate=c.accum_iter,
        clip=c.clip_grad,
        ema=ema,
    )
    return Parts(model, optimizer, schedule, ema, depth, _mixer(c, classes), precision, step, fresh)


def transform(c: FinetuneConfig, preset: ViewPreset) -> Transform:
    """The training transform: the reference's for transfer, else DeiT's.

    Raises:
        UserError: if timm does not know the policy.
    """
    if c.transfer:
        return CropView(c.image_size, TRANSFER_CROP)
    policy = "" if c.aa == "none" else c.aa
    augment = DeitAugment(c.image_size, policy, c.color_jitter, c.train_interpolation, preset.mean)
    augment.check()
    return augment


def total_batch(config: FinetuneConfig, world: World) -> int:
    """Images a step over all processes."""
    return config.batch_size * config.accum_iter * world.size


def _mixer(c: FinetuneConfig, classes: int) -> Mixer | None:
    if not c.mixes:
        return None
    return Mixer(
        mixup=c.mixup,
        cutmix=c.cutmix,
        probability=c.mixup_prob,
        switch_probability=c.mixup_switch_prob,
        smoothing=c.smoothing,
        classes=classes,
        seed=c.seed,
    )


def restore(parts: Parts, contents: Contents, where: str, source: Source) -> tuple[checkpoint.Position, TuneCounters]:
    """Resume from a checkpoint: weights, their average, optimizer, scaler, and what was counted.

    Raises:
        UserError: if it is of another model or damaged.
    """
    state = contents.get("model")
    head = f"{parts.model.projector_name}.weight"
    if isinstance(state, dict) and isinstance(state.get(head), torch.Tensor):
        files.check_classes(state[head], len(source.classes), where)
    checkpoint.check_state(parts.model, state if isinstance(state, dict) else {}, where)
    parts.model.load_state_dict(contents["model"])
    entry = our_entry(contents)
    try:
        checkpoint.restore_optimizer(parts.optimizer, contents["optimizer"])
        if parts.precision.scaler.is_enabled():
            parts.precision.scaler.load_state_dict(contents["scaler"])
        if parts.ema is not None:
            parts.ema.module.load_state_dict(contents["model_ema"])
        position = checkpoint.Position(*(int(entry[name]) for name in ("epoch", "iteration", "step")))
        corrupt = {int(i): source.name(int(i)) for i in entry.get("corrupt", [])}
        counters = TuneCounters(**entry["counters"], corrupt=corrupt)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{where}: is damaged ({reason}); use another checkpoint") from None
    counters.resumed += 1
    return position, counters
