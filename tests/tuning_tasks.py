"""What the tests of fine-tuning run on every rank of a real process group."""

import torch


def tune_steps(world, payload):
    """Steps of fine-tuning on fixed images, two groups a step: two ranks, or one that accumulates two batches."""
    from functools import partial

    import numpy as np
    from timm.utils import ModelEmaV3

    from mocov3.finetuning.batches import batches
    from mocov3.finetuning.mixing import Depth, Mixer, erase
    from mocov3.finetuning.model import build_classifier, build_criterion, build_optimizer, parameter_groups
    from mocov3.finetuning.step import TuneStep
    from mocov3.models.precision import Precision

    accumulate = 2 // world.size
    torch.manual_seed(3)
    made = build_classifier("vit_tiny", 5, image_size=32, patch_size=16, small_stem=False, drop_path=0.3)
    model = made.double().train()
    depth = Depth(model, 1)
    optimizer = build_optimizer(parameter_groups(model, weight_decay=0.05, layer_decay=0.75), lr=1e-3)
    mixer = Mixer(mixup=0.8, cutmix=1.0, probability=1.0, switch_probability=0.5, smoothing=0.1, classes=5, seed=1)
    step = TuneStep(
        model,
        optimizer,
        build_criterion(mixes=True, smoothing=0.1),
        world=world,
        precision=Precision("fp32", world.device),
        accumulate=accumulate,
        clip=1.0,
        ema=ModelEmaV3(model, decay=0.9),
    )
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def micro(work):
        x = images[torch.from_numpy(work.indices // 3)].clone()
        erase(x, work.indices, probability=0.5, seed=1, epoch=work.epoch)
        target = torch.from_numpy((work.indices // 3 % 5).astype(np.int64))
        x, target = mixer(x, target, epoch=work.epoch, index=int(work.indices[0]))
        return x, target.double(), partial(depth, work.indices, epoch=work.epoch, device=world.device)

    works = list(
        batches(
            40,
            seed=1,
            repeats=3,
            batch_size=payload["batch_size"],
            accumulate=accumulate,
            rank=world.rank,
            ranks=world.size,
            start=(0, 0),
            epochs=1,
        )
    )
    losses = []
    for s in range(payload["steps"]):
        outcome = step(map(micro, works[s * accumulate : (s + 1) * accumulate]))
        assert outcome.ok
        losses.append(float(outcome.loss))
    if world.main:
        state = {**model.state_dict(), **{f"ema.{k}": v for k, v in step.ema.module.state_dict().items()}}
        torch.save({"losses": losses, "state": state}, payload["path"] / f"{world.size}.pt")
    world.barrier()
    return 0
