"""How fast two views of an image are made, against other ways, in one run: ``make bench-data``.

    python benchmarks/data.py [--rounds N] [--readme FILE] [--quick]

Times are processor time of one thread, so that other programs on the machine change them little; every way sees the
same images, in turns, and the ratios are of medians over rounds. Peers need ``pip install albumentations``; one that
is missing is left out. ``--readme`` puts the table between the marks of a Markdown file.
"""

import argparse
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import cv2
import numpy as np
from PIL import Image

from benchmarks import images, peers
from mocov3.data import Loader, TwoViews, open_source
from mocov3.data.loading.loader import batches
from mocov3.data.views import native as kernel
from mocov3.data.views.decode import ImageBytes, decode

MARKS = "<!-- bench-data -->", "<!-- /bench-data -->"
CROP_MIN = 0.08
Times = dict[str, list[float]]


def ours(size: int, backend: str = "fast") -> Callable[[bytes], Any]:
    """Our views, a new draw at every call, into one place as the loader does."""
    views, out, calls = TwoViews(size, CROP_MIN, backend=backend), np.empty((2, size, size, 3), np.uint8), [0]

    def run(data: bytes) -> Any:
        calls[0] += 1
        return views(data, seed=0, epoch=0, index=calls[0], out=out)

    return run


def alternate(ways: dict[str, Callable[[bytes], Any]], data: list[bytes], rounds: int) -> Times:
    """Milliseconds of processor time an image, by way and round."""
    times: Times = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, run in ways.items():
            began = time.process_time_ns()
            for item in data:
                run(item)
            if round:  # the first warms up
                times[name].append((time.process_time_ns() - began) / len(data) / 1e6)
    return times


def peer(make: Callable[[int, float], Any], size: int) -> dict[str, Callable[[bytes], Any]]:
    """A peer by name, or nothing where it is not installed."""
    try:
        return {make.__name__: make(size, CROP_MIN)}
    except ImportError as error:
        print(f"left out {make.__name__}: {error}", file=sys.stderr)
        return {}


def fastest_decode(data: list[bytes]) -> Callable[[bytes], Any]:
    """Whole decoding to RGB by the fastest library here that reads these files as we do."""
    if data[0][:2] == b"\xff\xd8":
        import simplejpeg

        return simplejpeg.decode_jpeg
    if data[0][:4] == b"\x89PNG":
        return lambda item: cv2.imdecode(np.frombuffer(item, np.uint8), cv2.IMREAD_COLOR_RGB)
    return lambda item: np.asarray(Image.open(io.BytesIO(item)).convert("RGB"))


def measure(rounds: int, quick: bool) -> list[list[str]]:
    """Rows of the table."""
    few = 6 if quick else 12
    sets: list[tuple[str, int, list[bytes], list[Any]]] = [
        (
            "JPEG 500×375",
            224,
            [images.jpeg(p, 92) for p in images.several(500, 375, 2 * few)],
            [peers.reference, peers.albumentations, peers.torchvision_v2],
        ),
        ("ImageNet-like mix", 224, mix(), [peers.reference, peers.albumentations, peers.torchvision_v2]),
        ("JPEG 28×28", 28, [images.jpeg(p, 95) for p in images.several(28, 28, 4 * few)], [peers.reference]),
        ("JPEG 64×64", 64, [images.jpeg(p, 95) for p in images.several(64, 64, 4 * few)], [peers.reference]),
        ("JPEG 96×96", 96, [images.jpeg(p, 95) for p in images.several(96, 96, 4 * few)], [peers.reference]),
        ("PNG 32×32", 32, [images.png(p) for p in images.several(32, 32, 4 * few)], [peers.reference]),
        (
            "JPEG 4000×3000 (12 Mpx)",
            224,
            [images.jpeg(images.mosaic(4000, 3000, i), 90) for i in range(3)],
            [peers.reference],
        ),
        ("PNG 2304×1728 (4 Mpx)", 224, [images.png(images.mosaic(2304, 1728, i)) for i in range(3)], [peers.reference]),
        (
            "TIFF 16-bit 2304×1728, deflated",
            224,
            [images.tiff16(images.mosaic(2304, 1728, i)) for i in range(3)],
            [peers.reference],
        ),
    ]
    rows = []
    for title, size, data, makers in sets:
        ways = {"ours": ours(size), "decode": fastest_decode(data)}
        for make in makers:
            ways |= peer(make, size)
        times = alternate(ways, data, max(3, rounds // 4) if len(data) == 3 else rounds)
        middle = {name: median(values) for name, values in times.items()}
        kilobytes = sum(map(len, data)) / len(data) / 1000
        row = [f"{title}, {kilobytes:.0f} kB → 2 × {size}²", f"{middle['ours']:.2f}"]
        for name in ("reference", "albumentations", "torchvision_v2"):
            row.append(f"{middle[name] / middle['ours']:.1f}×" if name in middle else "–")
        row.append(f"{100 * middle['decode'] / middle['ours']:.0f} %")
        rows.append(row)
        print(" | ".join(row), flush=True)
    return rows


def mix() -> list[bytes]:
    """Twenty JPEGs of ImageNet's usual sizes."""
    files = []
    for (width, height), count in images.MIX:
        files += [images.jpeg(p, 92) for p in images.several(width, height, count)]
    return files


def loading(rounds: int) -> dict[str, float]:
    """What the loader adds to the views (processor time), and what a second process brings (clock)."""
    batch, steps = 32, 24
    with tempfile.TemporaryDirectory() as name:
        source = open_source(str(images.folder(Path(name) / "pictures", batch * steps)))
        views = TwoViews(224, CROP_MIN)
        works = list(batches(len(source), seed=0, batch_size=batch, rank=0, ranks=1, start=(0, 0), epochs=1))
        out = np.empty((2, 224, 224, 3), np.uint8)

        def bare() -> None:
            for work in works:
                for index in work.indices.tolist():
                    views(source.read(index), seed=0, epoch=0, index=index, out=out)

        def loaded() -> None:
            with Loader(source, views, batch_size=batch, seed=0, workers=0) as loader:
                for _ in loader.run(works):
                    pass

        cost = []
        for round in range(rounds + 1):
            spent = []
            for run in (bare, loaded):
                began = time.process_time_ns()
                run()
                spent.append(time.process_time_ns() - began)
            if round:
                cost.append(spent[1] / spent[0])
        speeds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(max(3, rounds // 2)):
            for workers, rates in speeds.items():
                rates.append(_speed(source, views, works, batch, workers))
    clock = {workers: max(rate for rate, _ in rates) for workers, rates in speeds.items()}
    busiest = {workers: median(spent for _, spent in rates) for workers, rates in speeds.items()}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "loader": median(cost),
        "clock": clock[2] / clock[1],
        "processor": busiest[1] / busiest[2] if busiest[2] else 0.0,
        "load": load,
    }


def _speed(source: Any, views: Any, works: list[Any], batch: int, workers: int) -> tuple[float, float]:
    """Images a second by the clock, and seconds of processor time an image of the busiest loader process."""
    with Loader(source, views, batch_size=batch, seed=0, workers=workers) as loader:
        coming = loader.run(works)
        for _ in range(3):  # past the starting of processes and what was prepared ahead
            next(coming)
        pids = [process.pid for process in loader._processes]
        before, began = [_processor_time(pid) for pid in pids], time.perf_counter()
        count = sum(len(b.work.indices) for b in coming)
        seconds = time.perf_counter() - began
        spent = [_processor_time(pid) - was for pid, was in zip(pids, before, strict=True)]
        return count / seconds, max(spent) / count


def _processor_time(pid: int) -> float:
    file = Path(f"/proc/{pid}/stat")
    if not file.exists():
        return 0.0
    fields = file.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shrunk_sharpness() -> float:
    """Largest mean difference (of 255) that decoding 12 Mpx images smaller makes to a view without colour changes."""
    from mocov3.config import ViewPreset

    plain = ViewPreset(jitter_probability=0, gray_probability=0, blur_probability=(0, 0), solarize_probability=(0, 0))
    data = images.jpeg(images.mosaic(4000, 3000), 90)
    whole = np.asarray(decode(data))
    worst = 0.0
    for index in range(12):
        near = TwoViews(224, CROP_MIN, plain)(data, seed=0, epoch=0, index=index)
        true = TwoViews(224, CROP_MIN, plain, backend="pillow")(whole, seed=0, epoch=0, index=index)
        worst = max(worst, *(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(near, true, strict=True)))
    return worst


def table(rows: list[list[str]], ratios: dict[str, float], worst: float, rounds: int) -> str:
    """The table in Markdown."""
    head = ["images → views", "ours, ms", "reference's pipeline", "albumentations", "torchvision v2", "of decode-only"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    way = "compiled kernel" if kernel.available() else "library path (no compiled kernel)"
    loader = max(0.0, 100 * (ratios["loader"] - 1))
    system = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines += [
        "",
        f"Milliseconds of processor time an image for both views, one thread, median of {rounds} rounds, {way};",
        "how many times as long others take; speed as a share of decoding alone (simplejpeg for JPEG, OpenCV for PNG,",
        "Pillow for TIFF). JPEG quality 92 (12 Mpx: 90; up to 96 px: 95), cut from photographs in scikit-learn and",
        "scikit-image. albumentations resizes with OpenCV's area filter, which antialiases. The reference's pipeline",
        "continues to float tensors, in the loader processes; ours stays uint8 and normalises on the device. 12 Mpx",
        f"images are decoded smaller where every crop allows: views differ by at most {worst:.1f}/255 in the mean.",
        f"The loader adds {loader:.0f} % to the views' time; of two loader processes the busier spends "
        f"1/{ratios['processor']:.2f} of what one",
        f"alone does, and by the clock two make {ratios['clock']:.2f} times as many images (load average "
        f"{ratios['load']:.0f} here). {system}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--readme", type=Path, help="Markdown file to put the table into")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    import torch

    torch.set_num_threads(1)
    assert ImageBytes(images.jpeg(next(images.several(500, 375, 1)))).width == 500
    text = table(measure(args.rounds, args.quick), loading(max(3, args.rounds // 2)), shrunk_sharpness(), args.rounds)
    print("\n" + text)
    if args.readme:
        before, _, rest = args.readme.read_text(encoding="utf-8").partition(MARKS[0])
        _, mark, after = rest.partition(MARKS[1])
        if not mark:
            sys.exit(f"{args.readme}: has no {MARKS[0]} … {MARKS[1]}")
        args.readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
