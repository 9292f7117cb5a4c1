"""DICOM files of a folder or a list: a frame is an image, a patient is a group, and no name tells who it is.

Names of files and folders may be those of patients, as everything else in such a file. So images are named by a hash of
their path (``Dicom.path_name`` has the path), folders of one patient each are no classes, and what is read of an image
is a DICOM file of its own that holds one frame and nothing but what its pixels are made by. A hash is a pseudonym: who
has a list of names can tell which is which.

Headers are read once and remembered in the user's cache folder: numbers of frames and hashes, by the file's size and
time.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mocov3.data.sources.frames import frame_bytes, frame_of
from mocov3.data.sources.index import Index, cache_folder, write_atomically
from mocov3.data.sources.pseudonyms import DIGITS, image_name, key_of, nameless, own_key, told_apart
from mocov3.data.sources.scan import EXTENSIONS
from mocov3.data.views import dicom, formats
from mocov3.data.views.bands import Unfit
from mocov3.data.views.bare import DICOM_HEAD, is_dicom
from mocov3.data.views.decode import MAX_PIXELS
from mocov3.errors import UserError

if TYPE_CHECKING:
    import pydicom

_THREADS = 16
_AT_ONCE = 1 << 18
_SMALLEST = 64  # bytes of a compressed frame, by which a damaged number of frames is told
_FORMAT = 1
_PATIENT = ("PatientID", "PatientName", "StudyInstanceUID")
_HEADER = (*_PATIENT, *dicom.SHAPE, "NumberOfFrames", "SOPClassUID", "BurnedInAnnotation")
_NO_IMAGES = (
    "1.2.840.10008.1.3.10",  # DICOMDIR
    "1.2.840.10008.5.1.4.1.1.66.4",  # segmentations, by pixels and by labels
    "1.2.840.10008.5.1.4.1.1.66.7",
)
_OTHER, _NO_IMAGE, _DAMAGED = 0, -1, -2
_RECORD = np.dtype([("size", "<i8"), ("time", "<i8"), ("frames", "<i4"), ("group", f"S{DIGITS}"), ("burned", "?")])
"""What is remembered of a file; ``frames`` may be ``_OTHER`` (not DICOM), ``_NO_IMAGE`` or ``_DAMAGED``."""


@dataclass
class Dicom:
    """Frames of DICOM files, and the other images among them."""

    place: str
    """The folder."""
    entries: Index
    """Of every image: path, frame (−1: not DICOM) and group, with zero bytes between them."""
    classes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What is left out or remarkable, a line each."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, or ``None``."""
        return self.entries.labels if self.classes else None

    @property
    def digest(self) -> str:
        """sha256 over paths, frames, groups and labels."""
        return self.entries.digest

    def _entry(self, index: int) -> tuple[bytes, int, str]:
        path, frame, group = self.entries.path(index).rsplit(b"\0", 2)
        return path, int(frame), group.decode()

    def _file(self, path: bytes) -> bytes:
        return os.path.join(os.fsencode(self.place), path)

    def groups(self, field: str) -> np.ndarray | None:
        """A key of every image's group, 16 digits of sha256, by an element of DICOM's (``StudyInstanceUID``).

        By themselves, images are of patients: by their ID, else name, else study; a file without any is a group.
        An image that lacks ``field`` has no group; ``None`` if DICOM knows no such element.
        """
        if not field:
            place = os.path.realpath(os.fsencode(self.place))
            entries = map(self._entry, range(len(self)))
            return np.array([told_apart(place, path, group) for path, _, group in entries], object)
        from pydicom import datadict

        if datadict.tag_for_keyword(field) is None:
            return None
        paths = [path if frame >= 0 else b"" for path, frame, _ in map(self._entry, range(len(self)))]
        with ThreadPoolExecutor(_THREADS) as pool:
            files = sorted(set(paths) - {b""})
            keys = dict(zip(files, pool.map(lambda path: _field(self._file(path), field), files), strict=True))
        return np.array([keys.get(path, "") for path in paths], object)

    def name(self, index: int) -> str:
        """A hash of the folder's own name and the path below it, and the frame of a file of several."""
        path, frame, _ = self._entry(index)
        return image_name(self.place, path, frame)

    def path_name(self, index: int) -> str:
        """The path below the folder, by which a list of the user's may call the image: never to be shown."""
        return os.fsdecode(self._entry(index)[0])

    def path(self, index: int) -> bytes:
        """The file, as the system names it: never to be shown."""
        return self._file(self._entry(index)[0])

    def file_bytes(self, index: int) -> int:
        """Size of the file, without reading it."""
        return os.stat(self.path(index)).st_size

    def read(self, index: int) -> bytes:
        """DICOM of the frame alone, or the bytes of a file that is not DICOM.

        Raises:
            OSError: if it cannot be read; without its path.
        """
        path, frame, _ = self._entry(index)
        try:
            with open(self._file(path), "rb") as file:
                return frame_of(file, frame) if frame >= 0 else file.read()
        except Unfit as error:
            raise OSError(str(error)) from None
        except OSError as error:
            raise OSError(error.strerror or type(error).__name__) from None


def opened(place: str, index: Index, classes: list[str], skipped: list[str], *, by_folder: bool = True) -> Dicom | None:
    """The images of an index as ``Dicom``, if one is; ``None`` if none is, or pydicom is missing.

    ``by_folder`` says that the classes are subfolders, which may be patients.

    Raises:
        UserError: if no file holds an image.
    """
    if formats.cure(formats.DICOM[0]) or not _candidates(index).any():
        return None
    paths = [index.path(i) for i in range(len(index))]
    records = _headers(os.fsencode(place), paths, index)
    if not (records["frames"] != _OTHER).any():
        return None
    frames = records["frames"].copy()
    frames[np.isin(frames, (_OTHER, _DAMAGED))] = 1
    frames[frames == _NO_IMAGE] = 0
    if not frames.any():
        raise UserError(f"data {place}: its {len(paths)} DICOM files hold no image")
    labels = None if index.labels is None else np.repeat(index.labels, frames)
    groups = np.repeat(records["group"], frames)
    names, said = _classes(labels, classes, groups) if by_folder else (classes, [])
    entries = [
        b"%b\0%d\0%b" % (path, -1 if record["frames"] == _OTHER else frame, bytes(record["group"]))
        for path, record, count in zip(paths, records, frames.tolist(), strict=True)
        for frame in range(count)
    ]
    remarks = [f"{place}: {line}" for line in (*_remarks(records), *said)]
    return Dicom(place, Index.build(entries, labels if names else None), names, [*map(nameless, skipped), *remarks])


def _classes(labels: np.ndarray | None, classes: list[str], groups: np.ndarray) -> tuple[list[str], list[str]]:
    """Names of the classes, or none and a line on why: folders that hold a patient each are no classes."""
    if labels is None or not classes:
        return [], []
    patients = [len(np.unique(groups[labels == number])) for number in range(len(classes))]
    if 2 * sum(number < 2 for number in patients) <= len(classes):
        return classes, []
    return [], [
        f"its {len(classes)} subfolders are not taken for classes, as {sum(n < 2 for n in patients)} hold one patient "
        "each; write classes into a list of path,label"
    ]


def _remarks(records: np.ndarray) -> list[str]:
    kinds = records["frames"]
    lines = []
    if none := int((kinds == _NO_IMAGE).sum()):
        lines.append(f"left out {none} DICOM files without images (DICOMDIR, reports, plans, segmentations)")
    if damaged := int((kinds == _DAMAGED).sum()):
        lines.append(f"{damaged} DICOM files cannot be read: they count as unreadable images")
    if burned := int(records["burned"].sum()):
        lines.append(f"{burned} DICOM files say that text is burned into their pixels, where it may name the patient")
    return lines


# --- headers ----------------------------------------------------------------------------------------------------


def _candidates(index: Index) -> np.ndarray:
    """Which paths may be DICOM: those that do not end as other images do."""
    n = len(index)
    tails = {e[-4:].encode() for e in EXTENSIONS if e not in formats.DICOM}
    others = np.array([int.from_bytes(tail, "big") for tail in tails], np.uint32)
    ends = index.array[8 : 16 + 8 * n].view(np.int64)[1:]
    texts, found = index.array[16 + 12 * n :], np.empty(n, bool)
    for first in range(0, n, _AT_ONCE):  # so that little memory is taken
        part = ends[first : first + _AT_ONCE]
        last = np.stack([texts[np.maximum(part - back, 0)] for back in (4, 3, 2, 1)], 1)
        lower = np.where((last >= 65) & (last <= 90), last | 32, last)
        found[first : first + _AT_ONCE] = ~np.isin(lower.view(">u4").ravel(), others)
    return found


def _headers(root: bytes, paths: Sequence[bytes], index: Index) -> np.ndarray:
    """``_RECORD`` of every file; those that are remembered and unchanged are not read."""
    asked = np.flatnonzero(_candidates(index))
    key = hashlib.sha256(b"\0".join((os.path.realpath(root), index.digest.encode(), b"%d" % _FORMAT))).hexdigest()
    file = cache_folder() / f"dicom-{key[:32]}.npy"
    records = np.zeros(len(paths), _RECORD)
    known = _remembered(file, len(asked))

    def look(number: int) -> Any:
        path = os.path.join(root, paths[asked[number]])
        return _record(path, known[number] if known is not None else None)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(look, range(len(asked))))
    records[asked] = found
    if known is None or not np.array_equal(known, records[asked]):
        with contextlib.suppress(OSError):  # no room: headers are read again
            write_atomically(file, lambda f: np.save(f, records[asked]))
    own = [own_key(path).encode() for path in paths]
    records["group"] = np.where(records["group"] == b"", np.array(own, f"S{DIGITS}"), records["group"])
    return records


def _remembered(file: Path, number: int) -> np.ndarray | None:
    try:
        known = np.load(file)
    except (OSError, ValueError):
        return None
    return known if known.dtype == _RECORD and len(known) == number else None


def _record(path: bytes, known: Any) -> Any:
    try:
        status = os.stat(path)
        if known is not None and (known["size"], known["time"]) == (status.st_size, status.st_mtime_ns):
            return known
        with open(path, "rb") as file:
            frames, group, burned = _header(file, os.fsdecode(path))
    except OSError:
        return np.array((0, 0, _DAMAGED, b"", False), _RECORD)[()]
    return np.array((status.st_size, status.st_mtime_ns, frames, group.encode(), burned), _RECORD)[()]


def _header(file: BinaryIO, path: str) -> tuple[int, str, bool]:
    """Frames, key of the patient ('': unknown), and whether text is burned into the pixels."""
    named = path.lower().endswith(formats.DICOM)
    marked = is_dicom(file.read(DICOM_HEAD))
    if not (marked or named):
        return _OTHER, "", False
    file.seek(0)
    try:
        with dicom.quiet("reading its header"):
            ds = dicom.dataset(file, MAX_PIXELS, _HEADER, pixels=False)
            if not (ds or marked):
                return _DAMAGED, "", False
            burned = str(ds.get("BurnedInAnnotation") or "").strip().upper() == "YES"
            group = key_of(ds, _PATIENT)
            if str(ds.get("SOPClassUID")) in _NO_IMAGES or not (ds.get("Rows") and ds.get("Columns")):
                return _NO_IMAGE, group, False
            return min(max(int(ds.get("NumberOfFrames") or 1), 1), _room(ds, file)), group, burned
    except Unfit:
        return _DAMAGED, "", False


def _room(ds: "pydicom.Dataset", file: BinaryIO) -> int:
    """Frames that a file may hold by its size: a damaged one may claim any number."""
    size = os.fstat(file.fileno()).st_size
    compressed = dicom.syntax_of(ds).is_compressed
    return max(size // (_SMALLEST if compressed else frame_bytes(ds)), 1)


def _field(path: bytes, name: str) -> str:
    """The key of a file's element; '' where it has none."""
    try:
        with open(path, "rb") as file, dicom.quiet("reading its header"):
            return key_of(dicom.dataset(file, MAX_PIXELS, (name,), pixels=False), (name,))
    except (OSError, Unfit):
        return ""
