"""What tests of evaluation share: a checkpoint of an untrained model, and refusals of the program."""

import io
from contextlib import redirect_stderr, redirect_stdout

import torch

from mocov3 import models
from mocov3.cli import main
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
    contents = checkpoint.pack(arch=arch, model=model, optimizer=optimizer, scaler={},
                               position=checkpoint.Position(1, 0, 4), extra={"config": config})  # fmt: skip
    checkpoint.write(path, contents)
    return model


def refused(*argv):
    """The one line that a refusal prints."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(map(str, argv)))
        except SystemExit as stop:
            code = stop.code
    assert code == 2, (argv, out.getvalue(), err.getvalue())
    assert err.getvalue().count("\n") == 1, err.getvalue()
    assert "Traceback" not in err.getvalue()
    return err.getvalue()
