"""Local views: their draws and pixels, their loss against a plain loop, parts, memory, and runs that resume."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY

from mocov3 import models
from mocov3.cli import main
from mocov3.config import PretrainConfig
from mocov3.config.local_views import LocalViews
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.device import colours
from mocov3.data.loading.loader import batches
from mocov3.data.views.draws import draw
from mocov3.distributed import World
from mocov3.errors import UserError
from mocov3.models.precision import Precision
from mocov3.pretraining.footprint import footprint
from mocov3.pretraining.gradients import MicroBatches, WholeBatch
from mocov3.weights.checkpoint import read

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
NETWORKS = {
    "resnet": ("resnet10_w16", {}),
    "vit": ("vit_small", {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
}


def build(kind, weight=0.7):
    torch.manual_seed(3)
    arch, dims = NETWORKS[kind]
    return models.build(arch, dim=8, mlp_dim=16, temperature=0.2, local_weight=weight, **dims).double().train()


def batch(images=6, count=3, side=16):
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(images, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in "12")
    return x1, x2, torch.randn(count * images, 3, side, side, generator=generator, dtype=torch.float64)


def by_hand(model, x1, x2, local, m):
    """Equation by equation: every query, every key, one at a time."""
    tau, n = model.temperature, len(x1)
    queries = [model.predictor(model.base_encoder(x)) for x in (x1, x2)]
    locals_ = model.predictor(model.base_encoder(local))
    with torch.no_grad():
        for k, q in zip(model.momentum_encoder.parameters(), model.base_encoder.parameters(), strict=True):
            k.copy_(m * k + (1 - m) * q)
        keys = [model.momentum_encoder(x) for x in (x1, x2)]

    def cross_entropy(q, i, view):
        cosines = torch.stack([q @ k / (q.norm() * k.norm()) for k in keys[view]]) / tau
        return torch.logsumexp(cosines, 0) - cosines[i]

    total = sum(2 * tau * cross_entropy(queries[v][i], i, 1 - v) / n for v in (0, 1) for i in range(n))
    of_local = [2 * tau * cross_entropy(q, j % n, v) for j, q in enumerate(locals_) for v in (0, 1)]
    return total + model.local_weight * sum(of_local) / len(locals_)


def apart(got, want):
    assert list(got) == list(want)
    return max(
        float((got[k] - want[k]).double().norm() / want[k].double().norm())
        for k in want
        if not k.endswith(("encoder.norm.bias", "predictor.1.running_mean")) and float(want[k].double().norm()) > 0
    )


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_loss_is_what_a_plain_loop_computes(kind):
    ours, plain, without = (build(kind) for _ in range(3))
    loss, statistics = WholeBatch(ours, world=ALONE, precision=Precision("fp32", CPU))(*batch()[:2], 0.9, batch()[2])
    want = by_hand(plain, *batch(), 0.9)
    want.backward()
    assert float(loss) == pytest.approx(want.item(), rel=1e-9)
    assert apart(gradients(ours), gradients(plain)) <= 1e-9
    assert statistics.queries == 12
    # running statistics are those of a step without local views
    without.contrast(*batch()[:2], 0.9)
    for (name, buffer), other in zip(ours.named_buffers(), without.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert all(m.track_running_stats for m in ours.modules() if hasattr(m, "track_running_stats"))


@pytest.mark.parametrize("size", [2, 4, 6, 64])
def test_micro_batches_are_the_whole_batch(size):
    whole, parts = build("vit"), build("vit")
    x1, x2, local = batch()
    loss, _ = WholeBatch(whole, world=ALONE, precision=Precision("fp32", CPU))(x1, x2, 0.9, local)
    got, _ = MicroBatches(parts, world=ALONE, precision=Precision("fp32", CPU), size=size)(x1, x2, 0.9, local)
    assert float(got) == pytest.approx(float(loss), rel=1e-9)
    assert apart(gradients(parts), gradients(whole)) <= 1e-9
    assert apart(dict(parts.named_buffers()), dict(whole.named_buffers())) <= 1e-9


def test_micro_batches_of_batch_norm_are_the_network_that_takes_parts():
    ours, plain = build("resnet"), build("resnet")
    x1, x2, local = batch()
    got, _ = MicroBatches(ours, world=ALONE, precision=Precision("fp32", CPU), size=3)(x1, x2, 0.9, local)
    features = [torch.cat([plain.features(part) for part in x.split(3)]) for x in (x1, x2, local)]
    queries = [plain.queries(f) for f in features]
    plain.update_momentum_encoder(0.9)
    keys = [plain.keys(torch.cat([plain.key_features(part) for part in x.split(3)])) for x in (x1, x2)]
    want, _ = plain.loss(queries[:2], keys, queries[2])
    want.backward()
    assert float(got) == pytest.approx(float(want), rel=1e-9)
    assert apart(gradients(ours), gradients(plain)) <= 1e-9
    # backbone statistics: two views' worth of batches, none of the local ones
    assert int(ours.base_encoder.bn1.num_batches_tracked) == 2
    fresh = build("resnet")
    expected = fresh.base_encoder.bn1.running_mean
    for x in (x1, x2):
        expected = 0.9 * expected + 0.1 * fresh.base_encoder.conv1(x).mean((0, 2, 3))
    assert torch.allclose(ours.base_encoder.bn1.running_mean, expected, rtol=1e-9, atol=1e-12)


def test_a_views_own_size_has_the_places_of_strips():
    """A view of the full size is what it is by timm; of half the size its tokens lie between the grid's."""
    model = build("vit").base_encoder
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = model._tokens_of_size(x)
    assert torch.allclose(tokens, model._pos_embed(model.patch_embed(x)), atol=1e-6)  # there the table is float32
    small = model._tokens_of_size(x[..., :16, :16])
    cls, *patches = (model.cls_token[0, 0], *model.patch_embed.proj(x[..., :16, :16])[0].flatten(1).T)
    omega = 10000.0 ** -(torch.arange(6, dtype=torch.float64) / 6)
    places = [(row, column) for row in (0.5, 2.5) for column in (0.5, 2.5)]
    for token, patch, (row, column) in zip(small[0, 1:], patches, places, strict=True):
        table = torch.cat([f(v * omega) for v in (row, column) for f in (torch.sin, torch.cos)])
        assert torch.allclose(token, patch + table, atol=1e-6)
    assert torch.allclose(small[0, 0], cls)


def test_draws_are_functions_of_the_image_and_lie_in_their_bounds():
    preset = PretrainConfig().preset
    where = {"seed": 5, "epoch": 1}
    two = [draw(preset, 0.2, 300, 200, index=i, view=v, **where) for i in range(200) for v in (0, 1)]
    settings = {"crop_max": 0.3, **where}
    small = [draw(preset, 0.05, 300, 200, index=i, view=2 + v, **settings) for i in range(200) for v in (0, 1)]
    assert [draw(preset, 0.05, 300, 200, index=i, view=2, **settings) for i in range(200)] == small[::2]
    shares = np.array([d.height * d.width / 60000 for d in small])
    assert 0.045 < shares.min() < 0.08
    assert 0.25 < shares.max() < 0.31
    assert len({(d.top, d.left, d.height, d.width) for d in (*two, *small)}) > 780
    for view, blurred in ((0, 1.0), (1, 0.1)):  # as view 1, as view 2, in turn
        assert np.mean([d.blur_sigma is not None for d in small[view::2]]) == pytest.approx(blurred, abs=0.07)


@pytest.mark.parametrize("crop_only", [False, True])
def test_the_loader_hands_over_local_views(images, crop_only):
    source = open_source(str(images))
    works = list(batches(len(source), seed=9, batch_size=17, rank=0, ranks=1, start=(0, 0), epochs=1))
    local = LocalViews(3, 12, 0.05, 0.4)
    views, plain = TwoViews(32, 0.2, crop_only=crop_only, local=local), TwoViews(32, 0.2)
    whole = TwoViews(32, 0.2, local=local)
    for workers in (0, 2):
        with Loader(source, views, batch_size=17, seed=9, workers=workers) as loader:
            for made in loader.run(works):
                assert made.local_pixels.shape == (3, 17, 12, 12, 3)
                for place, index in ((0, int(made.work.indices[0])), (16, int(made.work.indices[16]))):
                    data = source.read(index)
                    wanted = whole(data, seed=9, epoch=0, index=index)
                    assert len(wanted) == 5
                    for view, (got, want) in enumerate(zip((*made.pixels, *made.local_pixels), wanted, strict=True)):
                        check_view(got[place], want, made.colour_draws, view, place)
                    if not crop_only:  # the two views do not know of local ones
                        a, b = plain(data, seed=9, epoch=0, index=index)
                        assert np.array_equal(made.pixels[0, place], a)
                        assert np.array_equal(made.pixels[1, place], b)


def check_view(got, want, draws, view, place):
    if draws is None:
        assert np.array_equal(got, want)
        return
    assert draws.shape == (5, 17, 12)
    x = torch.from_numpy(got[None].copy()).permute(0, 3, 1, 2)
    done = colours.apply(x, draws[view, place : place + 1].copy())[0].permute(1, 2, 0).numpy()
    assert np.abs(done - want).mean() <= 2


@pytest.mark.parametrize("kind", NETWORKS)
def test_memory_counts_what_local_views_keep(kind):
    model = build(kind, 1.0)

    def kept(x):
        sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(t):
            if t.untyped_storage().data_ptr() not in weights:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.features(x)
        return sum(s.nbytes() for s in sizes.values()) - x.nbytes

    model.float()
    arch, dims = NETWORKS[kind]
    counted, without = (
        footprint(lambda: models.build(arch, dim=8, mlp_dim=16, **dims), 32, optimizer="lars", local=local)
        for local in (LocalViews(4, 16, 0.05, 0.4), None)
    )
    assert counted.local_backbone == pytest.approx(kept(torch.randn(20, 3, 16, 16)) / 20, rel=0.03)
    assert (counted.backbone, counted.weights) == (without.backbone, without.weights)
    grown = counted.peak(64) - without.peak(64)
    assert (
        64 * 4 * counted.local_backbone < grown < 1.3 * 64 * 4 * (counted.local_backbone + counted.heads + 4 * 3 * 256)
    )
    assert without.peak(64, 16) <= counted.peak(64, 16) < counted.peak(64)


def test_resumes_are_bit_exact(images, tmp_path):
    flags = [str(images), *TINY, "--local-views", "2:16", "--local-weight", "0.5"]
    flags += ["--views-on", "device", "--image-size-schedule", "16:0.5"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main(["pretrain", *flags, "--output-dir", str(straight)]) == 0
    for steps in (["--max-steps", "3"], ["-j", "1"]):
        assert main(["pretrain", *flags, *steps, "--resume", "auto", "--output-dir", str(stopped)]) == 0
    a, b = (read(folder / "checkpoint_0001.pth.tar") for folder in (straight, stopped))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    start = 1.5 * 4 * 1.0 * math.log(16)
    assert lines[0]["loss_start"] == pytest.approx(start)
    assert 0.5 * start < lines[0]["loss"] < 1.1 * start
    changed = [*flags, "--local-views", "3:16", "--resume", "auto", "--output-dir", str(stopped)]
    assert main(["pretrain", *changed]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"local_views": "many"}, "takes N, N:PIXELS or"),
        ({"local_views": "2:96:0.1-0.2:1"}, "takes N, N:PIXELS or"),
        ({"local_views": "2:96:nan-0.2"}, "give shares above 0"),
        ({"local_views": "0"}, "takes 1 to 64 views"),
        ({"local_views": "2:500"}, "give a side from 1 to --image-size 224"),
        ({"local_views": "2:90", "arch": "vit_small"}, "from 16 to --image-size 224 that patches of 16 px divide"),
        ({"local_views": "2:96:0.5-0.2"}, "the smaller first"),
        ({"local_views": "2", "view_preset": "inspection"}, "the whole object"),
        ({"local_views": "2", "view_preset": "gray"}, "the whole object"),
        ({"local_views": "2:96", "image_size_schedule": "64:0.5"}, "smaller than local views of 96"),
    ],
)
def test_local_views_that_mean_nothing(flags, message):
    with pytest.raises(UserError, match=message) as error:
        PretrainConfig(**{"arch": "resnet50", **flags}).check()
    assert "\n" not in str(error.value)


def test_local_views_by_default_keep_the_ratio_of_their_papers():
    config = PretrainConfig(local_views="6")
    assert config.local == LocalViews(6, 96, 0.05, 0.4)
    assert PretrainConfig(arch="vit_tiny", image_size=32, patch_size=4, local_views="2").local.pixels == 12
    assert PretrainConfig().local is None
    with pytest.raises(UserError, match="give another --local-views"):
        models.backbones.check_local_views(
            models.build("timm/vit_tiny_patch16_224", image_size=32, depth=1).base_encoder,
            "timm/vit_tiny_patch16_224",
            16,
            3,
        )
