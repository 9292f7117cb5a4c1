"""What linear evaluation is given: the configuration and its images, checked as far as that goes without torch."""

from pathlib import Path

from mocov3.config import LinclsConfig
from mocov3.config.fields import check_writable
from mocov3.data.loading.filling import check_readable
from mocov3.data.loading.labelled import open_judged, open_labelled
from mocov3.errors import UserError
from mocov3.evaluation.measures import require
from mocov3.output.log import warn_left_out

SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Learning rates that ``mocov3 lincls`` trains side by side unless told otherwise."""

PUBLISHED = {"resnet50": {100: 68.9, 300: 72.8, 1000: 74.6}, "vit_small": {300: 73.2}, "vit_base": {300: 76.7}}
"""The reference's figures (its README): arch → epochs of pre-training → top-1 in % on ImageNet-1k. Not ours."""


def check(config: LinclsConfig, *, script_door: bool) -> None:
    """Refuse what cannot work, before torch is imported.

    Raises:
        UserError: naming what, where and how to fix it.
    """
    config.check()
    if config.measures or config.labels:
        require("--measures" if config.measures else "--labels: AUROC of findings")
    folder = Path(config.output_dir)
    if config.evaluate:
        if config.resume == "auto" and not (folder / "checkpoint.pth.tar").is_file():
            raise UserError(f"--resume auto: there is no checkpoint.pth.tar in {folder}; name the file")
        warn_left_out(open_judged(config.data, config.group_by, config.labels))
        return
    train, val = open_labelled(config.data, config.group_by, config.labels)
    check_readable(val, None, f"data {config.data} (val)")
    if not (config.arch or config.pretrained or config.resume):
        raise UserError("no backbone: give --pretrained FILE, or -a ARCH for an untrained one")
    check_writable(folder, "--output-dir")
    if not script_door and not config.resume and (folder / "checkpoint.pth.tar").exists():
        raise UserError(
            f"--output-dir {folder}: holds a former linear evaluation; continue with --resume auto, or name another"
        )
    warn_left_out(train, val)
