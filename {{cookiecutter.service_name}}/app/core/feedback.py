"""Labels that come back: judged by the id of their prediction, without a database.

    18 random hex digits | 10: version and label | 4: check -> prediction_id
    prediction_id, true label -> version, correct or not, and whether this is news

An id can therefore be judged after a restart, by any replica, months later. Only "is this news" needs memory:
a table that the master makes and all workers share, which forgets the oldest when it is full.
"""

import mmap
import tempfile
from collections.abc import Iterable
from typing import Any
from zlib import crc32

from app.core.errors import ServiceError

STEM_DIGITS = 18
_LABEL_BITS = 10
_MAX_VERSIONS = 20
_ENTRY, _WAYS = 16, 8  # bytes: 14 of the id, 2 of the label; entries that share a bucket
_BUCKETS = 2**14


class Feedback:
    """Makes ids and judges the labels that come back for them."""

    def __init__(
        self,
        labels: Iterable[Any],
        versions: Iterable[str] | None,
        contract_sha256: str,
        given: "Given | None" = None,
    ) -> None:
        self._labels = list(labels)
        self._indices = {label: index for index, label in enumerate(self._labels)}
        # They become a metric's label, which forged ids must not multiply: only these, or only so many.
        self._versions = {int(version[1:]): version for version in versions or ()}
        self._open = versions is None
        self._salt = crc32(contract_sha256.encode())  # under another contract labels mean something else
        self._given = given or Given()
        self._marks: dict[tuple[str, Any], str] = {}

    def know(self, version: str) -> None:
        """Labels for this version are taken from now on."""
        self._versions[int(version[1:])] = version

    def identify(self, stem: str, version: str, label: Any) -> str:
        """The id, 32 hex digits, of the prediction that `version` made; `stem` has STEM_DIGITS of them."""
        if (mark := self._marks.get((version, label))) is None:
            mark = f"{int(version[1:]) << _LABEL_BITS | self._indices[label]:010x}"
            self._marks[version, label] = mark
        marked = stem + mark
        return marked + self._check(marked)

    def judge(self, prediction_id: str, label: Any) -> tuple[str, bool, bool]:
        """Version, whether it was right, and whether this is news; raises ServiceError."""
        marked, number = prediction_id[:-4], int(prediction_id[STEM_DIGITS:-4], 16)
        predicted, sound = number & (2**_LABEL_BITS - 1), prediction_id == marked + self._check(marked)
        version = self._version(number >> _LABEL_BITS) if sound and predicted < len(self._labels) else None
        if version is None:
            raise ServiceError("not_found", "this service made no prediction with this id")
        index = self._indices[label] + 1  # 0 is an empty entry's
        before = self._given.put(prediction_id, index)
        if before not in (None, index):
            raise ServiceError("conflict", "another label was given before, and the first one counts")
        return version, index == predicted + 1, before is None

    def _version(self, number: int) -> str | None:
        if self._open and len(self._versions) < _MAX_VERSIONS:
            self._versions.setdefault(number, f"v{number}")
        return self._versions.get(number)

    def _check(self, marked: str) -> str:
        return f"{crc32(marked.encode(), self._salt) & 0xFFFF:04x}"


class Given:
    """The last hundred thousand or so labels by prediction, in memory shared with forked processes."""

    def __init__(self, buckets: int = _BUCKETS) -> None:
        self._buckets = buckets
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._file.truncate(buckets * _ENTRY * _WAYS)
        self._table = mmap.mmap(self._file.fileno(), 0)

    def put(self, prediction_id: str, label: int) -> int | None:
        """Keep the label, not 0, of a prediction that has none; the label that it has, if it has one."""
        key = bytes.fromhex(prediction_id)[: _ENTRY - 2]
        start = int.from_bytes(key[:4], "big") % self._buckets * _ENTRY * _WAYS
        end = start + _ENTRY * _WAYS
        import fcntl  # here, because `python -m app predict` runs on Windows too

        fcntl.lockf(self._file, fcntl.LOCK_EX)  # the kernel lets go of it when a process is killed
        try:
            for at in range(start, end, _ENTRY):
                found = int.from_bytes(self._table[at + len(key) : at + _ENTRY], "big")
                if found and self._table[at : at + len(key)] == key:
                    return found
            # The newest stands first, and pushes the oldest out.
            self._table[start:end] = key + label.to_bytes(2, "big") + self._table[start : end - _ENTRY]
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
        return None
