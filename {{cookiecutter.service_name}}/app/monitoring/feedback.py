"""Feedback: true labels are compared with the answer in the prediction's id, without a database.

    18 random hex digits | 10: version and answer | 4: check -> prediction_id
    prediction_id, true label -> version, correct or not, first feedback for this id or not

The answer is the index of the label, or a regressor's value, which leaves 8 bits for the version.

Any replica can therefore judge an id, after a restart or months later. Only repeated feedback needs memory: a
table that the master creates and all workers share; when it is full, the oldest entries are dropped.
"""

import mmap
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from app.core.errors import ArtifactError, ServiceError
from app.core.store import VERSION_PATTERN, read_manifest


def memory_file() -> Any:
    """An anonymous file: in memory if the system supports it, so that no folder is needed."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("service"), "w+b")
    return tempfile.TemporaryFile()


class SharedMemory:
    """`size` bytes, initially zero, that processes share and change under a lock."""

    def __init__(self, size: int) -> None:
        self._file = memory_file()
        self._file.truncate(size)
        self.content = mmap.mmap(self._file.fileno(), 0)

    @contextmanager
    def locked(self) -> Iterator[mmap.mmap]:
        """The bytes, under a lock; the kernel releases the lock when a process is killed."""
        import fcntl  # here, because `python -m app predict` runs on Windows too

        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield self.content
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


STEM_DIGITS = 18
_MARK_BITS = 40
_LARGEST = 3e38
_MAX_VERSIONS = 20
_ENTRY, _WAYS = 16, 8  # bytes: 14 of the id, 2 of the label; entries that share a bucket
_BUCKETS = 2**14
Tolerances = Mapping[str, float] | None


def tolerances(place: Path | str) -> Tolerances:
    """The versions in a folder, each with its feedback tolerance; None if `place` is an address."""
    if not isinstance(place, Path):
        return None
    found = {path.name: 0.0 for path in place.glob("v*") if re.fullmatch(VERSION_PATTERN, path.name)}
    for version in found:
        with suppress(ArtifactError):  # a version that cannot be served
            found[version] = read_manifest(place / version).outputs.feedback_tolerance
    return found


class Feedback:
    """Creates prediction ids, and judges the feedback for them.

    The version becomes a label of a metric, and forged ids must not create new ones: accepted are `versions`
    and those passed to `know` or, if `versions` is None, the first few that appear.
    """

    def __init__(
        self, labels: Iterable[Any], versions: Tolerances, contract_sha256: str, given: "Given | None" = None
    ) -> None:
        self._indices = {label: index for index, label in enumerate(labels)}  # empty for regressors
        self._bits = 10 if self._indices else 32  # of the answer: a label's index, or a value as a float
        # By number, with tolerance; a version known only by number has the tolerance of the latest version.
        self._versions: dict[int, tuple[str, float]] = {}
        self._tolerance = 0.0
        for version, tolerance in (versions or {}).items():
            self.know(version, tolerance)
        self._open = versions is None
        self._salt = crc32(contract_sha256.encode())  # another contract means other labels
        self._given = given or Given()

    def know(self, version: str, tolerance: float = 0.0) -> None:
        """Accept feedback for this version; a value is correct within `tolerance` of the truth."""
        self._versions[self._number(version)] = version, tolerance
        self._tolerance = tolerance

    def identify(self, stem: str, version: str, answer: Any) -> str:
        """The id, 32 hex digits, for a label or value that `version` answered; `stem` has STEM_DIGITS."""
        if self._indices:
            bits = self._indices[answer]
        else:
            bits = int.from_bytes(struct.pack(">f", max(-_LARGEST, min(answer, _LARGEST))), "big")
        marked = f"{stem}{self._number(version) << self._bits | bits:010x}"
        return marked + self._check(marked)

    def judge(self, prediction_id: str, truth: Any) -> tuple[str, bool, bool]:
        """Version, whether its answer was correct, and whether this feedback is new; raises ServiceError."""
        marked, mark = prediction_id[:-4], int(prediction_id[STEM_DIGITS:-4], 16)
        bits, number = mark & (2**self._bits - 1), mark >> self._bits
        sound = prediction_id == marked + self._check(marked)
        if sound and self._open and len(self._versions) < _MAX_VERSIONS:
            self._versions.setdefault(number, (f"v{number}", self._tolerance))
        if not sound or number not in self._versions or (self._indices and bits >= len(self._indices)):
            raise ServiceError("not_found", "this service made no prediction with this id")
        version, tolerance = self._versions[number]
        if self._indices:
            key, correct = self._indices[truth] + 1, bits == self._indices[truth]
        else:
            (value,) = struct.unpack(">f", bits.to_bytes(4, "big"))
            key, correct = crc32(str(truth).encode()) % 0xFFFF + 1, abs(value - truth) <= tolerance
        before = self._given.put(prediction_id, key)
        if before not in (None, key):
            raise ServiceError("conflict", "another label was given before, and the first one counts")
        return version, correct, before is None

    def _number(self, version: str) -> int:
        return int(version[1:]) % (1 << _MARK_BITS - self._bits)

    def _check(self, marked: str) -> str:
        return f"{crc32(marked.encode(), self._salt) & 0xFFFF:04x}"


class Given:
    """The last labels by prediction, about 130,000, in memory shared with forked processes."""

    def __init__(self, buckets: int = _BUCKETS) -> None:
        self._buckets = buckets
        self._table = SharedMemory(buckets * _ENTRY * _WAYS)

    def put(self, prediction_id: str, label: int) -> int | None:
        """Store the label, not 0, of a prediction; if it has a label already, keep and return that one."""
        key = bytes.fromhex(prediction_id)[: _ENTRY - 2]
        start = int.from_bytes(key[:4], "big") % self._buckets * _ENTRY * _WAYS
        end = start + _ENTRY * _WAYS
        with self._table.locked() as table:
            for at in range(start, end, _ENTRY):
                found = int.from_bytes(table[at + len(key) : at + _ENTRY], "big")
                if found and table[at : at + len(key)] == key:
                    return found
            # The newest stands first, and pushes the oldest out.
            table[start:end] = key + label.to_bytes(2, "big") + table[start : end - _ENTRY]
        return None
