"""DICOM: pixels of every layout against closed forms and pydicom's reading; frames, groups; nothing of a patient."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, TINY, documented
from doors import refused

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra dicom) is not installed")
pytest.importorskip("libjpeg", reason="pylibjpeg-libjpeg (extra dicom) is not installed")
pytest.importorskip("openjpeg", reason="pylibjpeg-openjpeg (extra dicom) is not installed")

from dicom_files import SECRET, dataset, radiograph, study
from dicom_files import test_file as brought
from PIL import Image
from pydicom import Dataset, pixels, uid

from mocov3 import cli
from mocov3.config.presets import PRESETS, Reading
from mocov3.data import open_source
from mocov3.data.sources import dicom as source_module
from mocov3.data.sources.labels import Labelled, read_labels
from mocov3.data.sources.opening import Roots, Subset, called, field_groups
from mocov3.data.sources.survey import Survey, propose
from mocov3.data.views import decode, formats, remarks
from mocov3.data.views.decode import DecodeError, ImageBytes
from mocov3.errors import UserError

RNG = np.random.Generator(np.random.PCG64(7))
GRAY = Reading(1)
COLOURS = RNG.integers(0, 256, (32, 36, 3), dtype=np.uint8)
SIGNED = RNG.integers(-1000, 2048, (32, 36)).astype(np.int16)
TWELVE = RNG.integers(0, 4096, (32, 36)).astype(np.uint16)
EIGHT = RNG.integers(0, 256, (32, 36), dtype=np.uint8)


def written(ds, **options):
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True, **options)
    return file.getvalue()


def shown(data, reading=GRAY):
    pixels = ImageBytes(data, reading).pixels()[0]
    return pixels[..., 0] if reading.channels == 1 else pixels


def saved(folder, ds, name="a.dcm"):
    folder.mkdir(exist_ok=True)
    ds.save_as(folder / name, enforce_file_format=True)
    return folder


def windowed(values, centre, width):
    """PS3.3, C.11.2.1.2.1, to 0–255."""
    y = ((values.astype(float) - (centre - 0.5)) / (width - 1) + 0.5) * 255
    y[values <= centre - 0.5 - (width - 1) / 2] = 0
    y[values > centre - 0.5 + (width - 1) / 2] = 255
    return np.rint(y)


# --- pixels -----------------------------------------------------------------------------------------------------


def test_a_window_of_the_file_is_the_standards():
    data = written(dataset(TWELVE, bits=12, WindowCenter=[1000, 9], WindowWidth=[700, 9]))
    assert np.abs(shown(data) - windowed(TWELVE, 1000, 700)).max() == 0
    hounsfield = {"RescaleSlope": 2, "RescaleIntercept": -500, "WindowCenter": 40, "WindowWidth": 400}
    data = written(dataset(SIGNED, bits=12, **hounsfield))
    assert np.abs(shown(data) - windowed(2.0 * SIGNED - 500, 40, 400)).max() == 0
    inverted = written(dataset(SIGNED, bits=12, PhotometricInterpretation="MONOCHROME1", **hounsfield))
    assert np.array_equal(shown(inverted), 255 - shown(data))
    given = shown(data, Reading(1, (-200, 700)))  # instead of the file's
    assert np.array_equal(given, np.clip(np.rint((2.0 * SIGNED - 300) * 255 / 900), 0, 255))
    assert np.array_equal(shown(data, Reading(3)), np.repeat(shown(data)[..., None], 3, 2))
    sigmoid = written(dataset(TWELVE, bits=12, WindowCenter=2000, WindowWidth=900, VOILUTFunction="SIGMOID"))
    assert np.abs(shown(sigmoid) - 255 / (1 + np.exp(-4 * (TWELVE - 2000.0) / 900))).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("samples", "bits", "want"),
    [
        (EIGHT, 8, EIGHT),
        (TWELVE, 12, TWELVE >> 4),
        (TWELVE, 16, TWELVE >> 8),
        (SIGNED, 16, (SIGNED.astype(int) + 32768) >> 8),
        (SIGNED, 12, (SIGNED.astype(int) + 2048) >> 4),
        (EIGHT >> 4, 4, (EIGHT >> 4) * 17),
        (TWELVE.astype(np.uint32) << 20, 32, TWELVE >> 4),
    ],
    ids=["8", "12", "16", "signed", "signed 12", "4", "32"],
)
def test_without_a_window_the_upper_bits_are_taken(samples, bits, want):
    remarks.taken()
    assert np.array_equal(shown(written(dataset(samples, bits=bits))), want)
    said = remarks.taken()
    assert ("has no window" in said) == (bits > 8)
    odd = {"WindowCenter": 5, "WindowWidth": 0}  # makes no sense
    assert np.array_equal(shown(written(dataset(samples, bits=bits, **odd))), want)
    falling = {"RescaleSlope": -1, "RescaleIntercept": 0}
    assert np.array_equal(shown(written(dataset(samples, bits=bits, **falling))), 255 - want)


def test_look_up_tables():
    table = Dataset()
    curve = (np.sqrt(np.arange(4096) / 4095) * 1023).astype(np.uint16)
    table.add_new("LUTDescriptor", "US", [4096, 0, 10])
    table.add_new("LUTData", "OW", curve.tobytes())
    table.LUTExplanation = SECRET
    window = {"WindowCenter": 5, "WindowWidth": 2}  # the table goes before it
    data = written(dataset(TWELVE, bits=12, VOILUTSequence=[table], **window))
    assert np.abs(shown(data) - curve[TWELVE] / 1023 * 255).max() <= 0.5 + 1e-6
    curve <<= 6  # modality tables are of 8 or 16 bits
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], curve.tobytes()
    table.ModalityLUTType = SECRET
    data = written(dataset(TWELVE, bits=12, ModalityLUTSequence=[table]))
    assert np.array_equal(shown(data), curve[TWELVE] >> 8)
    red, green, blue = RNG.integers(0, 1 << 16, (3, 256)).astype(np.uint16)
    ds = dataset(EIGHT, PhotometricInterpretation="PALETTE COLOR")
    for name, values in (("Red", red), ("Green", green), ("Blue", blue)):
        ds.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"{name}PaletteColorLookupTableData", "OW", values.tobytes())
    want = np.stack([red[EIGHT], green[EIGHT], blue[EIGHT]], 2) >> 8
    assert np.array_equal(shown(written(ds), Reading(3)), want)


@pytest.mark.parametrize("planar", [0, 1])
def test_colours(planar):
    assert np.array_equal(shown(written(dataset(COLOURS, PlanarConfiguration=planar)), Reading(3)), COLOURS)
    deep = COLOURS.astype(np.uint16) << 4
    data = written(dataset(deep, bits=12, PlanarConfiguration=planar))
    assert np.array_equal(shown(data, Reading(3)), COLOURS)
    assert np.array_equal(shown(data, Reading(3, (0, 4080))), COLOURS)
    luma = np.asarray(Image.fromarray(COLOURS).convert("YCbCr"))
    ybr = written(dataset(luma, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=planar))
    assert np.abs(shown(ybr, Reading(3)).astype(int) - COLOURS).max() <= 3  # of two roundings


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "DeflatedExplicitVRLittleEndian"])
def test_lossless_compression_changes_nothing(syntax, tmp_path):
    ds = dataset(TWELVE, bits=12, WindowCenter=1000, WindowWidth=700)
    plain = shown(written(ds))
    if syntax.startswith("Deflated"):
        ds.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    else:
        pixels.compress(ds, getattr(uid, syntax))
    assert np.array_equal(shown(written(ds)), plain)
    source = open_source(str(saved(tmp_path / "d", ds)))
    assert np.array_equal(shown(source.read(0)), plain)


SAME = {
    "MR_small": [
        f"MR_small_{k}" for k in ["RLE", "bigendian", "expb", "implicit", "padded", "jp2klossless", "jpeg_ls_lossless"]
    ],
    "SC_rgb_small_odd": ["SC_rgb_small_odd_big_endian"],
    "SC_rgb_rle": ["SC_rgb_rle_2frame", "SC_rgb_rle_16bit", "SC_rgb_rle_32bit"],
}
"""Files that pydicom brings along: of others' making, the same pixels in several transfer syntaxes."""


@pytest.mark.parametrize(("plain", "other"), [(plain, other) for plain, names in SAME.items() for other in names])
def test_transfer_syntaxes_of_other_programs(plain, other, tmp_path):
    want = shown(brought(plain).read_bytes(), Reading(3))
    assert want.std() > 10
    assert np.array_equal(shown(brought(other).read_bytes(), Reading(3)), want)
    (tmp_path / "a.dcm").write_bytes(brought(other).read_bytes())
    assert np.array_equal(shown(open_source(str(tmp_path)).read(0), Reading(3)), want)


COLOUR_FILES = [
    "SC_rgb_jpeg_dcmtk",
    "SC_rgb_dcmtk_+eb+cy+s2",
    "SC_rgb_jls_lossy_sample",
    "SC_ybr_full_422_uncompressed",
]
COLOUR_FILES += ["SC_rgb_jpeg", "SC_rgb_small_odd_jpeg", "examples_ybr_color", "examples_rgb_color", "examples_jpeg2k"]


@pytest.mark.parametrize("name", COLOUR_FILES)
def test_colour_files_are_as_pydicom_reads_them(name, tmp_path):
    want = pixels.pixel_array(pydicom.dcmread(brought(name)), index=0)
    assert np.array_equal(shown(brought(name).read_bytes(), Reading(3)), want)
    (tmp_path / "a.dcm").write_bytes(brought(name).read_bytes())
    assert np.array_equal(shown(open_source(str(tmp_path)).read(0), Reading(3)), want)


# --- frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "RLELossless", "JPEG2000Lossless"]
)
def test_every_frame_is_an_image(syntax, tmp_path):
    film = np.stack([radiograph(i) for i in range(5)])
    ds = dataset(film, bits=12, NumberOfFrames=5)
    if syntax.startswith(("RLE", "JPEG")):
        pixels.compress(ds, getattr(uid, syntax))
    ds.file_meta.TransferSyntaxUID = getattr(uid, syntax)
    source = open_source(str(saved(tmp_path / "d", ds)))
    assert len(source) == 5
    for i in range(5):
        assert np.array_equal(shown(source.read(i)), film[i] >> 4)
    assert len(set(field_groups(source, ""))) == 1
    assert len({source.name(i) for i in range(5)}) == 5


def test_a_frame_of_a_long_film_is_read_alone(tmp_path, monkeypatch):
    film = RNG.integers(0, 256, (400, 64, 64), dtype=np.uint8)
    source = open_source(str(saved(tmp_path / "d", dataset(film, NumberOfFrames=400))))
    taken = []

    class Counted(io.FileIO):
        def read(self, *size):
            data = super().read(*size)
            taken.append(len(data))
            return data

        def readinto(self, buffer):
            taken.append(super().readinto(buffer))
            return taken[-1]

    monkeypatch.setattr("builtins.open", lambda path, mode: io.BufferedReader(Counted(path)))
    data = source.read(399)
    monkeypatch.undo()
    assert np.array_equal(shown(data), film[399])
    assert sum(taken) < 100_000 < film.nbytes


def test_an_enhanced_file_windows_every_frame_by_itself(tmp_path):
    film = np.stack([TWELVE, TWELVE])
    own = []
    for centre in (1000, 3000):
        window, frame = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 700
        frame.FrameVOILUTSequence = [window]
        own.append(frame)
    values, shared = Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept = 2, 10
    shared.PixelValueTransformationSequence = [values]
    more = {"PerFrameFunctionalGroupsSequence": own, "SharedFunctionalGroupsSequence": [shared]}
    source = open_source(str(saved(tmp_path / "d", dataset(film, bits=12, NumberOfFrames=2, **more))))
    for i, centre in enumerate((1000, 3000)):
        assert np.array_equal(shown(source.read(i)), windowed(2.0 * TWELVE + 10, centre, 700))


# --- sources ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    study(tmp_path / "clinic")
    return tmp_path / "clinic"


def test_a_clinics_folder(clinic):
    (clinic / "DICOMDIR").write_bytes((brought("dicomdirtests").parent / "dicomdirtests" / "DICOMDIR").read_bytes())
    (clinic / "report.dcm").write_bytes(brought("test-SR").read_bytes())
    (clinic / f"{SECRET}.xml").write_text("x")
    saved(clinic, dataset(radiograph(1), patient="0", BurnedInAnnotation="YES"), "burned.dcm")
    source = open_source(str(clinic))
    assert len(source) == 4 * (3 + 3) + 1
    keys = list(field_groups(source, ""))
    assert len(set(keys)) == 4
    by_folder = {}
    for i, key in enumerate(keys):
        by_folder.setdefault(os.path.dirname(called(source, i)), set()).add(key)
    assert len(by_folder) == 5  # the burned one beside them is of patient 0
    assert all(len(found) == 1 for found in by_folder.values())
    assert by_folder[""] == by_folder[f"{SECRET}_0^JANE"]
    assert (source.classes, source.labels) == ([], None)
    said = "\n".join(source.skipped)
    assert "4 subfolders are not taken for classes, as 4 hold one patient each" in said
    assert "left out 2 DICOM files without images (DICOMDIR" in said
    assert "1 DICOM files say that text is burned into their pixels" in said
    assert "left out 1 .xml" in said
    assert SECRET not in said + "".join(source.name(i) for i in range(len(source)))


def test_nothing_but_pixels_goes_on(clinic):
    source = open_source(str(clinic))
    for i in range(len(source)):
        data = source.read(i)
        assert SECRET.encode() not in data
        kept = {element.tag.group for element in pydicom.dcmread(io.BytesIO(data))}
        assert kept <= {0x0028, 0x7FE0}


def test_headers_are_remembered_until_a_file_changes(clinic, monkeypatch):
    before, asked = open_source(str(clinic)), []
    header = source_module._header
    monkeypatch.setattr(source_module, "_header", lambda *a: asked.append(a[1]) or header(*a))
    again = open_source(str(clinic))
    assert (again.digest, list(field_groups(again, "")), asked) == (before.digest, list(field_groups(before, "")), [])
    place = clinic / f"{SECRET}_0^JANE" / "IM0001"
    saved(place.parent, dataset(np.stack([TWELVE] * 4), bits=12, NumberOfFrames=4, patient="9"), place.name)
    changed = open_source(str(clinic))
    assert len(changed) == len(before) + 3
    assert len(asked) == 1
    assert len(set(field_groups(changed, ""))) == 5
    for file in (clinic.parent / "cache").rglob("dicom-*"):
        assert SECRET.encode() not in file.read_bytes()


def test_classes_of_several_patients_each_are_classes(tmp_path):
    for label, kind in enumerate(("healthy", "ill")):
        (tmp_path / kind).mkdir()
        for p in range(3):
            saved(tmp_path / kind, dataset(radiograph(p), patient=f"{label}{p}"), f"{p}.dcm")
    source = open_source(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == (["healthy", "ill"], [0] * 3 + [1] * 3)


def test_lists_and_labels_call_files_by_their_paths(clinic, tmp_path):
    files = sorted(str(p.relative_to(clinic)) for p in clinic.rglob("*") if p.is_file())
    rows = "path,label\n" + "".join(f"{file},{'ab'[i % 2]}\n" for i, file in enumerate(files))
    (clinic / "list.csv").write_text(rows)
    source = open_source(str(clinic / "list.csv"))
    assert len(source) == 24
    assert source.classes == ["a", "b"]
    films = [i for i in range(24) if "film" in called(source, i)]
    assert len(films) == 12
    assert all(source.labels[i] == source.labels[films[3 * (k // 3)]] for k, i in enumerate(films))
    folder = open_source(str(clinic))
    single = "path,label\n" + "".join(f"{f},{'ab'[i % 2]}\n" for i, f in enumerate(f for f in files if "film" not in f))
    (tmp_path / "labels.csv").write_text(single)
    known = read_labels(tmp_path / "labels.csv", folder)
    assert len(known.indices) == 12
    assert Labelled(folder, known).labels.tolist().count(0) == 6
    (tmp_path / "labels.csv").write_text(single + f"{SECRET}/no.dcm,a\n")
    with pytest.raises(UserError, match="line 14: the image is none of the images") as error:
        read_labels(tmp_path / "labels.csv", folder)
    assert SECRET not in str(error.value)


def test_groups_go_through_parts_and_several_sources(clinic, images):
    source = open_source(str(clinic))
    part = Subset(source, np.array([0, 7, 8]))
    assert list(field_groups(part, "")) == [list(field_groups(source, ""))[i] for i in (0, 7, 8)]
    both = open_source(f"{clinic}\n{images}")
    keys = list(field_groups(both, ""))
    assert len(keys) == len(both)
    assert (len(set(keys)), keys.count("")) == (4 + 1, 64)
    assert field_groups(open_source(str(images)), "") is None
    assert field_groups(Roots([open_source(str(images))] * 2, [1, 1]), "") is None


def test_groups_by_another_element_are_hashes_too(clinic):
    source = open_source(str(clinic))
    studies = field_groups(source, "StudyInstanceUID")
    assert len(set(studies)) == 4
    assert all(len(key) == 16 and "1.2.3" not in key for key in studies)
    assert set(field_groups(source, "PatientSex")) == {""}  # which no file says
    assert len(set(field_groups(source, "SOPInstanceUID"))) == 16  # a film is one
    assert field_groups(source, "patient") is None  # DICOM has no such element


def test_other_images_among_them_keep_their_pixels(clinic):
    Image.fromarray(COLOURS).save(clinic / f"{SECRET}.png")
    source = open_source(str(clinic))
    (index,) = (i for i in range(len(source)) if called(source, i).endswith(".png"))
    assert np.array_equal(shown(source.read(index), Reading(3)), COLOURS)
    assert SECRET not in source.name(index)


# --- faults -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_says_why_in_a_line(tmp_path):
    good = written(dataset(TWELVE, bits=12))
    for data, words in (
        (good[:-100], "damaged DICOM"),
        (brought("test-SR").read_bytes(), "holds no image"),
        (brought("JPEG-lossy").read_bytes(), "damaged DICOM"),
        (written(dataset(RNG.integers(0, 255, (8, 8, 4), dtype=np.uint8))), "4 samples a pixel"),
    ):
        with pytest.raises(DecodeError, match=words) as error:
            ImageBytes(data)
        assert SECRET not in str(error.value)
    with pytest.raises(DecodeError, match="1 or 3 channels, not 5"):
        ImageBytes(good, Reading(5))
    (tmp_path / "cut.dcm").write_bytes(good[:-100])
    (tmp_path / "text.dcm").write_text(f"{SECRET} no image")
    saved(tmp_path, dataset(TWELVE, bits=12))
    source = open_source(str(tmp_path))
    assert len(source) == 3
    failed = 0
    for i in range(3):
        try:
            ImageBytes(source.read(i))
        except (OSError, DecodeError) as error:
            failed += 1
            assert SECRET not in str(error)
            assert str(tmp_path) not in str(error)
    assert failed == 2


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 500)
    with pytest.raises(DecodeError, match="36×32 pixels are more than 500"):
        ImageBytes(written(dataset(TWELVE, bits=12)))
    monkeypatch.setattr(decode, "MAX_PIXELS", 1 << 20)
    ds = dataset(TWELVE, bits=12)
    pixels.compress(ds, uid.JPEG2000Lossless)
    ds.Rows = 33  # the compressed pixels say 32
    with pytest.raises(DecodeError, match="pixels are 36×32, not 36×33"):
        ImageBytes(written(ds))
    bomb = dataset(np.zeros((3000, 3000), np.uint16), bits=12)
    bomb.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    assert len(written(bomb)) < 100_000
    with pytest.raises(DecodeError, match="unfolds to more than"):
        ImageBytes(written(bomb))


def test_a_forged_number_of_frames_makes_no_million_images(tmp_path):
    ds = dataset(TWELVE, bits=12)
    ds.NumberOfFrames = 10**9
    assert len(open_source(str(saved(tmp_path, ds)))) == 1  # by the size of the file


def test_without_pylibjpeg_what_others_decode_is_read():
    want = shown(brought("SC_rgb_jpeg_dcmtk").read_bytes(), Reading(3))
    code = "import sys; sys.modules.update(dict.fromkeys(('libjpeg', 'openjpeg', 'pylibjpeg')))\n"
    code += "from mocov3.data.views.decode import DecodeError, ImageBytes\n"
    code += "read = lambda p: ImageBytes(open(p, 'rb').read()).pixels()[0]\n"
    code += f"print(read({str(brought('SC_rgb_jpeg_dcmtk'))!r}).sum(), read({str(brought('SC_rgb_rle'))!r}).sum())\n"
    code += f"try: read({str(brought('MR_small_jpeg_ls_lossless'))!r})\nexcept DecodeError as e: print(e)"
    first, second = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert first == f"{want.sum()} {shown(brought('SC_rgb_rle').read_bytes(), Reading(3)).sum()}"
    assert second == "is DICOM compressed as JPEG-LS Lossless Image Compression: pip install 'mocov3[dicom]'"


def test_without_pydicom_it_says_what_to_install(tmp_path, monkeypatch):
    saved(tmp_path, dataset(TWELVE, bits=12))
    data = (tmp_path / "a.dcm").read_bytes()
    monkeypatch.setattr(formats, "_there", lambda module: False)
    with pytest.raises(DecodeError, match=r"is DICOM: pip install 'mocov3\[dicom\]'"):
        ImageBytes(data)


# --- the whole program ------------------------------------------------------------------------------------------


def test_the_preset_for_radiographs():
    preset = PRESETS["xray"]
    assert (preset.flip_probability, preset.vertical_flip_probability, preset.solarize_probability) == (0, 0, (0, 0))
    few = Survey(5, 5, formats={"DICOM MONOCHROME2 12 bits": 2, "DICOM MONOCHROME1 8 bits": 1, "PNG RGB": 2})
    assert propose(few) == ("xray", "3 of 5 images are grey DICOM")
    assert propose(replace(few, formats={"DICOM RGB 8 bits": 5}))[0] != "xray"
    asked = cli.parse_script("main_moco.py", ["x", "--view-preset", "xray", "--flip-probability", "0.5"]).preset
    assert asked.flip_probability == 0.5


def test_no_output_of_any_command_names_a_patient(clinic, tmp_path, monkeypatch, capfd):
    pytest.importorskip("plotly", reason="plotly (extra report) is not installed")
    (clinic / f"{SECRET}_0^JANE" / f"{SECRET}cut.dcm").write_bytes(written(dataset(TWELVE, bits=12))[:-300])
    files = [p for p in clinic.rglob("*") if p.is_file()]
    rows = [f"{p.relative_to(clinic)},{'ab'[i % 2]}" for i, p in enumerate(files) if "film" not in p.name]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    assert SECRET in (tmp_path / "labels.csv").read_text()
    out = tmp_path / "out"
    out.mkdir()
    spoken = []
    monkeypatch.chdir(out)

    def said(*argv):
        assert cli.main([str(word) for word in argv]) == 0
        spoken.append("".join(capfd.readouterr()))

    usual = ["-j", "0", "--device", "cpu"]
    more = {"check": [*usual, *TINY[2:6], "-b", "8"], "report": usual[2:]}
    more["pretrain"] = [*TINY, "-b", "8", "--max-corrupt", "0.5", "--logger", "tensorboard"]
    for line in documented("## DICOM"):
        line = (
            line.replace("STUDIES", str(clinic)).replace("findings", str(tmp_path / "labels")).replace("0099", "0001")
        )
        said(*line.split()[1:], *more.get(line.split()[1], usual))
    said("pack", clinic, "--out", "shards")
    text = "\n".join(spoken)
    assert SECRET not in text, [line for line in text.splitlines() if SECRET in line]
    made = [p for p in out.rglob("*") if p.is_file()]
    assert len(made) > 8
    for file in made:
        assert SECRET.encode() not in file.read_bytes(), file
        assert SECRET not in str(file.relative_to(out))
    assert "grey DICOM" in text  # why check proposes xray
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["corrupt"] > 0  # the cut file was met
    assert any("unreadable" in line for line in text.splitlines())
    assert refused("pretrain", clinic / f"{SECRET}_0^JANE" / "IM0001")
