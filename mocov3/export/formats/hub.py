"""The format of the transformers library: a folder for ``from_pretrained``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from mocov3.config.archs import VITS, is_resnet
from mocov3.export.formats.base import Exported, Format, Unfit
from mocov3.export.formats.weights import ELSEWHERE, VIT_EPS, check_stem
from mocov3.weights import key_tables


class Transformers(Format):
    """A folder for ``ViTModel`` or ``ResNetModel``, with the matching image processor."""

    tolerance = 1e-5
    own = "AutoImageProcessor"
    own_note = (
        "Where the border is odd (3 pixels more than a multiple of 4), most versions of transformers cut the centre "
        "out one pixel beside ours. Version 5 resizes otherwise, by a grey level, unless loaded with backend='pil'. "
        "It neither turns an open image by EXIF nor scales 16 bits."
    )

    def fits(self, model: Exported) -> None:
        """Plain ViTs, and ResNets without groups or extra width."""
        if model.classes:
            raise Unfit("it is written without classifier; leave --classifier out, or take timm, torchvision or onnx")
        if model.arch not in VITS and not is_resnet(model.arch):
            raise Unfit(f"transformers has no such model; torchvision or timm may have, or {ELSEWHERE}")
        if "wide" in model.arch or "next" in model.arch:
            raise Unfit("its ResNetModel has neither groups nor extra width; take timm or torchvision")
        check_stem(model)

    def write(self, model: Exported, place: Path) -> None:
        """The folder."""
        place.mkdir()
        rows = key_tables.RESNET_TRANSFORMERS if is_resnet(model.arch) else key_tables.VIT_TRANSFORMERS
        state = {k: v.contiguous() for k, v in key_tables.translate(model.state(), rows).items()}
        safetensors.torch.save_file(state, place / "model.safetensors", metadata={"format": "pt", **model.about()})
        self.config(model).save_pretrained(place)
        if model.in_chans != 3:
            return  # its image processors know RGB only: better none than one that is wrong
        size = model.image_size
        processor = {
            "_comment": f"Near, not exact; README.md has exact code. {self.own_note}",
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": model.resized},
            "resample": int(model.view.resample),
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": model.mean,
            "image_std": model.std,
        }
        (place / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")

    @staticmethod
    def config(model: Exported) -> Any:
        """transformers' configuration of the arch."""
        from transformers import ResNetConfig, ViTConfig

        if is_resnet(model.arch):
            encoder: Any = model.encoder
            stages = [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
            basic = isinstance(encoder.layer1[0], BasicBlock)
            widths = [stage[-1].conv2.out_channels * stage[-1].expansion for stage in stages]
            return ResNetConfig(
                num_channels=model.in_chans,
                embedding_size=encoder.conv1.out_channels,
                hidden_sizes=widths,
                depths=[len(stage) for stage in stages],
                layer_type="basic" if basic else "bottleneck",
                architectures=["ResNetModel"],
            )
        width = model.encoder.num_features
        return ViTConfig(
            num_channels=model.in_chans,
            hidden_size=width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=4 * width,
            layer_norm_eps=VIT_EPS,
            image_size=model.image_size,
            patch_size=model.patch_size,
            architectures=["ViTModel"],
        )

    def features(self, model: Exported, place: Path, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        """By ``from_pretrained``, which must find every key and know every one it finds."""
        from transformers import ResNetModel, ViTModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        resnet = is_resnet(model.arch)
        kind: Any = ResNetModel if resnet else ViTModel
        options = {} if resnet else {"add_pooling_layer": False}
        network, info = kind.from_pretrained(str(place), output_loading_info=True, **options)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise RuntimeError(f"transformers: {problem} {sorted(map(str, info[problem]))[:3]}")
        out = network.eval()(x)
        return out.pooler_output.flatten(1) if resnet else out.last_hidden_state[:, 0]

    def usage(self, model: Exported, name: str) -> str:
        """Model and features."""
        resnet = is_resnet(model.arch)
        kind, option = ("ResNetModel", "") if resnet else ("ViTModel", ", add_pooling_layer=False")
        features = "pooler_output.flatten(1)" if resnet else "last_hidden_state[:, 0]"
        return (
            f"from transformers import {kind}\n\n"
            f'model = {kind}.from_pretrained("{name}"{option}).eval()\n'
            f"features = model(pixel_values=images).{features}"
        )

    def prepared(self, place: Path, images: Sequence[Image.Image]) -> Tensor | None:
        """By the image processor, of the default backend; there is none for other than RGB."""
        if not (place / "preprocessor_config.json").exists():
            return None
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(str(place))
        prepared: Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
        return prepared
