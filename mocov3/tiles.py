"""``mocov3 tiles SLIDE… --mpp 0.5 --out tiles.parquet``: a grid of tiles over large images, without empty glass.

Nothing is cut out: the table says where the tiles lie, and ``mocov3 pretrain tiles.parquet`` reads them from the
slides. Satellite images are read the same way; all their tiles are kept, and half a metre a pixel is --mpp 500000.
"""

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    if out.exists() and not (args.overwrite and out.is_file()):
        raise UserError(f"--out {out}: exists; name another, or give --overwrite")
    slides = slides_in(args.slides)
    names = _names(slides)
    partial = out.with_name(f"{out.name}.partial")
    total, left_out = 0, _LeftOut()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(partial, _schema(args.bit_window)) as writer:
            for slide in slides:
                total += _add(writer, slide, names[slide], args, left_out)
        if not total:
            raise UserError(f"no tile of {len(slides)} slides is left: {'; '.join(left_out.lines())}")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    for line in left_out.lines():
        warn(f"left out: {line}")
    print(f"{printable(str(out))}: {total} tiles of {len(slides) - len(left_out.why)} slides")
    return 0


@dataclass
class _LeftOut:
    """Slides of which there are no tiles, and why."""

    why: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A line a reason, the most frequent first."""
        said = []
        for text, count in Counter(self.why.values()).most_common():
            first = printable(next(path for path, why in self.why.items() if why == text))
            said.append(f"{first} {text}" if count == 1 else f"{count} slides, first {first}: {text}")
        return said


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="mocov3 tiles", description=__doc__)
    parser.add_argument("slides", nargs="+", type=path, metavar="SLIDE", help="slide or map; a folder: all in it")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="table to write, .parquet")
    parser.add_argument("--size", type=int, default=224, metavar="PX", help="side of a tile (default 224)")
    parser.add_argument(
        "--mpp", type=float, default=None, help="micrometres a pixel of a tile (default: those of the file)"
    )
    parser.add_argument("--file-mpp", type=float, default=None, metavar="MPP", help="of files that do not say theirs")
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
    parser.add_argument("--overwrite", action="store_true", help="replace the table if it exists")
    args = parser.parse_args(list(argv))
    if not 1 <= args.size <= 1 << 12:
        raise UserError(f"--size must lie between 1 and {1 << 12}, not {args.size}")
    if not 0 <= args.tissue <= 1:
        raise UserError(f"--tissue must lie between 0 and 1, not {args.tissue:g}")
    for name in ("mpp", "file_mpp"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1e12:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and below 1e12, not {value:g}")
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


def _add(writer: Any, path: str, name: str, args: argparse.Namespace, left_out: _LeftOut) -> int:
    """Write the tiles of a slide; how many. Why one has none goes to ``left_out``."""
    import pyarrow as pa

    count = 0
    try:
        said = digest(path)
        slide = open_slide(path, window(args.bit_window))
        try:
            grid = Grid(args.size, args.mpp or 0.0, 0.0 if slide.is_map else args.tissue, args.file_mpp or 0.0)
            for tiles in _chunks(tiles_of(slide, grid)):
                place = _relative(path, Path(args.out).parent)
                same = {"path": place, "slide": name, "size": args.size, "digest": said}
                rows = [{**vars(tile), **same} for tile in tiles]
                _write(writer, pa.Table.from_pylist(rows, writer.schema), args.out)
                count += len(rows)
        finally:
            slide.close()
    except Unfit as error:
        why = str(error)
    except OSError as error:
        why = f"cannot be read ({reason(error)})"
    else:
        why = "" if count else f"has no tile of --size {args.size} that is --tissue {args.tissue:g}"
    if why:
        left_out.why[path] = why
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
