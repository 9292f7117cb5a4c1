"""Which images a step sees. The order is a function of (seed, epoch) and does not depend on the number of ranks.

DeiT distributes the (repeated) images over its processes in turn. Here that is done for ``groups`` of ``batch_size``
images, whose number is ranks × accumulated batches: group g of a step goes to rank g mod ranks. So eight processes
and one that adds up eight batches train on the same groups.
"""

from collections.abc import Iterator

import numpy as np

from mocov3.data import Work
from mocov3.data.views.draws import permutation, replacement


def group_order(n: int, *, repeats: int, groups: int, group: int) -> np.ndarray:
    """Places in the epoch's order, with their repetitions, that are dealt to one group: ``place · repeats + r``.

    With repeated augmentation an epoch is a multiple of 256 of the (repeated) images where there are so many, as in
    DeiT's sampler and timm's ``RepeatAugSampler``; without, all are dealt, as ``DistributedSampler`` does.
    """
    dealt = n // 256 * 256 // groups if repeats > 1 and n >= 256 else -(-n // groups)
    return (group + groups * np.arange(dealt)) % (n * repeats)  # the last round is filled up from the start


def iterations(n: int, *, repeats: int, groups: int, batch_size: int) -> int:
    """Steps of an epoch; the last part batch is left out."""
    return len(group_order(n, repeats=repeats, groups=groups, group=0)) // batch_size


def batches(
    n: int,
    *,
    seed: int,
    repeats: int,
    batch_size: int,
    accumulate: int,
    rank: int,
    ranks: int,
    start: tuple[int, int],
    epochs: int,
) -> Iterator[Work]:
    """Batches of this rank from ``start`` (epoch, iteration) on, ``accumulate`` a step, indices as ``Repeated``'s."""
    groups = ranks * accumulate
    dealt = [group_order(n, repeats=repeats, groups=groups, group=rank + ranks * a) for a in range(accumulate)]
    steps = min(len(d) for d in dealt) // batch_size
    epoch, iteration = start
    for e in range(epoch, epochs):
        order = permutation(seed, e, n)
        for i in range(iteration if e == epoch else 0, steps):
            for places in dealt:
                mine = places[i * batch_size : (i + 1) * batch_size]
                yield Work(e, i, order[mine // repeats] * repeats + mine % repeats)


def images_shown(work: Work, bad: set[int], *, seed: int, n: int) -> np.ndarray:
    """Indices of the images that a batch really shows: others replace unreadable ones, with their own class.

    Args:
        work: what was asked for.
        bad: indices that could not be read.
        seed: of the run.
        n: images with repetitions.
    """
    shown = work.indices.copy()
    for place, index in enumerate(work.indices.tolist()):
        attempt = 0
        while int(shown[place]) in bad:  # the loader's own choices
            shown[place] = replacement(seed, work.epoch, index, attempt, n)
            attempt += 1
    return shown
