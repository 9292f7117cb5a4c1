"""Pre-training (arXiv 2104.02057, algorithm 1): ``mocov3 pretrain DIR`` or ``python main_moco.py DIR``.

What can be checked without torch is checked first; then the ranks are started, and ``mocov3.pretraining.loop`` trains.
"""

from mocov3.config import PretrainConfig
from mocov3.pretraining.inputs import check
from mocov3.pretraining.labelled_images import new_images, old_images
from mocov3.running.job import Job


def main(config: PretrainConfig, *, script_door: bool) -> int:
    """Check, start the ranks, train; returns the exit code (0, 3 to keep the weights one has, or 128 + a signal).

    Raises:
        UserError: for anything the user can fix, before training starts where it can be known.
    """
    config.check()
    old_images(config)
    new_images(config)
    check(config, script_door=script_door)
    from mocov3.distributed import launch_as
    from mocov3.pretraining.loop import train

    job = Job(config, script_door)
    return launch_as(config, train, job, timeout_minutes=config.dist_timeout, batch=config.batch_size)
