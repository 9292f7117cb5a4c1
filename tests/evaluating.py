"""What tests of evaluation share: a checkpoint of an untrained model."""

import torch

from mocov3 import models
from mocov3.weights import checkpoint

ARCH = "resnet10_w32"


def write_pretrained(path, arch=ARCH, **config):
    """A pre-training checkpoint of an untrained model whose batch statistics are not the initial ones."""
    torch.manual_seed(4)
    model = models.build(arch, dim=16, mlp_dim=32, image_size=32)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32), 0.9)
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"image_size": 32, "view_preset": "photos", **config}
    contents = checkpoint.pack(
        arch=arch,
        model=model,
        optimizer=optimizer,
        scaler={},
        position=checkpoint.Position(1, 0, 4),
        extra={"config": config},
    )
    checkpoint.write(path, contents)
    return model
