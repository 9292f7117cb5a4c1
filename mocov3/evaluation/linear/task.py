"""Linear evaluation (arXiv 2104.02057, §4): ``mocov3 lincls --pretrained FILE DIR`` or ``python main_lincls.py …``.

What can be checked without torch is checked first; then the ranks are started, and ``loop`` beside this file trains.
"""

from mocov3.config import LinclsConfig
from mocov3.data.loading.labelled import open_evaluated
from mocov3.evaluation.linear.inputs import check
from mocov3.output.log import warn_left_out
from mocov3.running.job import Job


def main(config: LinclsConfig, *, script_door: bool) -> int:
    """Check, start the ranks, train or evaluate; returns the exit code (0, or 128 + the signal that stopped it).

    Raises:
        UserError: for anything the user can fix, before training starts where it can be known.
    """
    check(config, script_door=script_door)
    from mocov3.distributed import launch_as
    from mocov3.evaluation.linear.loop import train
    from mocov3.evaluation.linear.scores import evaluate_file

    return launch_as(config, evaluate_file if config.evaluate else train, Job(config, script_door))


def verify(file: str, folder: str, *, workers: int, device: str) -> int:
    """The accuracy of a published linear file on ImageNet's validation set, beside the published figure.

    Returns:
        0 if it agrees within 0.15 points (or there is no published figure), else 1.
    """
    config = LinclsConfig(data=folder, resume=file, evaluate=True, arch="", workers=workers, device=device)
    config.check()
    warn_left_out(open_evaluated(folder))
    from mocov3.distributed import launch_as
    from mocov3.evaluation.linear.scores import verify_file

    return launch_as(config, verify_file, Job(config, True))
