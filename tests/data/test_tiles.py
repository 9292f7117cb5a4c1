"""Tiles of slides and maps: regions against whole arrays and OpenSlide; the grid, the mask, tables, memory, handles."""

import json
import os
import pickle
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import TINY, documented
from doors import refused
from PIL import Image
from slide_files import HALF_MICRON, SIDE, pyramid, tissue
from trials import record, trials

from mocov3 import cli
from mocov3.data import open_source
from mocov3.data.sources import pyramids, slides
from mocov3.data.sources.opening import Subset, field_groups
from mocov3.data.sources.pyramids import Pyramid
from mocov3.data.sources.tissue import Grid, thumbnail, tiles_of
from mocov3.data.views.bands import Unfit
from mocov3.errors import UserError

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra slides) is not installed")
RNG = np.random.Generator(np.random.PCG64(11))
IMAGE = tissue(300, 200)
DEEP = RNG.integers(0, 10_000, (200, 300, 5)).astype(np.uint16)
REGIONS = [(0, 0, 300, 200), (10, 20, 130, 90), (63, 64, 66, 64), (250, 150, 50, 50), (0, 199, 300, 1)]


def outside(image, x, y, width, height, fill=0):
    """A region that may reach over the edges, cut from a whole image."""
    big = np.pad(image, ((50, 50), (50, 50), (0, 0)), constant_values=fill)
    return big[y + 50 : y + 50 + height, x + 50 : x + 50 + width]


def flat(path, image, **options):
    tifffile.imwrite(path, image, **options)
    return path


def lzw_strips(path, image):
    Image.fromarray(image).save(path, compression="tiff_lzw")
    return path


TILED = {"tile": (SIDE, SIDE), "photometric": "rgb"}
LAYOUTS = {
    "deflate": lambda p: flat(p, IMAGE, compression="deflate", **TILED),
    "predictor": lambda p: flat(p, IMAGE, compression="deflate", predictor=True, **TILED),
    "lzw": lambda p: pyramid(p, IMAGE, "lzw", 1),
    "lzw strips": lambda p: lzw_strips(p, IMAGE),
    "plain tiles": lambda p: flat(p, IMAGE, **TILED),
    "plain": lambda p: flat(p, IMAGE, photometric="rgb"),
    "plain planes": lambda p: flat(p, IMAGE.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"),
    "strips": lambda p: flat(p, IMAGE, photometric="rgb", rowsperstrip=17, compression="deflate"),
    "planes": lambda p: flat(
        p, IMAGE.transpose(2, 0, 1).copy(), planarconfig="separate", compression="deflate", **TILED
    ),
    "plane strips": lambda p: flat(
        p,
        IMAGE.transpose(2, 0, 1).copy(),
        photometric="rgb",
        planarconfig="separate",
        compression="deflate",
        rowsperstrip=23,
    ),
    "big-endian": lambda p: flat(p, IMAGE, byteorder=">", compression="deflate", **TILED),
    "BigTIFF": lambda p: flat(p, IMAGE, bigtiff=True, compression="deflate", **TILED),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_regions_are_those_of_the_whole(layout, tmp_path):
    slide = Pyramid(str(LAYOUTS[layout](tmp_path / "a.tif")))
    assert slide.sizes == [(300, 200)]
    for region in REGIONS:
        x, y, width, height = region
        assert np.array_equal(slide.read(0, *region), IMAGE[y : y + height, x : x + width])
    for region in ((-7, -9, 40, 50), (280, 190, 40, 30)):
        assert np.array_equal(slide.read(0, *region), outside(IMAGE, *region))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("byteorder", "<>")
def test_bands_of_more_than_8_bits(planar, byteorder, tmp_path):
    values = DEEP if planar == "contig" else DEEP.transpose(2, 0, 1).copy()
    options = {"tile": (SIDE, SIDE), "photometric": "minisblack", "compression": "deflate", "byteorder": byteorder}
    path = flat(tmp_path / "a.tif", values, planarconfig=planar, **options)
    region = DEEP[20:110, 10:140]
    assert np.array_equal(Pyramid(str(path)).read(0, 10, 20, 130, 90), region >> 8)
    windowed = np.clip(np.rint((region.astype(float) - 1000) * 255 / 4000), 0, 255)
    assert np.array_equal(Pyramid(str(path), (1000, 5000)).read(0, 10, 20, 130, 90), windowed)


def test_greys_inverted_ones_and_transparency(tmp_path):
    gray = IMAGE[..., 0].copy()
    assert np.array_equal(Pyramid(str(flat(tmp_path / "g.tif", gray))).read(0, 5, 6, 70, 80)[..., 0], gray[6:86, 5:75])
    white = Pyramid(str(flat(tmp_path / "w.tif", gray, photometric="miniswhite")))
    assert np.array_equal(white.read(0, 5, 6, 70, 80)[..., 0], 255 - gray[6:86, 5:75])
    clear = np.dstack([IMAGE, np.where(gray > 200, 0, 255).astype(np.uint8)])
    slide = Pyramid(str(flat(tmp_path / "a.tif", clear, photometric="rgb", extrasamples=["unassalpha"], tile=(64, 64))))
    assert np.array_equal(slide.read(0, 0, 0, 300, 200), np.where(gray[..., None] > 200, 255, IMAGE))


def test_pixels_of_jpeg_tiles_are_libtiffs(tmp_path):
    path = pyramid(tmp_path / "a.tif", IMAGE, "jpeg", 1)
    want = np.asarray(Image.open(path).convert("RGB"))
    assert 0 < np.abs(want.astype(int) - IMAGE).mean() < 4
    for x, y, width, height in REGIONS:
        assert np.array_equal(Pyramid(str(path)).read(0, x, y, width, height), want[y : y + height, x : x + width])


@pytest.mark.parametrize("kind", ["deflate", "jpeg", "lzw"])
def test_every_level_is_as_openslide_reads_it(kind, tmp_path):
    openslide = pytest.importorskip("openslide", reason="openslide (extra slides) is not installed")
    path = str(pyramid(tmp_path / "a.tif", tissue(), kind, **HALF_MICRON))
    ours, theirs = slides.open_slide(path), openslide.OpenSlide(path)
    assert isinstance(ours, Pyramid)  # plain TIFF needs no OpenSlide
    assert ours.sizes == list(theirs.level_dimensions)
    assert ours.mpp == pytest.approx(float(theirs.properties["openslide.mpp-x"])) == pytest.approx(0.5)
    for level in range(3):
        x, y = 24, 16
        region = theirs.read_region((x << level, y << level), level, (90, 70)).convert("RGB")
        assert np.array_equal(ours.read(level, x, y, 90, 70), np.asarray(region))


def test_scanners_formats_are_openslides(tmp_path):
    openslide = pytest.importorskip("openslide", reason="openslide (extra slides) is not installed")
    text = "Aperio Image Library v1\r\n700x500|AppMag = 20|MPP = 0.25"
    path = pyramid(tmp_path / "a.svs", tissue(), "jpeg", 1, description=text, metadata=None)
    assert openslide.OpenSlide.detect_format(path) == "aperio"
    slide = slides.open_slide(str(path))
    assert not isinstance(slide, Pyramid)
    assert slide.mpp == 0.25
    plain = Pyramid(str(path))
    assert plain.mpp == 0.25
    assert np.array_equal(slide.read(0, 30, 40, 200, 100), plain.read(0, 30, 40, 200, 100))


def test_levels_in_sub_directories(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(IMAGE, subifds=1, compression="deflate", **TILED)
        writer.write(IMAGE[::2, ::2].copy(), subfiletype=1, compression="deflate", **TILED)
    slide = Pyramid(str(tmp_path / "a.tif"))
    assert slide.sizes == [(300, 200), (150, 100)]
    assert np.array_equal(slide.read(1, 20, 10, 60, 50), IMAGE[::2, ::2][10:60, 20:80])


def test_only_the_segments_of_a_region_are_read(tmp_path, monkeypatch):
    path = flat(tmp_path / "a.tif", RNG.integers(0, 256, (2048, 2048, 3), np.uint8), compression="deflate", **TILED)
    slide = Pyramid(str(path))
    taken = []
    decoded = Pyramid._segment
    monkeypatch.setattr(
        Pyramid, "_segment", lambda self, page, index: taken.append(index) or decoded(self, page, index)
    )
    slide.read(0, 1000, 70, 100, 50)
    assert taken == [32 + 15, 32 + 16, 32 + 17]


GEO = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0), True)]


def geo_keys(model, *more):
    keys = [1024, 0, 1, model, *more]
    return (34735, "H", 4 + len(keys), (1, 1, 0, len(keys) // 4, *keys), True)


@pytest.mark.parametrize(
    ("options", "mpp", "is_map"),
    [
        (HALF_MICRON, 0.5, False),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5, False),
        ({"description": "Aperio x|AppMag = 40|MPP = 0.2525", "metadata": None}, 0.2525, False),
        ({}, 0.0, False),
        ({"extratags": [*GEO, geo_keys(1, 3072, 0, 1, 32633)]}, 1e7, True),
        ({"extratags": [*GEO, geo_keys(1, 3076, 0, 1, 9002)]}, 0.0, True),  # in feet
        ({"extratags": [*GEO, geo_keys(2, 2048, 0, 1, 4326)]}, 0.0, True),  # in degrees
    ],
)
def test_how_large_a_pixel_is(options, mpp, is_map, tmp_path):
    slide = Pyramid(str(flat(tmp_path / "a.tif", IMAGE, **TILED, **options)))
    assert (slide.mpp, slide.is_map) == (pytest.approx(mpp), is_map)


def test_omes_say_it_in_xml(tmp_path):
    about = {"axes": "YXS", "PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm"}
    assert Pyramid(str(flat(tmp_path / "a.ome.tif", IMAGE, metadata=about, **TILED))).mpp == pytest.approx(0.325)


# --- the grid ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slide(tmp_path):
    return Pyramid(str(pyramid(tmp_path / "a.tif", tissue(), **HALF_MICRON)))


def test_a_grid_without_a_mask_covers_all_that_is_whole(slide):
    tiles = list(tiles_of(slide, Grid(64, 0.5, 0.0)))
    assert [(t.x, t.y) for t in tiles] == [(64 * c, 64 * r) for r in range(500 // 64) for c in range(700 // 64)]
    assert {(t.level, t.read) for t in tiles} == {(0, 64)}
    for mpp, level, read in ((1.0, 1, 64), (1.5, 1, 96), (2.0, 2, 64), (2.4, 2, 77), (0.52, 0, 67)):
        tiles = list(tiles_of(slide, Grid(64, mpp, 0.0)))
        assert {(t.level, t.read) for t in tiles} == {(level, read)}
        assert len(tiles) == int(700 / (128 * mpp)) * int(500 / (128 * mpp))
        assert all(t.x + t.read * 2**level <= 700 and t.y + t.read * 2**level <= 500 for t in tiles)


def test_the_mask_keeps_tissue(slide):
    """Against the disc that was drawn, in closed form."""
    rows, columns = np.mgrid[:500, :700]
    disc = (columns - 245) ** 2 + (rows - 250) ** 2 < 180**2
    found = {(t.x, t.y): t.tissue for t in tiles_of(slide, Grid(32, 0.5, 0.5))}
    shares = {
        (x, y): disc[y : y + 32, x : x + 32].mean() for y in range(0, 500 - 31, 32) for x in range(0, 700 - 31, 32)
    }
    assert {place for place, share in shares.items() if share > 0.75} <= set(found)
    assert not {place for place, share in shares.items() if share < 0.25} & set(found)
    assert max(abs(found[place] - shares[place]) for place in found) < 0.2


def test_tissue_is_told_by_colours(tmp_path):
    slide = Pyramid(str(flat(tmp_path / "g.tif", IMAGE[..., 0].copy())))
    with pytest.raises(Unfit, match="has 1 channels, by which tissue is not told: give --tissue 0"):
        list(tiles_of(slide, Grid(32)))
    assert len(list(tiles_of(slide, Grid(32, tissue=0)))) == 9 * 6


def test_empty_glass_has_no_tissue(tmp_path):
    glass = (236 + RNG.integers(0, 6, (300, 300, 3))).astype(np.uint8)
    slide = Pyramid(str(flat(tmp_path / "a.tif", glass, compression="deflate", **TILED)))
    assert not list(tiles_of(slide, Grid(32)))


def test_thumbnails_are_made_block_by_block(slide, monkeypatch):
    whole = thumbnail(slide, 256)
    assert max(whole.shape) <= 256
    monkeypatch.setattr("mocov3.data.sources.tissue._BLOCK", 100)
    parts = thumbnail(slide, 256)
    assert parts.shape[2] == 3
    shared = tuple(slice(min(a, b)) for a, b in zip(whole.shape[:2], parts.shape[:2], strict=True))
    assert max(abs(a - b) for a, b in zip(whole.shape, parts.shape, strict=True)) <= 4
    assert np.abs(whole[shared].astype(int) - parts[shared]).mean() < 12


def test_resolutions_that_cannot_be_had(tmp_path, slide):
    with pytest.raises(Unfit, match=r"0\.5 µm a pixel, which is coarser than --mpp 0\.25"):
        list(tiles_of(slide, Grid(64, 0.25)))
    unsaid = Pyramid(str(flat(tmp_path / "b.tif", IMAGE, **TILED)))
    with pytest.raises(Unfit, match="give --file-mpp"):
        list(tiles_of(unsaid, Grid(64, 0.5)))
    assert len(list(tiles_of(unsaid, Grid(32, 0.5, 0.0, file_mpp=0.25)))) == 4 * 3


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def laid(tmp_path):
    """A folder of three slides of three compressions, and the table of their tiles."""
    for i, kind in enumerate(("deflate", "jpeg", "lzw")):
        (tmp_path / "slides").mkdir(exist_ok=True)
        pyramid(tmp_path / "slides" / f"s{i}.tif", tissue(seed=i), kind, **HALF_MICRON)
    table = tmp_path / "tiles.parquet"
    assert cli.main(["tiles", str(tmp_path / "slides"), "--size", "32", "--mpp", "1", "--out", str(table)]) == 0
    return table


def test_tiles_are_read_from_their_slides(laid):
    source = open_source(str(laid))
    rows = pq.read_table(laid).to_pylist()
    assert len(source) == len(rows) > 60
    assert list(field_groups(source, "")) == [row["slide"] for row in rows]
    assert set(field_groups(source, "")) == {"s0", "s1", "s2"}
    assert {row["path"] for row in rows} == {os.path.join("slides", f"s{i}.tif") for i in range(3)}
    whole = {name: tissue(seed=int(name[1]))[::2, ::2] for name in ("s0", "s2")}  # JPEG, of s1, changes pixels
    for i, row in enumerate(rows):
        if row["slide"] in whole:
            x, y = row["x"] // 2, row["y"] // 2
            assert np.array_equal(source.read(i), whole[row["slide"]][y : y + 32, x : x + 32])
    assert len({source.name(i) for i in range(len(source))}) == len(source)
    assert list(field_groups(Subset(source, np.array([3, 1])), "")) == [
        list(field_groups(source, ""))[i] for i in (3, 1)
    ]
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.read(5), source.read(5))
    assert len(pickle.dumps(source)) < 20_000
    assert again.digest == source.digest


def test_another_size_is_resampled_by_area(tmp_path):
    path = pyramid(tmp_path / "a.tif", tissue(), levels=1, **HALF_MICRON)
    table = tmp_path / "t.parquet"
    assert cli.main(["tiles", str(path), "--size", "20", "--mpp", "2", "--tissue", "0", "--out", str(table)]) == 0
    source = open_source(str(table))
    want = tissue()[160:240, 80:160].reshape(20, 4, 20, 4, 3).mean((1, 3))
    index = next(i for i in range(len(source)) if source.name(i) == "a:0:80,160")
    assert np.abs(source.read(index) - want).max() <= 0.5 + 1e-9


def test_bands_and_window_of_a_map(tmp_path):
    options = {"tile": (SIDE, SIDE), "photometric": "minisblack", "planarconfig": "contig"}
    flat(tmp_path / "m.tif", DEEP, extratags=[*GEO, geo_keys(1, 3072, 0, 1, 32633)], **options)
    table = tmp_path / "t.parquet"
    argv = ["tiles", str(tmp_path / "m.tif"), "--size", "50", "--bit-window", "0,10000", "--out", str(table)]
    assert cli.main(argv) == 0
    source = open_source(str(table))
    assert len(source) == 6 * 4  # of a map all
    assert np.abs(source.read(0) - DEEP[:50, :50] * 255.0 / 10_000).max() <= 0.5 + 1e-9


def test_labels_of_tables(laid, tmp_path):
    table = pq.read_table(laid)
    names = ["tumour" if i % 3 else None for i in range(len(table))]
    pq.write_table(table.append_column("label", [names]), tmp_path / "labelled.parquet")
    source = open_source(str(tmp_path / "labelled.parquet"))
    assert source.classes == ["tumour"]
    assert source.labels.tolist() == [0 if i % 3 else -1 for i in range(len(source))]
    assert "have no label" in "".join(source.skipped)


def test_slides_that_changed_or_went_are_refused(laid):
    slide = laid.parent / "slides" / "s1.tif"
    content = slide.read_bytes()
    os.utime(slide, (1, 1))
    assert len(open_source(str(laid)))  # a copy has another date
    slide.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match=r"s1\.tif is not what it was; run mocov3 tiles again"):
        open_source(str(laid))
    slide.unlink()
    with pytest.raises(UserError, match=r"s1\.tif: No such file .*relative to the table"):
        open_source(str(laid))


def test_damaged_slides_cost_their_tiles_only(tmp_path, capsys):
    good, bad = (pyramid(tmp_path / f"{name}.tif", tissue(), "jpeg", **HALF_MICRON) for name in ("good", "bad"))
    with tifffile.TiffFile(bad) as file:
        page = file.pages[1]
        place, count = page.dataoffsets[14], page.databytecounts[14]
    content = bytearray(bad.read_bytes())
    content[place : place + count] = bytes(count)
    bad.write_bytes(bytes(content))
    (tmp_path / "text.tif").write_text("none")
    argv = ["tiles", str(tmp_path), "--size", "64", "--mpp", "1", "--tissue", "0", "--out", str(tmp_path / "t.parquet")]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "left out" in err
    assert "text.tif is no" in err
    source = open_source(str(tmp_path / "t.parquet"))
    failed = []
    for i in range(len(source)):
        try:
            source.read(i)
        except OSError as error:
            failed.append(str(error))
    assert len(source) == 2 * 5 * 3
    assert len(failed) == 1
    assert "damaged pixels" in failed[0]
    assert good.exists()


def test_what_the_command_refuses(tmp_path, monkeypatch, capsys):
    path = pyramid(tmp_path / "a.tif", tissue(), **HALF_MICRON)
    out = tmp_path / "t.parquet"
    assert "ends in .parquet" in refused("tiles", path, "--out", tmp_path / "t.csv")
    assert cli.main(["tiles", str(path), "--size", "1000", "--out", str(out)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"no tile of 1 slides is left: {path} has 700×500 pixels: it is smaller than a tile of --size 1000" in said
    assert "at --mpp 2: it is smaller" in refused("tiles", path, "--size", "300", "--mpp", "2", "--out", out)
    assert "--mpp must be above 0" in refused("tiles", path, "--mpp", "0", "--out", out)
    assert "--file-mpp must be above 0" in refused("tiles", path, "--file-mpp", "nan", "--out", out)
    assert "--size must lie" in refused("tiles", path, "--size", "0", "--out", out)
    assert "--tissue must lie" in refused("tiles", path, "--tissue", "2", "--out", out)
    assert "takes two values" in refused("tiles", path, "--bit-window", "5", "--out", out)
    assert "holds no slide" in refused("tiles", tmp_path / "none", "--out", out)
    assert "cannot be written" in refused("tiles", path, "--out", path / "t.parquet")
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif"]
    (tmp_path / "x.svs").write_bytes(b"something else")
    monkeypatch.setattr(slides, "_has_openslide", lambda: False)
    with pytest.raises(Unfit, match=r"pip install 'mocov3\[slides\]'"):
        slides.open_slide(str(tmp_path / "x.svs"))


def test_one_large_compressed_piece_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pyramids, "_MOST_SEGMENT", 1000)
    path = flat(tmp_path / "a.tif", IMAGE, photometric="rgb", compression="deflate", rowsperstrip=200)
    with pytest.raises(Unfit, match="in one piece of 300×200 pixels: write it in tiles"):
        Pyramid(str(path))
    assert Pyramid(str(flat(tmp_path / "b.tif", IMAGE, photometric="rgb"))).sizes  # it can be read in part


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: /proc")
def test_memory_and_open_files_stay_flat_over_many_tiles(tmp_path):
    """50,000 tiles of 12 slides in random order under make soak, fewer in the suite."""
    image = tissue(512, 512)
    for i in range(12):
        pyramid(tmp_path / f"{i}.tif", image, "jpeg" if i % 2 else "deflate", 2, **HALF_MICRON)
    table = tmp_path / "t.parquet"
    assert cli.main(["tiles", str(tmp_path), "--size", "32", "--mpp", "0.6", "--tissue", "0", "--out", str(table)]) == 0
    source = open_source(str(table))
    count = trials(500, 50_000)
    order = np.random.default_rng(0).integers(0, len(source), count + 300)
    most_files = 0
    for step, index in enumerate(order.tolist()):
        if step == 300:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source.read(index)
        if step % 100 == 0:
            most_files = max(most_files, sum(str(tmp_path) in _target(f) for f in Path("/proc/self/fd").iterdir()))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert 0 < most_files <= slides._OPEN
    assert grown < 20
    record(
        "tiles read from 12 slides in random order", count, f"memory grew by {grown:.1f} MB, {most_files} open files"
    )


def _target(link):
    try:
        return os.readlink(link)
    except OSError:
        return ""


# --- the whole program ------------------------------------------------------------------------------------------


def test_the_documented_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SLIDES").mkdir()
    for i in range(3):
        pyramid(tmp_path / "SLIDES" / f"{i}.tif", tissue(seed=i), "jpeg", **HALF_MICRON)
    options = {"photometric": "minisblack", "planarconfig": "contig", "tile": (SIDE, SIDE)}
    flat(tmp_path / "SCENE.tif", DEEP, **options, extratags=[*GEO, geo_keys(1, 3072, 0, 1, 32633)])
    usual = ["-j", "0", "--device", "cpu"]
    more = {"pretrain": [*TINY, "-b", "8", "--epochs", "1", "--warmup-epochs", "0"], "embed": usual}
    more["check"] = [*usual, *TINY[2:6], "-b", "8"]
    lines = documented("## Slides and satellite images")
    assert len(lines) > 4
    for line in lines:
        line = line.replace("--size 224", "--size 32").replace("0099", "0000")
        assert cli.main([*line.split()[1:], *more.get(line.split()[1], [])]) == 0, line
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["corrupt"] == 0
    assert len(pq.read_table("features.parquet")) == len(open_source("tiles.parquet"))
