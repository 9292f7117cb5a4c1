"""Folders of real images from what package registries ship, as a new user might bring them.

    npm pack emoji-datasource-twitter@16
    python benchmarks/own_images.py OUT --emoji emoji-datasource-twitter-16.0.0.tgz
    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb DEB
    python benchmarks/own_images.py OUT --clipart DEB/usr/share/openclipart/png
    apt-get download openarena-081-textures && dpkg -x openarena-081-textures_*.deb DEB
    python benchmarks/own_images.py OUT --textures DEB/usr/share/games/openarena/baseoa/pak4-textures.pk3
    apt-get download wesnoth-1.16-data && dpkg -x wesnoth-1.16-data_*.deb DEB
    python benchmarks/own_images.py OUT --sprites DEB/usr/share/games/wesnoth/1.16/data/core/images/units

OUT/photographs: 1,200 crops of eight photographs that scikit-learn and scikit-image ship, of several sizes, JPEG.
OUT/drawings: the 64 px drawings of Twitter's emoji (CC-BY 4.0), PNG with transparency, from the named file.
OUT/scans: the 1,797 scanned handwritten digits of scikit-learn (8×8 px), PNG.
These folders are flat; OUT/NAME.csv holds path,label (photograph, category, digit) of 100 images, drawn with seed 0,
OUT/NAME-all.csv of all, and of these OUT/NAME-asked.csv a fifth, OUT/NAME-bank.csv the others.
OUT/clipart: links to the drawings of Debian's openclipart-png (public domain), to judge by, in a folder a category:
those that have a name of their own (a sixth of the 8,121 are links), of categories of 60 or more, 250 of each at most.
Category "unsorted" is none.
OUT/textures: squares of 128 px cut out of OpenArena's textures (GPL-2) of 256 px or more, nine of each at most; what
is to be told is which texture a square is of. OUT/textures/val has one of each, OUT/textures/train the others.
OUT/sprites: links to the figures of The Battle for Wesnoth (GPL-2), mostly 72 px, PNG with transparency, in a folder a
race, of races of 50 or more. A unit has many images, in motion: judge by other units of its race, with
``--group-by '^([^/]+/[^-.]+)'``.
"""

import argparse
import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "china", "flower")
_CROPS = 150
_LABELLED = 100
_MOST_OF_A_TEXTURE = 9
_FLAT = 4.0
"""Standard deviation, of 255 levels, below which a square shows nothing."""
_FEWEST_OF_A_CATEGORY, _MOST_OF_A_CATEGORY = 60, 250
_FEWEST_OF_A_RACE = 50


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


def clipart(folder: Path, png: Path) -> None:
    """Links to what is judged, a folder a category."""
    rng = np.random.Generator(np.random.PCG64(0))
    for category in sorted(path for path in png.iterdir() if path.is_dir() and path.name != "unsorted"):
        files = sorted(file for file in category.rglob("*.png") if not file.is_symlink())
        if len(files) >= _FEWEST_OF_A_CATEGORY:
            (folder / category.name).mkdir()
            for number in sorted(rng.permutation(len(files))[:_MOST_OF_A_CATEGORY].tolist()):
                name = str(files[number].relative_to(category)).replace("/", "-")
                (folder / category.name / name).symlink_to(files[number].resolve())


def textures(folder: Path, archive: Path) -> None:
    """Squares of textures; skies and effects, which are mostly empty, are left out."""
    with zipfile.ZipFile(archive) as pack:
        for name in sorted(pack.namelist()):
            parts = name.lower().split("/")
            if parts[0] != "textures" or parts[1] in ("skies", "sfx", "flares") or not name.endswith((".jpg", ".tga")):
                continue
            image = Image.open(io.BytesIO(pack.read(name))).convert("RGB")
            places = [(x, y) for y in range(0, image.height - 127, 128) for x in range(0, image.width - 127, 128)]
            rng = np.random.Generator(np.random.PCG64(0))
            chosen = [places[i] for i in rng.permutation(len(places))[:_MOST_OF_A_TEXTURE].tolist()]
            squares = [image.crop((x, y, x + 128, y + 128)) for x, y in chosen]
            if min(image.size) < 256 or min(np.asarray(square).std() for square in squares) < _FLAT:
                continue
            for number, square in enumerate(squares):
                place = folder / ("val" if number == 0 else "train") / "-".join(parts[1:]).rpartition(".")[0]
                place.mkdir(parents=True, exist_ok=True)
                square.save(place / f"{number}.png")


def sprites(folder: Path, units: Path) -> None:
    """Links to all figures, a folder a race."""
    for race in sorted(path for path in units.iterdir() if path.is_dir()):
        files = sorted(race.rglob("*.png"))
        if len(files) >= _FEWEST_OF_A_RACE:
            (folder / race.name).mkdir()
            for file in files:
                (folder / race.name / str(file.relative_to(race)).replace("/", "_")).symlink_to(file.resolve())


def main() -> None:
    """Write the folders and their lists of labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--emoji", type=Path, metavar="TGZ", help="photographs, drawings and scans")
    parser.add_argument("--clipart", type=Path, metavar="DIR", help="clipart")
    parser.add_argument("--textures", type=Path, metavar="PK3", help="textures")
    parser.add_argument("--sprites", type=Path, metavar="DIR", help="sprites")
    args = parser.parse_args()
    for name, link, source in (("clipart", clipart, args.clipart), ("sprites", sprites, args.sprites)):
        if source:
            folder = args.out / name
            folder.mkdir(parents=True)
            link(folder, source)
            print(f"{name}: {len(list(folder.glob('*/*')))} images, {len(list(folder.iterdir()))} classes")
    if args.textures:
        textures(args.out / "textures", args.textures)
        print(f"textures: {len(list((args.out / 'textures').glob('*/*/*')))} squares")
    for name in ("photographs", "drawings", "scans") if args.emoji else ():
        folder = args.out / name
        folder.mkdir(parents=True)
        labels = (
            {"photographs": photographs, "scans": scans}[name](folder)
            if name != "drawings"
            else drawings(folder, args.emoji)
        )
        rng = np.random.Generator(np.random.PCG64(0))
        chosen = sorted(rng.choice(sorted(labels), _LABELLED, replace=False).tolist())
        everything = sorted(labels)
        asked = sorted(everything[i] for i in rng.permutation(len(everything))[: len(everything) // 5].tolist())
        bank = sorted({*everything} - {*asked})
        for suffix, names in (("", chosen), ("-all", everything), ("-bank", bank), ("-asked", asked)):
            text = io.StringIO()
            csv.writer(text).writerows([("path", "label"), *((n, labels[n]) for n in names)])
            (args.out / f"{name}{suffix}.csv").write_text(text.getvalue(), encoding="utf-8")
        print(f"{name}: {len(labels)} images, {len(set(labels.values()))} classes")


if __name__ == "__main__":
    main()
