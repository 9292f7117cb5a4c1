"""End-to-end fine-tuning by DeiT's recipe (Touvron et al. 2021): ``mocov3 finetune …`` or ``transfer/main.py …``.

What can be checked without torch is checked first; then the ranks are started, and ``mocov3.finetuning.loop`` trains.
"""

from mocov3.config import FinetuneConfig
from mocov3.finetuning.inputs import check
from mocov3.running.job import Job


def main(config: FinetuneConfig, *, script_door: bool) -> int:
    """Check, start the ranks, train; returns the exit code (0, or 128 + the signal that stopped the run).

    Raises:
        UserError: for anything the user can fix, before training starts where it can be known.
    """
    config = check(config, script_door=script_door)
    from mocov3.distributed import launch
    from mocov3.finetuning.loop import tune

    return launch(tune, Job(config, script_door), device=config.device, processes=config.nprocs_per_node)
