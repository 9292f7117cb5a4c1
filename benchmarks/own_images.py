"""Three folders of real images from what package registries ship, as a new user might bring them.

    npm pack emoji-datasource-twitter@16
    python benchmarks/own_images.py OUT emoji-datasource-twitter-16.0.0.tgz

OUT/photographs: 1,200 crops of eight photographs that scikit-learn and scikit-image ship, of several sizes, JPEG.
OUT/drawings: the 64 px drawings of Twitter's emoji (CC-BY 4.0), PNG with transparency, from the named file.
OUT/scans: the 1,797 scanned handwritten digits of scikit-learn (8×8 px), PNG.
Each folder is flat; OUT/NAME.csv holds path,label (photograph, category, digit) of 100 images, drawn with seed 0, and
OUT/NAME-all.csv of all.
"""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "china", "flower")
_CROPS = 150
_LABELLED = 100


def photographs(folder: Path) -> dict[str, str]:
    """Crops, each of a quarter to all of the shorter side."""
    import skimage.data
    import sklearn.datasets

    rng = np.random.Generator(np.random.PCG64(0))
    labels = {}
    for name in _PHOTOGRAPHS:
        if name in ("china", "flower"):
            pixels = sklearn.datasets.load_sample_image(f"{name}.jpg")
        else:
            pixels = getattr(skimage.data, name)()
        whole = Image.fromarray(pixels).convert("RGB")
        for _ in range(_CROPS):
            side = int(min(whole.size) * rng.uniform(0.25, 1.0))
            left, top = (int(rng.integers(0, full - side + 1)) for full in whole.size)
            file = f"{len(labels):04d}.jpg"
            whole.crop((left, top, left + side, top + side)).save(folder / file, quality=90)
            labels[file] = name
    return labels


def drawings(folder: Path, archive: Path) -> dict[str, str]:
    """The drawings without their skin tones; the label is the category."""
    labels = {}
    with tarfile.open(archive) as tar:
        data = json.load(tar.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        for entry in data:
            if entry.get("has_img_twitter"):
                member = tar.extractfile(f"package/img/twitter/64/{entry['image']}")
                if member is not None:
                    (folder / entry["image"]).write_bytes(member.read())
                    labels[entry["image"]] = entry["category"]
    return labels


def scans(folder: Path) -> dict[str, str]:
    """Digits at 8×8 px and 17 levels."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    labels = {}
    for i, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(folder / f"{i:04d}.png")
        labels[f"{i:04d}.png"] = str(digit)
    return labels


def main(out: Path, archive: Path) -> None:
    """Write the three folders and their lists of labels."""
    for name in ("photographs", "drawings", "scans"):
        folder = out / name
        folder.mkdir(parents=True)
        labels = (
            {"photographs": photographs, "scans": scans}[name](folder)
            if name != "drawings"
            else drawings(folder, archive)
        )
        rng = np.random.Generator(np.random.PCG64(0))
        chosen = sorted(rng.choice(sorted(labels), _LABELLED, replace=False).tolist())
        for suffix, names in (("", chosen), ("-all", sorted(labels))):
            text = io.StringIO()
            csv.writer(text).writerows([("path", "label"), *((n, labels[n]) for n in names)])
            (out / f"{name}{suffix}.csv").write_text(text.getvalue(), encoding="utf-8")
        print(f"{name}: {len(labels)} images, {len(set(labels.values()))} classes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
