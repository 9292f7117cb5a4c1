"""--preserve: features stay near the starting network's; one pass, micro-batches, files, resume."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from doors import refused

from mocov3 import models
from mocov3.cli import main
from mocov3.distributed import World
from mocov3.models.compiled import compile_features
from mocov3.models.precision import Precision
from mocov3.optim import build_optimizer
from mocov3.pretraining.gradients import MicroBatches, WholeBatch
from mocov3.pretraining.preserve import Preservation
from mocov3.pretraining.step import Step
from mocov3.weights import checkpoint

ALONE = World(0, 1, torch.device("cpu"))
FLAGS = ["--image-size", "32", "-b", "16", "--moco-dim", "8", "--moco-mlp-dim", "16", "--epochs", "2", "--logger"]
FLAGS += ["none", "--warmup-epochs", "0", "--optimizer", "adamw", "--seed", "3", "--recipe", "defaults", "-j", "0"]
FLAGS += ["-p", "1", "--device", "cpu", "-a", "resnet10_w16"]
NETWORKS = {
    "vit": ("vit_small", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "resnet": ("resnet10_w16", {}),
    "timm": ("timm/vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 3}),
    "timm, no tokens": ("timm/resnet10t", {}),
}


def small(kind, dtype=torch.float64):
    arch, dims = NETWORKS[kind]
    torch.manual_seed(0)
    return models.build(arch, image_size=32, dim=8, mlp_dim=16, temperature=0.2, **dims).to(dtype).train()


def moved(model, amount=0.3):
    """The starting network, and the model's query encoder moved away from it."""
    start = copy.deepcopy(model.base_encoder)
    with torch.no_grad():
        for p in model.base_encoder.parameters():
            p.add_(amount * p.std().nan_to_num() * torch.randn_like(p))
    return start


def views(images=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, images, 3, 32, 32, generator=generator, dtype=torch.float64)


def gradients(model, made, x1, x2):
    for p in model.parameters():
        p.grad = None
    loss, statistics = made(x1, x2, 0.9)
    return loss, statistics.drift, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_mean_is_that_of_the_patches(kind):
    model = small(kind).eval()
    x, encoder = views(3)[0], model.base_encoder
    features, mean = encoder.features_and_mean(x)
    assert torch.allclose(features, encoder.features(x), atol=1e-12)
    if "timm" not in kind and kind != "resnet":
        assert torch.allclose(mean, encoder.forward_features(x)[:, 1:].mean(1), atol=1e-12)
    elif kind == "timm":
        assert torch.allclose(mean, encoder.backbone.forward_features(x)[:, 1:].mean(1), atol=1e-12)
    else:
        assert torch.allclose(mean, features, atol=1e-12), "a map's mean is its feature"


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_gradient_is_that_of_both_losses(kind):
    """Against the sum written out: contrastive loss + weight × mean distance of the first view's features."""
    model, (x1, x2) = small(kind), views()
    start = moved(model)
    other = copy.deepcopy(model)
    loss, drift, found = gradients(
        model,
        WholeBatch(
            model, world=ALONE, precision=Precision("fp32", ALONE.device), preservation=Preservation(start, 3.0)
        ),
        x1,
        x2,
    )
    plain, _ = other.contrast(x1, x2, 0.9)
    reference = copy.deepcopy(start).train()
    features, patches = other.base_encoder.features_and_mean(x1)
    with torch.no_grad():
        wanted = reference.features_and_mean(x1)
    cosine = [F.cosine_similarity(a, b, dim=1) for a, b in zip((features, patches), wanted, strict=True)]
    distance = (1 - 0.5 * cosine[0] - 0.5 * cosine[1]).mean()
    (plain + 3 * distance).backward()
    assert loss == pytest.approx(plain.item(), rel=1e-12), "the loss that is reported is the contrastive one"
    assert drift == pytest.approx(distance.item(), rel=1e-9)
    assert float(drift) > 0.01
    for name, p in other.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, rtol=1e-8, atol=1e-12), name


def test_micro_batches_agree():
    model, (x1, x2) = small("vit"), views()
    kept = Preservation(moved(model), 2.0)
    settings = {"world": ALONE, "precision": Precision("fp32", ALONE.device), "preservation": kept}
    state = copy.deepcopy(model.state_dict())
    one = gradients(model, WholeBatch(model, **settings), x1, x2)
    model.load_state_dict(state)
    many = gradients(model, MicroBatches(model, size=3, **settings), x1, x2)
    assert many[0] == pytest.approx(float(one[0]), rel=1e-12)
    assert many[1] == pytest.approx(float(one[1]), rel=1e-12)
    assert one[2].keys() == many[2].keys()
    assert all(torch.allclose(many[2][n], g, rtol=1e-9, atol=1e-12) for n, g in one[2].items())


@pytest.mark.parametrize(("kind", "micro_batch"), [("vit", 0), ("vit", 3), ("resnet", 0)])
def test_it_holds_features_back(kind, micro_batch):
    """Twenty steps at a high rate: the distance begins at 0, and stays far smaller where it is weighed."""
    drifts = {}
    for weight in (1e-9, 30.0):
        model = small(kind, torch.float32)
        kept = Preservation(copy.deepcopy(model.base_encoder), weight)
        before = {k: v.clone() for k, v in kept.start.named_parameters()}
        step = Step(
            model,
            build_optimizer(model.parameters(), "adamw", weight_decay=0.0, momentum=0.9),
            world=ALONE,
            precision=Precision("fp32", ALONE.device),
            micro_batch=micro_batch,
            preservation=kept,
        )
        x1, x2 = views().float()
        drifts[weight] = [float(step(x1, x2, lr=3e-3, m=0.9).statistics.drift) for _ in range(20)]
        assert all(torch.equal(v, before[k]) for k, v in kept.start.named_parameters())
        assert abs(drifts[weight][0]) < 1e-5
    assert drifts[30.0][-1] < 0.3 * drifts[1e-9][-1]


def test_a_compiled_start_is_the_same():
    model, (x1, x2) = small("vit", torch.float32), views().float()
    start = moved(model)
    settings = {"world": ALONE, "precision": Precision("fp32", ALONE.device)}
    state = copy.deepcopy(model.state_dict())
    eager = gradients(
        model, WholeBatch(model, **settings, preservation=Preservation(copy.deepcopy(start), 2.0)), x1, x2
    )
    model.load_state_dict(state)
    kept, graphs = Preservation(start, 2.0), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_features([model.base_encoder, kept.start], backend, method="features_and_mean")
    compiled = gradients(model, WholeBatch(model, **settings, preservation=kept), x1, x2)
    assert len(graphs) >= 2
    assert compiled[1] == pytest.approx(float(eager[1]), rel=1e-5)
    assert all(torch.allclose(compiled[2][n], g, rtol=1e-4, atol=1e-6) for n, g in eager[2].items())


@pytest.fixture(scope="module")
def base(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    flags = [*FLAGS, "--quiet", "--max-steps", "1", "--output-dir", str(folder)]
    assert main(["pretrain", str(images), *flags]) == 0
    return next(folder.glob("checkpoint_*"))


def test_a_resume_is_bit_equal(images, base, tmp_path, capsys):
    flags = ["pretrain", str(images), *FLAGS, "--init", str(base), "--preserve", "2", "--lr", ".05"]
    flags += ["--checkpoint-steps", "2", "--micro-batch", "6"]
    assert main([*flags, "--max-steps", "4", "--output-dir", str(tmp_path / "a")]) == 0
    assert main([*flags, "--max-steps", "2", "--output-dir", str(tmp_path / "b")]) == 0
    assert main([*flags, "--max-steps", "4", "--output-dir", str(tmp_path / "b"), "--resume", "auto"]) == 0
    one, two = (checkpoint.read(checkpoint.newest(tmp_path / name)[0]) for name in "ab")
    assert all(torch.equal(v, two["state_dict"][k]) for k, v in one["state_dict"].items())
    drifts = [json.loads(line)["drift"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert len(drifts) == 4
    assert abs(drifts[0]) < 1e-5 < drifts[-1]
    assert "drift 0." in capsys.readouterr().out


def test_the_start_must_be_there_as_it_was(images, base, tmp_path):
    init = tmp_path / "init.pth.tar"
    init.write_bytes(base.read_bytes())
    run = ["pretrain", str(images), *FLAGS, "--quiet", "--init", str(init), "--preserve", "1", "--output-dir"]
    assert main([*run, str(tmp_path / "r"), "--max-steps", "1"]) == 0
    other = checkpoint.read(init)
    other["state_dict"]["module.base_encoder.conv1.weight"] += 1
    torch.save(other, init)
    resumed = [*run, str(tmp_path / "r"), "--max-steps", "2", "--resume", "auto"]
    assert "holds other weights than when this run began" in refused(*resumed)
    init.unlink()
    assert "no such file" in refused(*resumed)
    assert "--preserve" in refused("pretrain", images, *FLAGS, "--preserve", "1", "--output-dir", tmp_path / "q")
    assert "--fsdp" in refused(*run, tmp_path / "q", "--fsdp", "--init", base)
