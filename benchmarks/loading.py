"""Images a second that loader processes make, alone: ``python benchmarks/loading.py DIR --workers 16 [--two-views]``.

Counted from the first batches on, until which processes start. It imports no torch, as loader processes import what
the main one is.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from mocov3.data import CentreView, Loader, TwoViews, Work, open_source

_FIRST = 4


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--two-views", action="store_true", help="those of training instead of the evaluation's")
    args = parser.parse_args()
    source, size = open_source(str(args.folder)), args.batch_size
    view = TwoViews(args.image_size) if args.two_views else CentreView(args.image_size)
    starts = range(0, len(source), size)
    works = [Work(0, n, np.arange(i, min(i + size, len(source)))) for n, i in enumerate(starts)]
    began, done, first = 0.0, 0, min(_FIRST, len(works) - 2)
    with Loader(source, view, batch_size=size, seed=0, workers=args.workers) as loader:
        for n, made in enumerate(loader.run(works)):
            done += len(made.work.indices) if n > first else 0
            began = time.perf_counter() if n == first else began
    print(f"{done / (time.perf_counter() - began):.0f} images/s")


if __name__ == "__main__":
    main()
