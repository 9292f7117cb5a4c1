"""What fine-tuning is given: the configuration and its images, checked as far as that goes without torch."""

import dataclasses
import os
import time
from pathlib import Path

from mocov3.config import FinetuneConfig
from mocov3.config.fields import check_writable
from mocov3.data.loading.filling import check_readable
from mocov3.data.sources.transfer import open_pair
from mocov3.errors import UserError, no_file
from mocov3.evaluation.measures import require
from mocov3.output.log import warn_left_out

LAST = "checkpoint.pth"


def check(config: FinetuneConfig, *, script_door: bool) -> FinetuneConfig:
    """Refuse what cannot work, before torch is imported; the configuration with its output folder named.

    Raises:
        UserError: naming what, where and how to fix it.
    """
    config.check()
    if config.measures or config.labels:
        require("--measures" if config.measures else "--labels: AUROC of findings")
    if not config.output_dir and not config.eval:
        if config.resume == "auto":
            raise UserError("--resume auto: name the run to resume with --output_dir")
        config = dataclasses.replace(config, output_dir=f"runs/{time.strftime('%Y%m%d-%H%M%S')}-finetune")
    for name in ("resume", "finetune"):
        file = getattr(config, name)
        if file and not (name == "resume" and file == "auto") and not Path(file).is_file():
            raise UserError(f"--{name} {file}: {no_file(file)}")
    pair = open_pair(config.data_set, config.data_path, config.group_by, config.labels)
    check_readable(pair.test, None, f"--data-path {config.data_path} (test)")
    if config.eval:
        warn_left_out(pair.test)
        return config
    if os.environ.get("RANK", "0") != "0":
        return config  # the main rank checks the folder for all
    folder = Path(config.output_dir)
    check_writable(folder, "--output_dir")
    if not script_door and not config.resume and (folder / LAST).exists():
        raise UserError(f"--output_dir {folder}: holds a former run; continue with --resume auto, or name another")
    warn_left_out(pair.train, pair.test)
    return config
