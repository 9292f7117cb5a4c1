"""Images, archives, tables and lists, whole and damaged, and how they are read."""

import io
import json
import random
import tarfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from damage import NUMBERS, Kind, damaged, take_all
from PIL import Image

MOST_PIXELS = 1 << 20
"""Of an image here, instead of 178,956,970: what is taken by its size is then seen in a small process."""

# --- images ---


def pixels(side: int = 24, mode: str = "RGB") -> Image.Image:
    rng = np.random.Generator(np.random.PCG64(0))
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((2 * side, side)).convert(mode)


def _image(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or pixels()).save(file, kind, **options)
    return file.getvalue()


def _images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[274], exif[270] = 6, "words"
    deep = Image.fromarray(np.arange(24 * 48, dtype=np.uint16).reshape(24, 48) * 50)
    made = {
        "a.jpg": _image("JPEG", pixels(200), exif=exif, icc_profile=bytes(200)),
        "b.jpg": _image("JPEG", pixels(64), progressive=True),
        "c.jpg": _image("JPEG", pixels(mode="CMYK")),
        "a.png": _image("PNG", exif=exif),
        "b.png": _image("PNG", pixels(mode="P"), transparency=3),
        "c.png": _image("PNG", deep),
        "a.tif": _image("TIFF", compression="tiff_lzw"),
        "b.tif": _image("TIFF", compression="jpeg"),
        "c.tif": _image("TIFF", deep),
        "d.tif": _image("TIFF", pixels(mode="CMYK"), compression="tiff_adobe_deflate", exif=exif),
        "a.webp": _image("WEBP", exif=exif),
        "b.webp": _image("WEBP", pixels(mode="RGBA"), lossless=True),
        **{f"a.{kind.lower()}": _image(kind) for kind in ("GIF", "BMP", "PPM", "TGA", "PCX", "QOI", "SGI", "MPO")},
        "a.jp2": _image("JPEG2000"),
    }
    from mocov3.data.views import formats

    formats._register()  # as reading registers them
    for name, kind in (("a.heic", "HEIF"), ("a.avif", "AVIF"), ("a.jxl", "JXL")):
        if "." + name.split(".")[1] in formats.endings():
            made[name] = _image(kind, pixels(64))
    return made


def _change_image(rng: random.Random, _: str, data: bytes) -> bytes:
    changed = damaged(rng, data)
    if changed[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.8:  # or no change would pass its checksums
        parts, place = [changed[:8]], 8
        while place + 12 <= len(changed):
            end = place + 8 + int.from_bytes(changed[place : place + 4])
            parts += [changed[place:end], zlib.crc32(changed[place + 4 : end]).to_bytes(4)]
            place = end + 4
        changed = b"".join(parts)
    return changed


def _read_image(path: Path) -> None:
    from mocov3.config.presets import Reading
    from mocov3.data import CentreView, TwoViews
    from mocov3.data.views import decode

    decode.MAX_PIXELS = MOST_PIXELS
    data = path.read_bytes()
    views = [TwoViews(16), CentreView(16)]
    views += [CentreView(16, reading=Reading(c, w)) for c, w in ((1, None), (3, (0, 4095)), (4, None))]

    def seen(view: Any) -> None:
        made = view(data, seed=0, epoch=0, index=0)
        assert all(v.shape[:2] == (16, 16) and v.dtype == np.uint8 for v in made)

    take_all(
        [
            *(partial(seen, view) for view in views),
            *(lambda p=p: decode.ImageBytes(data).pixels(p) for p in decode.SHRINKS),
        ]
    )


# --- archives -----------------------------------------------------------------------------------------------------


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def _sparse() -> bytes:
    """Headers of sparse members as GNU tar writes them: of the old kind, with a block that goes on, and of 1.0."""
    head = bytearray(tarfile.TarInfo("sparse.png").tobuf(tarfile.GNU_FORMAT))
    head[156:157], head[386:410], head[482:483] = b"S", b"%011o\0%011o\0" % (0, 512), b"\1"
    info = tarfile.TarInfo("GNUSparseFile.0/new.png")
    info.size = 1024
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9999"}
    return _checked(bytes(head)) + bytes(512) + info.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(1024, b"\0")


def _archives() -> dict[str, bytes]:
    image, made = _image("JPEG"), {}
    for name, form in (("gnu.tar", tarfile.GNU_FORMAT), ("pax.tar", tarfile.PAX_FORMAT), ("old.tar", None)):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form or tarfile.USTAR_FORMAT) as archive:
            for i in range(3):
                archive.addfile(*_member(f"train/{i:03}.jpg", image))
                archive.addfile(*_member(f"train/{i:03}.cls", b"%d" % i))
                archive.addfile(*_member(f"train/{i:03}.seg.png", image))
            archive.addfile(*_member("link.jpg", type=tarfile.SYMTYPE, linkname="train/000.jpg"))
            archive.addfile(*_member("hard.jpg", type=tarfile.LNKTYPE, linkname="train/000.jpg"))
            if form:
                archive.addfile(*_member("ü" * 60 + "/" + "n" * 120 + ".jpg", image))
        made[name] = file.getvalue()
    made["sparse.tar"] = _sparse() + made["gnu.tar"]
    return made


def _checked(head: bytes) -> bytes:
    """A header with its checksum."""
    blank = head[:148] + b" " * 8 + head[156:512]
    return head[:148] + b"%06o\0 " % sum(blank) + head[156:512]


def _change_archive(rng: random.Random, _: str, data: bytes) -> bytes:
    """Changes anywhere, or of the fields of headers, which then have their checksums."""
    changed = bytearray(damaged(rng, data) if rng.random() < 0.4 else data)
    heads = [at for at in range(0, len(changed) - 511, 512) if changed[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 2, 3)) if heads else 0):
        at = rng.choice(heads)
        field, length = rng.choice(
            ((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (156, 1), (345, 155), (386, 97))
        )
        value: bytes = rng.choice(
            (
                rng.randbytes(length),
                b"%0*o" % (length - 1, rng.choice(NUMBERS)),
                b"\x80" + rng.choice(NUMBERS).to_bytes(8).rjust(length - 1, b"\0"),
                b"\xff" * length,
                rng.choice((b"../x.jpg", b"/x.jpg", b"a\0b.jpg", b".jpg", b"", b"-1", b" 7")),
                rng.choice((b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"3", b"5", b"\0", b"7")),
            )
        )
        changed[at + field : at + field + length] = value[:length].ljust(length, b"\0")
        changed[at : at + 512] = _checked(bytes(changed[at : at + 512]))
    return bytes(changed)


def _read_source(path: Path) -> None:
    from mocov3.data.sources.opening import open_source

    source = open_source(str(path))
    assert len(source.digest) == 64
    assert source.labels is None or len(source.labels) == len(source)
    for line in getattr(source, "skipped", []):
        assert "\n" not in line
    for index in {*range(min(len(source), 20)), len(source) - 1}:
        assert source.name(index)
        source.read(index)


# --- tables -------------------------------------------------------------------------------------------------------


def _tables() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = _image("PNG")
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}}
    columns = {
        "image": pa.array([{"bytes": image, "path": f"{i}.png"} for i in range(6)], kinds),
        "label": pa.array([0, 1, 2, None, 1, 0], pa.int64()),
    }
    plain = {"jpg": [image] * 6, "class": ["x", "y", None, "x", "", "z"], "more": [1.5] * 6}
    made = {}
    for name, table, options in (
        ("a.parquet", pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)}), {}),
        ("b.parquet", pa.table(plain), {"compression": "zstd", "row_group_size": 2}),
        ("c.parquet", pa.table(plain), {"use_dictionary": False, "compression": "none", "data_page_version": "2.0"}),
    ):
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        made[name] = sink.getvalue()
    return made


def _change_table(rng: random.Random, _: str, data: bytes) -> bytes:
    """Changes anywhere, or in the footer, whose length is then right."""
    if rng.random() < 0.4:
        return damaged(rng, data)
    length = int.from_bytes(data[-8:-4], "little")
    footer = damaged(rng, data[-8 - length : -8])
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


# --- lists --------------------------------------------------------------------------------------------------------


def _lists() -> dict[str, bytes]:
    rows = [(f"images/{i}.jpg", f"class {i % 2}") for i in range(4)]
    text = "".join(f"{path} {label}\n" for path, label in rows)
    cells = "path,label\n" + "".join(f'"{path}","{label}"\n' for path, label in rows)
    return {
        "a.txt": text.encode(),
        "b.txt": ("# comment\r\n" + text.replace(" ", "\t").replace("\n", "\r\n")).encode("utf-8-sig"),
        "c.txt": text.encode("utf-16"),
        "a.csv": cells.encode(),
        "b.csv": cells.replace(",", ";").encode("utf-16"),
        "a.jsonl": "".join(json.dumps({"image": path, "label": label}) + "\n" for path, label in rows).encode(),
        "a.tsv": cells.replace(",", "\t").encode(),
    }


def _change_list(rng: random.Random, _: str, data: bytes) -> bytes:
    changed = damaged(rng, data)
    at = rng.randrange(len(changed) + 1)
    odd = rng.choice(
        (b"", b"\0", b'"', b"'", b"\\", b"~", b"~root/", b",", b";", b"\t", b"\r", b"\x85", b"\xe2\x80\xa8")
    )
    odd = (
        b""
        if rng.random() < 0.5
        else rng.choice((odd, odd, b"\xff", b"\xed\xa0\x80", "٣".encode(), b"1e999", b"nan", b"://", b"#", b"\n"))
    )
    return changed[:at] + odd * rng.choice((1, 1, 2, 5000, 200_000)) + changed[at:]


def _read_list(path: Path) -> None:
    from mocov3.errors import UserError

    images = path.parent / "images"
    if not images.exists():
        images.mkdir()
        for i in range(4):
            (images / f"{i}.jpg").write_bytes(_image("JPEG"))
    try:
        _read_source(path)
    except UserError as error:
        assert len(str(error)) < 5000, "a message that no one reads"
        raise


# --- DICOM --------------------------------------------------------------------------------------------------------


def _dicom() -> dict[str, bytes]:
    """Files that pydicom brings along, of many transfer syntaxes and layouts."""
    from dicom_files import test_file

    names = "MR_small_RLE MR_small_jp2klossless MR_small_jpeg_ls_lossless MR_small_implicit MR_small_bigendian"
    names += " JPGExtended SC_rgb_small_odd_jpeg SC_rgb_dcmtk_+eb+cy+s4 SC_rgb_jls_lossy_line SC_rgb_rle_16bit_2frame"
    names += " JPEGLSNearLossless_16 SC_ybr_full_422_uncompressed examples_jpeg2k image_dfl CT_small"
    return {f"{name}.dcm": test_file(name).read_bytes() for name in names.split()}


def _read_dicom(path: Path) -> None:
    from mocov3.data.sources import dicom, frames
    from mocov3.data.sources.opening import open_source
    from mocov3.data.views import decode

    decode.MAX_PIXELS = dicom.MAX_PIXELS = frames.MAX_PIXELS = MOST_PIXELS
    folder = path.parent / "studies"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / path.name).hardlink_to(path)
    source = open_source(str(folder))
    assert len(source) < 100_000
    steps = [partial(_see, source, i) for i in {*range(min(len(source), 3)), len(source) - 1}]
    take_all([*steps, lambda: decode.ImageBytes(path.read_bytes()).pixels()])


def _see(source: Any, index: int) -> None:
    from mocov3.data.views.decode import DecodeError, ImageBytes

    try:
        data = source.read(index)
    except OSError as error:
        raise DecodeError(str(error)) from None
    assert ImageBytes(data).pixels()[0].dtype == np.uint8


# --- slides -------------------------------------------------------------------------------------------------------


def _slides() -> dict[str, bytes]:
    import tempfile

    from slide_files import HALF_MICRON, pyramid, tissue

    image = tissue(200, 150)
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{kind}.tif": pyramid(Path(folder, kind), image, kind, **HALF_MICRON) for kind in _KINDS}
        return {name: path.read_bytes() for name, path in files.items()}


_KINDS = ("deflate", "jpeg", "lzw")


def _read_slide(path: Path) -> None:
    from mocov3.data.sources.slides import open_slide
    from mocov3.data.sources.tissue import Grid, tiles_of
    from mocov3.data.views.bands import Unfit
    from mocov3.data.views.decode import DecodeError

    try:
        slide = open_slide(str(path))
        try:
            for _, tile in zip(range(5), tiles_of(slide, Grid(32, tissue=0.1)), strict=False):
                assert slide.read(0, tile.x, tile.y, 32, 32).dtype == np.uint8
            slide.read(len(slide.sizes) - 1, 0, 0, 64, 64)
        finally:
            slide.close()
    except Unfit as error:
        raise DecodeError(str(error)) from None


DATA = {
    "images": Kind(_images, _change_image, _read_image, 100),
    "archives": Kind(_archives, _change_archive, _read_source, 50),
    "tables": Kind(_tables, _change_table, _read_source, 150),
    "lists": Kind(_lists, _change_list, _read_list, 100),
    "slides": Kind(_slides, lambda rng, _, data: damaged(rng, data), _read_slide, 100),
    "dicom": Kind(_dicom, lambda rng, _, data: damaged(rng, data), _read_dicom, 100),
}
