"""``mocov3 tiles SLIDE… --mpp 0.5 --out tiles.parquet``: a grid of tiles over large images, without empty glass.

Nothing is cut out: the table says where the tiles lie, and ``mocov3 pretrain tiles.parquet`` reads them from the
slides. Satellite images are read the same way; all their tiles are kept, and half a metre a pixel is --mpp 500000.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mocov3.config.fields import Parser, path
from mocov3.config.views import window
from mocov3.data.sources.slides import digest, open_slide, slides_in
from mocov3.data.sources.tiles import WINDOW
from mocov3.data.sources.tissue import Grid, Tile, tiles_of
from mocov3.data.views.bands import Unfit
from mocov3.errors import UserError, printable, reason
from mocov3.output.log import warn

_AT_ONCE = 1 << 16  # rows in memory


def main(argv: Sequence[str]) -> int:
    """Lay tiles out and write the table; returns the exit code."""
    args = _parse(argv)
    out = Path(args.out)
    if out.suffix != ".parquet":
        raise UserError(f"--out {out}: name a file that ends in .parquet")
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("tables of tiles need pyarrow: pip install 'mocov3[slides]'") from None
    slides = slides_in(args.slides)
    names = _names(slides)
    partial = out.with_name(f"{out.name}.partial")
    total = used = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, _schema(args.bit_window)) as writer:
            for slide in slides:
                count = _add(writer, slide, names[slide], out.parent, args)
                total, used = total + count, used + bool(count)
        if not total:
            raise UserError(f"{printable(slides[0])}: no tile of {len(slides)} slides is left; see --tissue and --size")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    print(f"{printable(str(out))}: {total} tiles of {used} slides")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mocov3 tiles", description=__doc__)
    parser.add_argument("slides", nargs="+", type=path, metavar="SLIDE", help="slide or map; a folder: all in it")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="table to write, .parquet")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side of a tile (default 224)")
    parser.add_argument(
        "--mpp", type=float, default=0.0, help="micrometres a pixel of a tile (default: those of the file)"
    )
    parser.add_argument("--file-mpp", type=float, default=0.0, metavar="MPP", help="of files that do not say theirs")
    parser.add_argument(
        "--tissue",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of a tile that must be tissue (default 0.5); 0: every tile, as of maps",
    )
    parser.add_argument(
        "--bit-window", default="", metavar="LOW,HIGH", help="values that become black and white, of more than 8 bits"
    )
    args = parser.parse_args(list(argv))
    if not 1 <= args.size <= 1 << 12:
        raise UserError(f"--size must lie between 1 and {1 << 12}, not {args.size}")
    if not 0 <= args.tissue <= 1:
        raise UserError(f"--tissue must lie between 0 and 1, not {args.tissue:g}")
    for name in ("mpp", "file_mpp"):
        if not 0 <= getattr(args, name) < 1e12:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name):g}")
    window(args.bit_window)
    return args


def _schema(window_text: str) -> Any:
    import pyarrow as pa

    text = pa.dictionary(pa.int32(), pa.string())
    fields = [("path", text), ("slide", text), ("level", pa.int8()), ("x", pa.int64()), ("y", pa.int64())]
    fields += [("read", pa.int32()), ("size", pa.int32()), ("tissue", pa.float32()), ("digest", text)]
    about = {b"made_by": b"mocov3 tiles"}
    if window_text:
        about[WINDOW] = window_text.encode()
    return pa.schema(fields, metadata=about)


def _names(slides: Sequence[str]) -> dict[str, str]:
    """What to call each slide: its file without the ending where no other is called so, else its path."""
    stems = [Path(slide).stem for slide in slides]
    return {slide: stem if stems.count(stem) == 1 else slide for slide, stem in zip(slides, stems, strict=True)}


def _add(writer: Any, path: str, name: str, base: Path, args: argparse.Namespace) -> int:
    """Write the tiles of a slide; how many. What cannot be read is left out, and said."""
    import pyarrow as pa

    count = 0
    try:
        said = digest(path)
        slide = open_slide(path, window(args.bit_window))
        try:
            grid = Grid(args.size, args.mpp, 0.0 if slide.is_map else args.tissue, args.file_mpp)
            for tiles in _chunks(tiles_of(slide, grid)):
                same = {"path": _relative(path, base), "slide": name, "size": args.size, "digest": said}
                rows = [{**vars(tile), **same} for tile in tiles]
                _write(writer, pa.Table.from_pylist(rows, writer.schema), args.out)
                count += len(rows)
        finally:
            slide.close()
    except Unfit as error:
        warn(f"left out: {printable(path)} {error}")
    except OSError as error:
        warn(f"left out: {printable(path)}: {reason(error)}")
    else:
        if not count:
            warn(f"left out: {printable(path)}: no tile of {args.size} pixels is {args.tissue:g} tissue")
    return count


def _relative(path: str, base: Path) -> str:
    try:
        return os.path.relpath(path, base)
    except ValueError:  # on another drive
        return os.path.abspath(path)


def _write(writer: Any, rows: Any, out: str) -> None:
    try:
        writer.write_table(rows)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({reason(error)})") from None


def _chunks(tiles: Iterator[Tile]) -> Iterator[list[Tile]]:
    chunk: list[Tile] = []
    for tile in tiles:
        chunk.append(tile)
        if len(chunk) == _AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
