"""What tests run on every rank of a real process group. Imports little, since every rank is a process."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from reads import Reads

from mocov3.distributed import SynchronisedBatchNorm, synchronise_batch_norm


def batch_norm(world, _):
    """Synchronised batch norm against torch's over the whole batch, forward, backward and statistics."""
    torch.manual_seed(5)
    for shape in ((8, 6), (8, 6, 3, 4)):
        for affine in (True, False):
            kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
            whole = kind(shape[1], affine=affine).double()
            if affine:
                torch.nn.init.normal_(whole.weight)
                torch.nn.init.normal_(whole.bias)
            ours = torch.nn.Sequential(kind(shape[1], affine=affine).double())
            ours[0].load_state_dict(whole.state_dict())
            keys = list(ours.state_dict())
            ours = synchronise_batch_norm(ours)
            assert isinstance(ours[0], SynchronisedBatchNorm)
            assert list(ours.state_dict()) == keys
            x = torch.randn(shape, dtype=torch.float64) + 3
            weights = torch.randn(shape, dtype=torch.float64)
            part = slice(world.rank * 4, world.rank * 4 + 4)
            a, b = x.clone().requires_grad_(), x[part].clone().requires_grad_()
            for _ in range(2):
                out, mine = whole(a), ours(b)
            assert torch.allclose(mine, out[part], rtol=1e-12, atol=1e-12)
            (out * weights).sum().backward()
            (mine * weights[part]).sum().backward()
            assert torch.allclose(b.grad, a.grad[part], rtol=1e-10, atol=1e-12)
            for p, q in zip(ours[0].parameters(), whole.parameters(), strict=True):
                assert torch.allclose(world.sum(p.grad), q.grad, rtol=1e-10, atol=1e-12)
            for p, q in zip(ours[0].buffers(), whole.buffers(), strict=True):
                assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
            ours.eval()
            whole.eval()
            assert torch.allclose(ours(x), whole(x), rtol=1e-12)
    _batch_norm_calls()
    return 0


def _batch_norm_calls():
    """A synchronised layer communicates once in each direction, 2 numbers a channel and a count, and reads nothing."""
    layer = synchronise_batch_norm(torch.nn.Sequential(torch.nn.BatchNorm2d(6)))
    sent = []

    def count(call):
        def counted(*args, **kwargs):
            sent.append((call.__name__, args[-1].numel() * args[-1].element_size()))
            return call(*args, **kwargs)

        return counted

    with (
        patch.object(dist, "all_gather", count(dist.all_gather)),
        patch.object(dist, "all_reduce", count(dist.all_reduce)),
        Reads() as reads,
    ):
        layer(torch.randn(4, 6, 3, 3, requires_grad=True)).square().sum().backward()
    assert sent == [("all_gather", 4 * (2 * 6 + 1)), ("all_reduce", 4 * 2 * 6)], sent
    assert not reads.found, reads.found


def few_steps(world, payload):
    """Three steps of a model (one in float32) on this rank's part of fixed batches; rank 0 saves what came of it."""
    from mocov3 import models
    from mocov3.distributed.sharding import is_sharded, whole
    from mocov3.models.lora import add_pairs
    from mocov3.models.precision import Precision
    from mocov3.pretraining.preserve import Preservation
    from mocov3.pretraining.sharded_lars import shard_model, sharded_optimizer
    from mocov3.pretraining.step import Step

    arch, dims, optimizer, dtype, lr, mode, path = payload
    torch.manual_seed(3)
    dims = dict(dims)
    rank, whole_blocks = dims.pop("lora", 0), dims.pop("unfreeze_last", 0)
    weight = dims.pop("preserve", 0.0)
    small = dims.pop("local", 0)
    model = models.build(arch, dim=16, mlp_dim=32, temperature=0.2, **dims).to(dtype)
    preservation = Preservation(models.build_backbone(arch, **dims).to(dtype), weight) if weight else None
    if rank:
        add_pairs(model.base_encoder, rank, whole_blocks)
    if world.size > 1:
        synchronise_batch_norm(model)
        if preservation:
            synchronise_batch_norm(preservation.start)
    if "fsdp" in mode:
        shard_model(model, world)
        assert is_sharded(model)
    made = (sharded_optimizer if "fsdp" in mode else _plain)(
        model.parameters(), optimizer, world=world, weight_decay=0.1, momentum=0.9
    )
    micro = {1: 3, 2: 2, 4: 1}[world.size] if "micro" in mode else 0
    precision = Precision("fp32", world.device)
    step = Step(model.train(), made, world=world, precision=precision, micro_batch=micro, preservation=preservation)
    losses, norms, first = [], [], None
    for i in range(3 if dtype == torch.float64 else 1):
        generator = torch.Generator().manual_seed(i)
        part = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        views = [torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)[part] for _ in "12"]
        local = None
        if small:  # three local views, a view after the other
            whole_batch = torch.randn(3, 8, 3, small, small, generator=generator, dtype=torch.float64).to(dtype)
            local = whole_batch[:, part].flatten(0, 1)
        outcome = step(*views, local, lr=lr, m=0.9)
        assert outcome.ok
        losses.append(float(world.sum(outcome.loss) / world.size))
        if preservation:
            drift = float(world.sum(outcome.statistics.drift) / world.size)
            assert drift > 0.1
            losses.append(drift)
        norms.append(outcome.grad_norms.tolist())
        if first is None:
            first = {k: v.clone() for k, v in whole(model.state_dict()).items()}
    last = whole(model.state_dict())
    if world.main:
        torch.save({"losses": losses, "norms": norms, "first": first, "last": last}, path)
    world.barrier()
    return 0


def _plain(params, name, *, world, **settings):
    from mocov3.optim import build_optimizer

    return build_optimizer(params, name, **settings)


def each(world, payloads):
    """``few_steps`` for every payload, in one group of processes."""
    return max(few_steps(world, payload) for payload in payloads)


def bad_on_one_rank(world, _):
    """A NaN in one rank's images: no rank's weights move, and all count the step."""
    from mocov3 import models
    from mocov3.models.precision import Precision
    from mocov3.optim import build_optimizer
    from mocov3.pretraining.step import Step

    torch.manual_seed(3)
    model = synchronise_batch_norm(models.build("resnet10_w32", dim=8, mlp_dim=16)).train()
    made = build_optimizer(model.parameters(), "adamw", weight_decay=0.1, momentum=0.9)
    step = Step(model, made, world=world, precision=Precision("fp32", world.device))
    for i in range(4):
        views = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(10 * world.rank + i)) for _ in "12"]
        bad = i in (1, 2)
        if bad and world.rank == 1:
            views[1][2] = float("nan")
        before = [p.clone() for p in (*model.base_encoder.parameters(), *model.predictor.parameters())]
        outcome = step(*views, lr=1e-3, m=0.9)
        after = [*model.base_encoder.parameters(), *model.predictor.parameters()]
        assert bool(outcome.ok) != bad
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bad
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert step.skipped == 2


def heads(world, path):
    """Ten steps of heads in float64 on this rank's uneven parts, one batch smaller than the ranks; rank 0 saves."""
    from mocov3.evaluation.linear.heads import Heads, HeadSpec

    specs = [HeadSpec(kind, lr, 1e-3) for kind in ("linear", "bn-linear") for lr in (0.1, 1.0)]
    made = Heads(specs, width=6, classes=3, seed=1, momentum=0.9, world=world, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for n in (7, 8, 1, 5, 7, 7, 7, 3, 7, 7):
        x = torch.randn(n, 6, generator=generator, dtype=torch.float64) + 1
        y = torch.randint(3, (n,), generator=generator)
        part = slice(world.rank * n // world.size, (world.rank + 1) * n // world.size)
        made.step(x[part], y[part], lr_factor=1.0)
    findings = _findings(world)
    if world.main:
        torch.save({**made.state(), "findings": findings}, path)
    world.barrier()
    return 0


def _findings(world):
    """Heads and a step of fine-tuning on several findings an image, some unknown, in float64; and what all score."""
    from mocov3.evaluation.linear import scores
    from mocov3.evaluation.linear.heads import Heads, HeadSpec
    from mocov3.evaluation.linear.log import FINDINGS
    from mocov3.finetuning.model import build_criterion
    from mocov3.finetuning.step import TuneStep
    from mocov3.models.precision import Precision
    from mocov3.output.terminal import Terminal

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(-1, 2, (40, 3), generator=generator)
    y[:20, 1:] = -1  # known of other images than those of the second half
    made = Heads(
        [HeadSpec("linear", 0.5, 0.0)], width=6, classes=3, seed=1, momentum=0.9, world=world, dtype=torch.float64
    )
    for n in (40, 7, 40, 33):
        part = slice(world.rank * n // world.size, (world.rank + 1) * n // world.size)
        made.step(x[part], y[part], lr_factor=1.0)
    half = slice(world.rank * 40 // world.size, (world.rank + 1) * 40 // world.size)
    terminal = Terminal("quiet", epochs=1, iterations=1, active=False)
    found = scores.evaluated(made, [(x[half], y[half])], world, terminal, 10, FINDINGS)[0]
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 3).double()
    step = TuneStep(
        network,
        torch.optim.SGD(network.parameters(), lr=1.0),
        build_criterion(mixes=True, smoothing=0.1, findings=True),
        world=world,
        precision=Precision("fp32", world.device),
        accumulate=2 // world.size,
    )
    halves = [slice(0, 20), slice(20, 40)][world.rank :: world.size]
    outcomes = [step([(x[rows], y[rows], lambda: None) for rows in halves]) for _ in range(3)]
    tuned = [*network.state_dict().values(), torch.stack([outcome.loss for outcome in outcomes])]
    return [made.weights[0].detach(), torch.tensor(found, dtype=torch.float64), *tuned]


def differing(world, _):
    """Ranks of another flag, other images, or the same but for what may differ."""
    from mocov3.config import PretrainConfig
    from mocov3.distributed.agreement import check_agreement
    from mocov3.errors import UserError

    second = world.rank == 1
    check_agreement(world, PretrainConfig(data=f"/mnt/{world.rank}", workers=world.rank + 1), {"images": "a"})
    cases = [
        (PretrainConfig(lr=0.5 if second else 0.6), "a", "ranks differ in --lr: 0.6 on rank 0; 0.5 on rank 1;"),
        (PretrainConfig(micro_batch="auto" if second else 0), "a", "in --micro-batch: 0 on rank 0; 'auto' on rank 1;"),
        (PretrainConfig(), "b" if second else "a", "in images: a on rank 0; b on rank 1; every machine needs"),
        (PretrainConfig(recipe="auto", epochs=10 + world.rank), "a", "--recipe auto measures on each rank"),
    ]
    for config, digest, message in cases:
        try:
            check_agreement(world, config, {"images": digest})
        except UserError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    return 0
