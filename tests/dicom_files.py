"""DICOM files as scanners write them, by pydicom, with a patient in every place that has room for one."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

SECRET = "ZZLEAK"
"""Part of all that tells who it is."""
_ABOUT = {
    "PatientName": "Name^Jane",
    "PatientBirthDate": "19010203",
    "PatientAddress": "Road 1",
    "OtherPatientIDs": "Other",
    "InstitutionName": "Clinic",
    "ReferringPhysicianName": "Doctor",
    "StudyDescription": "Study",
    "SeriesDescription": "Series",
    "AccessionNumber": "Acc",
    "ProtocolName": "Protocol",
    "ImageComments": "Comment",
    "WindowCenterWidthExplanation": "Window",
    "DerivationDescription": "Derived",
}


def dataset(pixels: np.ndarray, *, patient: str = "1", bits: int | None = None, **elements: object) -> FileDataset:
    """A file of (height, width) or, with ``NumberOfFrames`` among ``elements``, (frames, height, width) samples."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, preamble=bytes(128), file_meta=meta)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.PatientID = f"{SECRET}-{patient}"
    for name, value in _ABOUT.items():
        setattr(ds, name, value if name == "PatientBirthDate" else f"{SECRET}{value}")
    ds.StudyInstanceUID = "1.2.3." + patient if patient.isdigit() else "1.2.3"
    ds.add_new((0x0009, 0x0010), "LO", "PRIVATE")
    ds.add_new((0x0009, 0x1001), "LO", f"{SECRET}private")
    inner = Dataset()
    inner.CodeMeaning = f"{SECRET}inner"
    ds.add_new("ProcedureCodeSequence", "SQ", [inner])
    frames = "NumberOfFrames" in elements
    shape = pixels.shape[1:] if frames else pixels.shape
    ds.Rows, ds.Columns = shape[:2]
    ds.SamplesPerPixel = 1 if len(shape) == 2 else shape[2]
    ds.PhotometricInterpretation = "MONOCHROME2" if ds.SamplesPerPixel == 1 else "RGB"
    if ds.SamplesPerPixel > 1:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(ds, name, value)
    if ds.get("PlanarConfiguration"):
        pixels = np.moveaxis(pixels, -1, -3)
    data = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    ds.add_new("PixelData", "OB" if pixels.dtype.itemsize == 1 else "OW", data + bytes(len(data) % 2))
    return ds


def radiograph(seed: int, side: int = 32, bits: int = 12) -> np.ndarray:
    """Samples that differ by seed, uint16 below 2^bits."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 1 << bits, (side // 4, side // 4)).astype(np.uint16)
    return np.kron(coarse, np.ones((4, 4), np.uint16))


def study(folder: Path, patients: int = 4, each: int = 3) -> list[Path]:
    """A folder as a clinic exports it: a folder a patient, named so, with files of several kinds and a film."""
    made = []
    for p in range(patients):
        place = folder / f"{SECRET}_{p}^JANE"
        place.mkdir(parents=True)
        for i in range(each):
            ds = dataset(radiograph(100 * p + i), patient=str(p), bits=12, WindowCenter=2000, WindowWidth=3000)
            made.append(place / (f"IM{i:04}" if i % 2 else f"{SECRET}{i}.dcm"))
            ds.save_as(made[-1], enforce_file_format=True)
        film = np.stack([radiograph(100 * p + 50 + i) for i in range(3)])
        made.append(place / f"{SECRET} film.dcm")
        dataset(film, patient=str(p), bits=12, NumberOfFrames=3).save_as(made[-1], enforce_file_format=True)
    return made


def test_file(name: str) -> Path:
    """A file that pydicom brings along."""
    return Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
