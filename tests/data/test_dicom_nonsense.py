"""DICOM whose numbers make no sense, or that names no patient: nothing is dark, and nothing the same, silently."""

import io

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra dicom) is not installed")

from dicom_files import dataset, radiograph

from mocov3.config.presets import Reading
from mocov3.data import open_source
from mocov3.data.sources.groups import groups_of
from mocov3.data.views import remarks
from mocov3.data.views.decode import DecodeError, ImageBytes

TWELVE = np.random.Generator(np.random.PCG64(7)).integers(0, 4096, (32, 36)).astype(np.uint16)
UPPER = TWELVE >> 4


def put(ds, name, value):
    """An element as it is written, without pydicom's checks."""
    tag = pydicom.datadict.tag_for_keyword(name)
    with pydicom.config.disable_value_validation():
        ds[tag] = pydicom.dataelem.RawDataElement(
            pydicom.tag.Tag(tag), pydicom.datadict.dictionary_VR(tag), len(value), value.encode(), 0, False, True
        )


def shown(elements, samples=TWELVE, reading=None):
    """Pixels and the remark."""
    ds = dataset(samples, bits=12)
    for name, value in elements.items():
        put(ds, name, value)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    remarks.taken()
    pixels = ImageBytes(file.getvalue(), reading or Reading(1)).pixels()[0][..., 0]
    return pixels, remarks.taken()


@pytest.mark.parametrize(
    "line", [("nan", "0"), ("1", "nan"), ("inf", "0"), ("1", "-inf"), ("0", "-1024"), ("", "0"), ("1\\2", "0")]
)
@pytest.mark.parametrize("window", [{}, {"WindowCenter": "40", "WindowWidth": "400"}])
def test_a_rescale_that_makes_no_sense_leaves_the_upper_bits(line, window):
    elements = {"RescaleSlope": line[0], "RescaleIntercept": line[1], **window}
    pixels, said = shown(elements)
    assert np.array_equal(pixels, UPPER)
    assert said == "has a rescale slope or intercept that makes no sense: the upper 8 of its bits are taken"
    with pytest.raises(DecodeError, match="rescale slope or intercept makes no sense"):
        shown(elements, reading=Reading(1, (-100, 300)))  # whose values nobody knows


@pytest.mark.parametrize(
    ("centre", "width", "more"),
    [
        ("2000", "0", {}),
        ("2000", "-400", {}),
        ("2000", "9e300", {}),
        ("2000", "2000000", {}),
        ("2000", "nan", {}),
        ("2000", "inf", {}),
        ("2000", "", {}),
        ("", "400", {}),
        ("", "", {}),
        ("1e30", "400", {}),
        ("-1e30", "400", {}),
        ("5000", "400", {}),
        ("nan", "400", {}),
        ("2000", "0.5", {}),
        ("2000", "400", {"VOILUTFunction": "LOGARITHM"}),
        ("2000", "400", {"RescaleSlope": "1", "RescaleIntercept": "9000"}),
    ],
)
def test_windows_that_make_no_sense_leave_the_upper_bits(centre, width, more):
    pixels, said = shown({"WindowCenter": centre, "WindowWidth": width, **more})
    assert np.array_equal(pixels, UPPER)
    assert said == "has a window that makes no sense: the upper 8 of its bits are taken"


@pytest.mark.parametrize(
    ("centre", "width", "more"),
    [
        ("2000", "400", {}),
        ("2000", "1", {}),
        ("4200", "400", {}),
        ("2000", "60000", {}),
        ("40\\nan", "400\\0", {"RescaleSlope": "1", "RescaleIntercept": "-1024"}),
        ("-40", "400", {"RescaleSlope": "-1", "RescaleIntercept": "1024"}),
        ("2000", "400", {"VOILUTFunction": "SIGMOID"}),
    ],
)
def test_windows_that_show_anything_are_used(centre, width, more):
    pixels, said = shown({"WindowCenter": centre, "WindowWidth": width, **more})
    assert pixels.min() < pixels.max()
    assert not np.array_equal(pixels, UPPER)
    assert said == ""


def test_a_file_without_a_window_is_still_told_from_one_with_nonsense():
    assert "has no window" in shown({})[1]
    assert "has no window" in shown({"RescaleSlope": "2", "RescaleIntercept": "7"})[1]
    assert shown({}, reading=Reading(1, (0, 4095)))[1] == ""


# --- files that name nobody ------------------------------------------------------------------------------------


def nobody(file, seed):
    ds = dataset(radiograph(seed), bits=12, WindowCenter=2000, WindowWidth=3000)
    for name in ("PatientID", "PatientName", "StudyInstanceUID"):
        del ds[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(file, enforce_file_format=True)


def test_files_that_name_no_patient_are_told_apart_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    for seed, part in enumerate(("train", "val")):
        for kind in ("c0", "c1"):
            for i in range(2):
                nobody(data / part / kind / f"p{i}.dcm", 10 * seed + i)
    train, val = (open_source(str(data), part) for part in ("train", "val"))
    first, second = groups_of((train, val), "")
    assert len({*first, *second}) == len(train) + len(val) == 8
    names = [[part.name(i) for i in range(4)] for part in (train, val)]
    assert len({*names[0], *names[1]}) == 8
    assert names[1] == [open_source(str(data / "val")).name(i) for i in range(4)]
    same = groups_of((val, open_source(str(data / "val"))), "")
    assert np.array_equal(*same)  # however the folder is named
    data.rename(tmp_path / "moved")
    moved = open_source(str(tmp_path / "moved"))
    assert (moved.digest, [moved.name(i) for i in range(4)]) == (train.digest, names[0])
