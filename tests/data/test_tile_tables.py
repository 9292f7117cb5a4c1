"""Tables of tiles: what is left out of them and why, what others wrote into them, a slide alone."""

import numpy as np
import pytest
import tifffile
from conftest import TINY
from doors import refused
from slide_files import HALF_MICRON, pyramid, tissue

from mocov3 import cli
from mocov3.data import open_source
from mocov3.data.sources.groups import groups_in

pa = pytest.importorskip("pyarrow", reason="pyarrow (extra slides) is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra slides) is not installed")


@pytest.fixture
def slide(tmp_path):
    return pyramid(tmp_path / "a.tif", tissue(), **HALF_MICRON)


def test_why_slides_are_left_out_is_said_once_a_reason(tmp_path, slide, capsys):
    for name in "bcd":
        pyramid(tmp_path / f"{name}.tif", tissue())  # which do not say how large their pixels are
    tifffile.imwrite(tmp_path / "e.tif", tissue()[..., 0].copy(), tile=(64, 64), compression="deflate", **HALF_MICRON)
    out = tmp_path / "t.parquet"
    slides = str(tmp_path)
    said = refused("tiles", *sorted(tmp_path.glob("[b-e].tif")), "--size", "64", "--mpp", "1", "--out", out)
    assert f"no tile of 4 slides is left: 3 slides, first {slides}/b.tif: does not say how large" in said
    assert f"{slides}/e.tif has 1 channels, by which tissue is not told" in said
    assert "coarser than --mpp 0.25" in refused("tiles", slide, "--size", "64", "--mpp", "0.25", "--out", out)
    assert not out.exists()
    assert cli.main(["tiles", slides, "--size", "64", "--mpp", "1", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "tiles of 1 slides" in told.out
    first, second = told.err.splitlines()
    assert "left out: 3 slides, first" in first
    assert f"left out: {slides}/e.tif has 1 channels" in second


def test_a_table_is_replaced_if_asked_for(tmp_path, slide):
    out = tmp_path / "t.parquet"
    argv = ["tiles", str(slide), "--out", str(out), "--size"]
    assert cli.main([*argv, "64"]) == 0
    before = out.read_bytes()
    assert "exists; name another, or give --overwrite" in refused(*argv, "32")
    assert out.read_bytes() == before
    assert cli.main([*argv, "32", "--overwrite"]) == 0
    assert set(pq.read_table(out)["size"].to_pylist()) == {32}


def test_tiles_over_the_edge_are_unreadable(tmp_path, slide):
    out = tmp_path / "t.parquet"
    assert cli.main(["tiles", str(slide), "--out", str(out), "--size", "50", "--mpp", "1", "--tissue", "0"]) == 0
    table = pq.read_table(out)
    source = open_source(str(out))
    assert len(source) == 7 * 5
    assert all(source.read(i).shape == (50, 50, 3) for i in range(len(source)))  # to the very edges
    rows = table.to_pylist()
    for row, place in zip(rows, [(-5, 0), (10**9, 0), (0, -1), (0, 402), (602, 0), (600, 400)], strict=False):
        row["x"], row["y"] = place
    pq.write_table(pa.Table.from_pylist(rows, table.schema), out)
    changed = open_source(str(out))
    for i in range(5):
        with pytest.raises(OSError, match="reaches over the edge of its slide"):
            changed.read(i)
    assert np.array_equal(changed.read(5), source.read(len(source) - 1))


def test_a_slide_alone_makes_no_groups(tmp_path, slide, capsys):
    out = tmp_path / "t.parquet"
    assert cli.main(["tiles", str(slide), "--out", str(out), "--size", "32", "--tissue", "0"]) == 0
    source = open_source(str(out))
    assert groups_in(source, "") is None
    assert "puts all images into one group" in refused("check", out, "--group-by", "slide", *TINY[2:6], "-b", "8")
    run = ["-j", "0", "--device", "cpu", "-b", "8", "--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    assert cli.main(["pretrain", str(out), *TINY, *run]) == 0
    assert "one group" not in "".join(capsys.readouterr())
    assert list((tmp_path / "run").glob("*.pth.tar"))
