"""Memory of the data path over many samples: ``python benchmarks/memory.py [--samples N]`` (200,000 take some minutes).

Loader processes make views of images of every kind, unreadable ones among them; after each tenth the resident memory
of this process and of its loader processes is printed. It must not grow: exit code 1 if the last exceeds the second by
more than 5 %.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import images
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.loading.loader import batches

GROWTH = 1.05


def resident(pid: int) -> int:
    """Bytes of resident memory that no other process shares."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def mixed(root: Path, count: int) -> Path:
    """A folder of small images of every kind; one in fifty is damaged."""
    root.mkdir()
    shapes = [(28, 28), (64, 48), (33, 90), (500, 375)]
    variants = [list(images.several(w, h, 4)) for w, h in shapes]
    for i in range(count):
        image = variants[i % 4][i // 4 % 4]
        if i % 50 == 49:
            (root / f"{i}.jpg").write_bytes(images.jpeg(image)[:200])
        elif i % 7 == 0:
            (root / f"{i}.png").write_bytes(images.png(image.convert("RGBA" if i % 2 else "L")))
        elif i % 11 == 0:
            (root / f"{i}.tif").write_bytes(images.tiff16(image))
        else:
            (root / f"{i}.jpg").write_bytes(images.jpeg(image))
    return root


def measure(samples: int, workers: int, size: int = 64, folder: int = 400) -> Iterator[tuple[int, int]]:
    """Samples done and bytes held, eleven times from the start on."""
    batch = 50
    with tempfile.TemporaryDirectory() as name:
        source = open_source(str(mixed(Path(name) / "pictures", folder)))
        epochs = -(-samples // len(source))
        works = batches(len(source), seed=0, batch_size=batch, rank=0, ranks=1, start=(0, 0), epochs=epochs)
        with Loader(source, TwoViews(size, 0.08), batch_size=batch, seed=0, workers=workers) as loader:
            pids = [os.getpid(), *(p.pid for p in loader._processes)]
            done, next_at = 0, 0
            for batch in loader.run(works):
                if done >= next_at:
                    yield done, sum(map(resident, pids))
                    next_at += samples // 10
                done += len(batch.work.indices)
            yield done, sum(map(resident, pids))


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    held = []
    for done, size in measure(args.samples, args.workers):
        held.append(size)
        print(f"{done:>9} samples: {size / 1e6:.1f} MB", flush=True)
    growth = held[-1] / held[2] - 1
    print(f"from a fifth on: {100 * growth:+.1f} %")
    return int(held[-1] > GROWTH * held[2])


if __name__ == "__main__":
    sys.exit(main())
