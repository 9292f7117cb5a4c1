"""k-NN evaluation (Wu et al. 2018; Caron et al. 2021): ``mocov3 knn --model FILE DIR``.

With a training and a validation part (DIR/train, DIR/val) the first is the bank, the second the queries. One folder of
classes is its own bank, each image left out in turn; so are the few that ``--labels some.csv`` names. With several
findings an image the vote is on each finding by itself. ``scores`` of the vote: ``mocov3.evaluation.knn_scores``.
"""

import numpy as np

from mocov3.config import KnnConfig
from mocov3.data import Source
from mocov3.data.sources.groups import groups_of
from mocov3.evaluation.knn_inputs import limits, open_sets
from mocov3.evaluation.measures import require
from mocov3.output.log import warn_left_out


def main(config: KnnConfig) -> int:
    """Check, start the ranks, measure, print.

    Raises:
        UserError: for anything the user can fix.
    """
    config.check()
    bank, queries = open_sets(config.data, config.labels)
    limits(config, _available(groups_of((bank, *([queries] if queries else [])), config.group_by), len(bank), queries))
    if config.measures or (bank.labels is not None and bank.labels.ndim == 2):
        require("--measures" if config.measures else f"--labels {config.labels}: AUROC of findings")
    warn_left_out(bank, queries)
    from mocov3.distributed import launch
    from mocov3.evaluation.knn_scores import measure

    return launch(measure, config, device=config.device, processes=config.nprocs_per_node)


def _available(groups: list[np.ndarray] | None, bank: int, queries: Source | None) -> int:
    """Images of the bank that every query may find, at least."""
    if groups is None:
        return bank - (queries is None)
    known, counts = np.unique(groups[0], return_counts=True)
    return bank - int(counts[np.isin(known, groups[-1])].max(initial=0))
