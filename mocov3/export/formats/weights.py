"""Formats of weights: DeiT's, timm's, torchvision's, and ours as safetensors."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision.models as tv
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import ConvStemConfig

from mocov3.config.archs import CONV_VITS, HEADS, RESNETS, WIDTHS, is_resnet, is_vit
from mocov3.export.formats.base import Exported, Format, Unfit
from mocov3.models.backbones import build_backbone
from mocov3.weights import checkpoint, convert, key_tables

ELSEWHERE = "take deit, safetensors, onnx or torch-export"
VIT_EPS = 1e-6


def check_stem(model: Exported) -> None:
    """Refuse the stems for small images, which the libraries' ResNets do not have."""
    if model.small_stem or model.arch.startswith("resnet10_"):
        raise Unfit(f"its ResNets have no 3×3 stem for small images; {ELSEWHERE}")


class Deit(Format):
    """``{"model": …}`` with timm's names of keys, as DeiT's code reads."""

    tolerance = 1e-5

    def fits(self, model: Exported) -> None:
        """Every arch fits."""

    def write(self, model: Exported, place: Path) -> None:
        """One file of ``torch.save``."""
        state = model.state()
        checkpoint.write(place, {"model": state, **convert.heads_entry(model.dims.get("num_heads"), state)})

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Read back as any DeiT file is, into a fresh backbone."""
        return _ours(model, checkpoint.read(place)["model"], x)

    def usage(self, model: Exported, name: str) -> str:
        """For ``load_state_dict``."""
        heads = f", num_heads={model.heads}" if is_vit(model.arch) else ""
        options = f', arch="{model.arch}", image_size={model.image_size}{heads.replace("num_", "")}'
        return (
            f'import mocov3\n\nstate = torch.load("{name}", weights_only=True)["model"]\n'
            f"# model.load_state_dict(state, strict=False)  # of the same arch{heads}; only its classifier is missing\n"
            + _our_usage(model, name, options)
        )


class Safetensors(Format):
    """Our keys and, as metadata, arch, size, mean, std, licence and origin."""

    tolerance = 1e-5

    def fits(self, model: Exported) -> None:
        """Every arch fits."""

    def write(self, model: Exported, place: Path) -> None:
        """One file."""
        safetensors.torch.save_file(model.state(), place, metadata={"format": "pt", **model.about()})

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Loaded by safetensors into a fresh backbone."""
        return _ours(model, safetensors.torch.load(place.read_bytes()), x)  # load_file refuses names that are not UTF-8

    def usage(self, model: Exported, name: str) -> str:
        """By safetensors, or by us."""
        return (
            "import mocov3\nimport safetensors.torch\n\n"
            f"state = safetensors.torch.load_file(\"{name}\")  # names of keys are timm's and torchvision's\n"
            + _our_usage(model, name)
        )


def _our_usage(model: Exported, name: str, options: str = "") -> str:
    head = model.encoder.projector_name
    scores = f'\nscores = features @ state["{head}.weight"].T + state["{head}.bias"]' if model.classes else ""
    return f'features = mocov3.load_backbone("{name}"{options})(images){scores}'


def _ours(model: Exported, state: dict[str, Tensor], x: Tensor) -> Tensor:
    encoder = build_backbone(
        model.arch,
        image_size=model.image_size,
        patch_size=model.patch_size,
        small_stem=model.small_stem,
        in_chans=model.in_chans,
        **model.dims,
    )
    head = nn.Linear(encoder.num_features, model.classes) if model.classes else nn.Identity()
    setattr(encoder, encoder.projector_name, head)
    encoder.load_state_dict(state)
    return encoder.eval()(x)


class Timm(Format):
    """A folder with ``model.safetensors`` and ``config.json``, as timm publishes models."""

    tolerance = 1e-5
    own = "timm.data.create_transform"

    def fits(self, model: Exported) -> None:
        """Plain ViTs, ResNets with the usual stem, and timm's own."""
        if model.arch in CONV_VITS:
            raise Unfit(f"timm has no ViT with this convolutional stem; torchvision has, or {ELSEWHERE}")
        check_stem(model)

    def write(self, model: Exported, place: Path) -> None:
        """The folder."""
        place.mkdir()
        name, args = self.named(model)
        base: Any = timm.create_model(name, num_classes=0, **args).pretrained_cfg
        head = f"{base.get('classifier')}."  # beside timm's own networks our classifier is called projector
        state = {k.removeprefix("backbone.").replace("projector.", head): v for k, v in model.state().items()}
        safetensors.torch.save_file(state, place / "model.safetensors", metadata={"format": "pt", **model.about()})
        config = {
            "architecture": name,
            "num_classes": model.classes,
            "num_features": model.encoder.num_features,
            "model_args": args,
            "pretrained_cfg": {
                "tag": "mocov3",
                "num_classes": model.classes,
                **({"label_names": model.class_names} if model.class_names else {}),
                "input_size": [model.in_chans, model.image_size, model.image_size],
                "interpolation": model.interpolation,
                "crop_pct": crop_share(model.image_size, model.resized),
                "crop_mode": "center",
                "mean": model.mean,
                "std": model.std,
                "first_conv": base.get("first_conv"),
                "classifier": base.get("classifier"),
                "license": model.licence,
            },
        }
        (place / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @staticmethod
    def named(model: Exported) -> tuple[str, dict[str, Any]]:
        """timm's name of the arch, and the arguments that make it ours."""
        if model.arch.startswith("timm/"):
            name = model.arch.removeprefix("timm/")
            sized = getattr(getattr(model.encoder, "backbone", None), "patch_embed", None) is not None
            return name, {"img_size": model.image_size} if sized else {}
        if model.arch == "resnet10":
            return "resnet18", {"layers": [1, 1, 1, 1]}
        if is_resnet(model.arch):
            return model.arch, {}
        args: dict[str, Any] = {}
        arch = model.arch
        if arch == "vit_micro":  # which timm does not have
            arch, args = "vit_tiny", {"embed_dim": model.encoder.num_features, "depth": model.depth}
        if args or arch == "vit_small" or model.heads != HEADS[WIDTHS[model.arch]]:
            args["num_heads"] = model.heads
        if model.image_size != 224:
            args["img_size"] = model.image_size
        patch = 14 if model.arch == "vit_huge" else 16
        if model.patch_size != patch:
            args["patch_size"] = model.patch_size
        return f"{arch}_patch{patch}_224", args

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """By ``create_model`` with the file's path, which loads strictly."""
        name, args = self.named(model)
        file = str(place / "model.safetensors")
        network = timm.create_model(name, num_classes=model.classes, checkpoint_path=file, **args)
        return network.eval()(x)

    def usage(self, model: Exported, name: str) -> str:
        """Both of timm's ways, and feature maps."""
        arch, args = self.named(model)
        classes = model.classes
        extra = "".join(f", {k}={v!r}" for k, v in args.items())
        return (
            "import timm\n\n"
            f'model = timm.create_model("local-dir:{name}", pretrained=True)\n'
            f'model = timm.create_model("{arch}", num_classes={classes}{extra}, '
            f'checkpoint_path="{name}/model.safetensors")  # the same\n'
            f"{model.output} = model.eval()(images)\n"
            f'maps = timm.create_model("local-dir:{name}", pretrained=True, features_only=True).eval()(images)'
        )

    def prepared(self, place: Path, images: Sequence[Image.Image]) -> Tensor:
        """By the transform of the written configuration."""
        settings = json.loads((place / "config.json").read_text())["pretrained_cfg"]
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=settings))
        return torch.stack([transform(image) for image in images])


def crop_share(size: int, resized: int) -> float:
    """timm's ``crop_pct``: the share whose ``floor(size / share)`` is ``resized``."""
    share = size / resized
    return share if math.floor(size / share) == resized else math.nextafter(share, 0)


class Torchvision(Format):
    """A state dict for ``torchvision.models.ResNet`` or ``VisionTransformer``."""

    tolerance = 1e-5

    def fits(self, model: Exported) -> None:
        """Our ViTs, with convolutional stem or without, and ResNets with the usual stem."""
        if model.arch.startswith("timm/"):
            raise Unfit("torchvision has no timm models; take timm, safetensors, onnx or torch-export")
        if model.arch in CONV_VITS and model.patch_size != 16:
            raise Unfit("to torchvision convolutional stems for patches of 16 are written; take safetensors or onnx")
        check_stem(model)

    def write(self, model: Exported, place: Path) -> None:
        """One file of ``torch.save``."""
        state = model.state()
        checkpoint.write(
            place, state if is_resnet(model.arch) else key_tables.translate(state, key_tables.VIT_TORCHVISION)
        )

    @staticmethod
    def build(model: Exported) -> nn.Module:
        """torchvision's own class for the arch, its classifier removed."""
        network: nn.Module
        if is_resnet(model.arch):
            network = getattr(tv, model.arch)() if model.arch in RESNETS else tv.ResNet(BasicBlock, [1, 1, 1, 1])
            network.fc = nn.Linear(model.encoder.num_features, model.classes) if model.classes else nn.Identity()
            return network
        width = model.encoder.num_features
        stem = [ConvStemConfig(width // part, 3, 2) for part in (8, 4, 2, 1)] if model.arch in CONV_VITS else None
        network = tv.VisionTransformer(
            image_size=model.image_size,
            patch_size=model.patch_size,
            num_layers=model.depth,
            num_heads=model.heads,
            hidden_dim=width,
            mlp_dim=4 * width,
            norm_layer=partial(nn.LayerNorm, eps=VIT_EPS),
            conv_stem_configs=stem,
        )
        head = nn.Sequential()
        if model.classes:
            head.add_module("head", nn.Linear(width, model.classes))
        network.heads = head
        return network

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """By torchvision's class, loaded strictly."""
        network = self.build(model)
        network.load_state_dict(checkpoint.read(place))
        return network.eval()(x)

    def usage(self, model: Exported, name: str) -> str:
        """The constructor and what to drop."""
        imports = ""
        if model.arch in RESNETS:
            call, head = f"torchvision.models.{model.arch}()", "fc"
        elif is_resnet(model.arch):
            call, head = "torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])", "fc"
        else:
            width, head = model.encoder.num_features, "heads"
            stem = ""
            if model.arch in CONV_VITS:
                parts = ", ".join(f"ConvStemConfig({width // part}, 3, 2)" for part in (8, 4, 2, 1))
                stem = f", conv_stem_configs=[{parts}]"
                imports = "from torchvision.models.vision_transformer import ConvStemConfig\n"
            call = (
                f"torchvision.models.VisionTransformer({model.image_size}, {model.patch_size}, "
                f"{model.depth}, {model.heads}, {width}, {4 * width}{stem})"
            )
        top = "torch.nn.Identity()"
        if model.classes:
            top = f"torch.nn.Linear({model.encoder.num_features}, {model.classes})"
            head += ".head" if head == "heads" else ""
        return (
            f"import torchvision\n{imports}\nmodel = {call}\nmodel.{head} = {top}\n"
            f'model.load_state_dict(torch.load("{name}", weights_only=True))\n{model.output} = model.eval()(images)'
        )
