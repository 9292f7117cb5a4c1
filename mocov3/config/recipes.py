"""Recipes by name: the reference's (CONFIG.md there; its results on ImageNet-1k are the reference's) and ours.

A recipe holds only what differs from the defaults; any flag overrides it.
"""

from dataclasses import dataclass
from typing import Any

from mocov3.config.fields import Fields


@dataclass(frozen=True)
class Recipe:
    """Flags beyond the defaults, and the result the reference reports for them on ImageNet-1k, in %."""

    settings: Fields
    about: str
    reference_result: str = ""


_VIT: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1.5e-4,
    "weight_decay": 0.1,
    "epochs": 300,
    "warmup_epochs": 40,
    "stop_grad_conv1": True,
    "moco_m_cos": True,
    "moco_t": 0.2,
}

RECIPES: dict[str, Recipe] = {
    "auto": Recipe({}, "chosen for the images and the machine; what mocov3 pretrain does unless told otherwise"),
    "adapt": Recipe(
        {  # rate, length, pairs or layer decay, preservation: a table by network and images (mocov3.planning.adapting)
            "moco_m": 0.996,
            "moco_m_cos": True,
            "moco_t": 0.2,
            "quality_every": 1,
            "patience": 4,
        },
        "ours: continues training the weights of --init on other images; the rest as in auto",
    ),
    "defaults": Recipe({}, "the reference's defaults; what main_moco.py does unless told otherwise"),
    "resnet50_100ep": Recipe(
        {"arch": "resnet50", "moco_m_cos": True, "crop_min": 0.2}, "batch 4096, 16 GPUs", "68.9 linear"
    ),
    "resnet50_300ep": Recipe(
        {"arch": "resnet50", "lr": 0.3, "epochs": 300, "moco_m_cos": True, "crop_min": 0.2},
        "batch 4096, 16 GPUs",
        "72.8 linear",
    ),
    "resnet50_1000ep": Recipe(
        {
            "arch": "resnet50",
            "lr": 0.3,
            "weight_decay": 1.5e-6,
            "epochs": 1000,
            "moco_m": 0.996,
            "moco_m_cos": True,
            "crop_min": 0.2,
        },
        "batch 4096, 16 GPUs",
        "74.6 linear",
    ),
    "vit_small_300ep_b1024": Recipe(
        {"arch": "vit_small", "batch_size": 1024, **_VIT}, "batch 1024, 8 GPUs", "not stated"
    ),
    "vit_small_300ep": Recipe(
        {"arch": "vit_small", **_VIT}, "batch 4096, 32 GPUs or more", "73.2 linear, 81.4 fine-tuned"
    ),
    "vit_base_300ep": Recipe({"arch": "vit_base", **_VIT}, "batch 4096, 64 GPUs", "76.7 linear, 83.2 fine-tuned"),
    "vit_small_1gpu": Recipe({"arch": "vit_small", "batch_size": 256, **_VIT}, "ours: one 12 GB GPU, batch 256"),
    "resnet50_1gpu": Recipe(
        {"arch": "resnet50", "batch_size": 128, "moco_m_cos": True, "moco_t": 0.2, "crop_min": 0.2, "lr": 0.3},
        "ours: one 12 GB GPU, batch 128",
    ),
    "small_images": Recipe(
        {
            "arch": "resnet18",
            "small_stem": True,
            "image_size": 32,
            "batch_size": 256,
            "lr": 0.3,
            "epochs": 200,
            "moco_m_cos": True,
            "moco_t": 0.2,
        },
        "ours: colour images of 28–96 px, one GPU",
    ),
    "vit_small_images": Recipe(
        {
            "arch": "vit_conv_micro",
            "image_size": 32,
            "patch_size": 8,
            "optimizer": "adamw",
            "batch_size": 256,
            "lr": 1e-3,
            "weight_decay": 0.05,
            "epochs": 200,
            "warmup_epochs": 10,
            "moco_t": 0.2,
            "moco_m_cos": True,
            "moco_dim": 128,
            "moco_mlp_dim": 512,
            "crop_min": 0.2,
            "blur_probability": "0,0",
        },
        "ours: a ViT with a convolutional stem for colour images of 28–96 px, one CPU or GPU",
    ),
    "fashion_mnist": Recipe(
        {
            "arch": "resnet10_w16",
            "image_size": 28,
            "view_preset": "gray",
            "crop_min": 0.5,
            "brightness": 0.8,
            "contrast": 0.8,
            "blur_probability": "0.5",
            "blur_sigma": "0.1,1.5",
            "solarize_probability": "0.5",
            "optimizer": "adamw",
            "batch_size": 128,
            "lr": 8e-3,
            "weight_decay": 0.05,
            "epochs": 80,
            "warmup_epochs": 5,
            "moco_t": 0.2,
            "moco_m_cos": True,
            "moco_dim": 128,
            "moco_mlp_dim": 512,
        },
        "ours: the demo, 5 to 8 minutes on 2 CPU cores",
    ),
}


_TRANSFER: dict[str, Any] = {
    "arch": "vit_base",
    "epochs": 100,
    "batch_size": 128,
    "lr": 3e-4,
    "warmup_epochs": 3,
    "repeated_aug": False,
    "eval_freq": 10,
}

FINETUNE_RECIPES: dict[str, Recipe] = {
    "finetune_vit_base_150ep": Recipe({"arch": "vit_base", "epochs": 150}, "ImageNet-1k, DeiT's defaults", "83.2"),
    "finetune_vit_small_300ep": Recipe(
        {"arch": "vit_small", "epochs": 300}, "ImageNet-1k, DeiT's defaults (epochs not stated there)", "81.4"
    ),
    "transfer_cifar10": Recipe(
        {
            **_TRANSFER,
            "data_set": "cifar10",
            "weight_decay": 0.1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "drop_path": 0.1,
            "reprob": 0.0,
        },
        "batch 128 × 8 processes",
        "98.9",
    ),
    "transfer_cifar100": Recipe(
        {
            **_TRANSFER,
            "data_set": "cifar100",
            "weight_decay": 0.1,
            "mixup": 0.5,
            "cutmix": 1.0,
            "drop_path": 0.1,
            "reprob": 0.0,
        },
        "batch 128 × 8 processes",
        "90.5",
    ),
    "transfer_flowers": Recipe(
        {
            **_TRANSFER,
            "data_set": "flowers",
            "weight_decay": 0.3,
            "mixup": 0.0,
            "cutmix": 0.0,
            "drop_path": 0.1,
            "reprob": 0.25,
        },
        "batch 128 × 8 processes",
        "97.7",
    ),
    "transfer_pets": Recipe(
        {
            **_TRANSFER,
            "data_set": "pets",
            "weight_decay": 0.1,
            "mixup": 0.8,
            "cutmix": 0.0,
            "drop_path": 0.0,
            "reprob": 0.0,
        },
        "batch 128 × 8 processes",
        "93.2",
    ),
}
"""Recipes of fine-tuning and transfer; results are the reference's, after its pre-training of 300 epochs."""


def finetune_settings() -> dict[str, Fields]:
    """Fine-tuning recipe → the fields it sets."""
    return {name: recipe.settings for name, recipe in FINETUNE_RECIPES.items()}


LINCLS_RECIPES: dict[str, Recipe] = {
    "lincls_resnet50": Recipe({"arch": "resnet50", "lr": 0.1}, "90 epochs, batch 1024", "68.9 / 72.8 / 74.6"),
    "lincls_vit": Recipe({"lr": 3.0}, "90 epochs, batch 1024; give -a", "73.2 (ViT-S), 76.7 (ViT-B)"),
    "lincls_sweep": Recipe(
        {"lr": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "head": "linear,bn-linear"},
        "ours: 14 heads in one pass, when the learning rate is not known",
    ),
}


def settings(known: dict[str, Recipe] = RECIPES) -> dict[str, Fields]:
    """Recipe name → the fields it sets."""
    return {name: recipe.settings for name, recipe in known.items()}


def listing(recipes: dict[str, Recipe] = RECIPES, data: str = "ImageNet-1k top-1") -> str:
    """Recipes as lines for the help text."""
    lines = []
    for name, recipe in recipes.items():
        result = f"; reference reports {recipe.reference_result}" if recipe.reference_result else ""
        lines.append(f"  {name:<24} {recipe.about}{result}")
    return f"recipes (results: the reference's, {data} %, not ours):\n" + "\n".join(lines)
