"""Labels that come back: judged by the id of their prediction, without a database.

    18 random hex digits | 10: version and answer | 4: check -> prediction_id
    prediction_id, true label -> version, correct or not, and whether this is news

The answer is the label's number, or a regressor's value, which leaves 8 bits to its version.

An id can therefore be judged after a restart, by any replica, months later. Only "is this news" needs memory:
a table that the master makes and all workers share, which forgets the oldest when it is full.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

from app.core.errors import ServiceError
from app.core.shared import SharedMemory

STEM_DIGITS = 18
_MARK_BITS, _LABEL_BITS, _VALUE_BITS = 40, 10, 32
_LARGEST = 3e38
_FLOAT, _UINT = struct.Struct(">f"), struct.Struct(">I")
_MAX_VERSIONS = 20
_ENTRY, _WAYS = 16, 8  # bytes: 14 of the id, 2 of the label; entries that share a bucket
_BUCKETS = 2**14


class Feedback:
    """Makes ids and judges the labels that come back for them."""

    def __init__(
        self,
        labels: Iterable[Any],
        versions: Mapping[str, float] | None,
        contract_sha256: str,
        given: "Given | None" = None,
    ) -> None:
        self._labels = list(labels)
        self._indices = {label: index for index, label in enumerate(self._labels)}
        # They become a metric's label, which forged ids must not multiply: only these, or only so many. Each
        # has its tolerance; one that is known by its number alone has that of the version known last.
        self._versions: dict[int, tuple[str, float]] = {}
        self._bits = _LABEL_BITS if self._labels else _VALUE_BITS
        self._tolerance = 0.0
        for version, tolerance in (versions or {}).items():
            self.know(version, tolerance)
        self._open = versions is None
        self._salt = crc32(contract_sha256.encode())  # under another contract labels mean something else
        self._given = given or Given()
        self._marks: dict[tuple[str, Any], str] = {}

    def know(self, version: str, tolerance: float = 0.0) -> None:
        """Labels for this version are taken from now on; a value is right if it is so close to the truth."""
        self._versions[self._number(version)] = version, tolerance
        self._tolerance = tolerance

    def _number(self, version: str) -> int:
        return int(version[1:]) % (1 << _MARK_BITS - self._bits)

    def identify(self, stem: str, version: str, answer: Any) -> str:
        """The id, 32 hex digits, of what `version` answered: a label, or a value; `stem` has STEM_DIGITS."""
        if not self._labels:
            (bits,) = _UINT.unpack(_FLOAT.pack(max(-_LARGEST, min(answer, _LARGEST))))
            marked = f"{stem}{self._number(version) << self._bits | bits:010x}"
            return marked + self._check(marked)
        if (mark := self._marks.get((version, answer))) is None:
            mark = f"{self._number(version) << self._bits | self._indices[answer]:010x}"
            self._marks[version, answer] = mark
        marked = stem + mark
        return marked + self._check(marked)

    def judge(self, prediction_id: str, label: Any) -> tuple[str, bool, bool]:
        """Version, whether it was right, and whether this is news; raises ServiceError."""
        marked, number = prediction_id[:-4], int(prediction_id[STEM_DIGITS:-4], 16)
        predicted, sound = number & (2**self._bits - 1), prediction_id == marked + self._check(marked)
        known = not self._labels or predicted < len(self._labels)
        found = self._version(number >> self._bits) if sound and known else None
        if found is None:
            raise ServiceError("not_found", "this service made no prediction with this id")
        version, tolerance = found
        if self._labels:
            index = self._indices[label] + 1  # 0 is an empty entry's
            correct = index == predicted + 1
        else:
            index = crc32(str(label).encode()) % 0xFFFF + 1
            (value,) = _FLOAT.unpack(_UINT.pack(predicted))
            correct = abs(value - label) <= tolerance
        before = self._given.put(prediction_id, index)
        if before not in (None, index):
            raise ServiceError("conflict", "another label was given before, and the first one counts")
        return version, correct, before is None

    def _version(self, number: int) -> tuple[str, float] | None:
        if self._open and len(self._versions) < _MAX_VERSIONS:
            self._versions.setdefault(number, (f"v{number}", self._tolerance))
        return self._versions.get(number)

    def _check(self, marked: str) -> str:
        return f"{crc32(marked.encode(), self._salt) & 0xFFFF:04x}"


class Given:
    """The last hundred thousand or so labels by prediction, in memory shared with forked processes."""

    def __init__(self, buckets: int = _BUCKETS) -> None:
        self._buckets = buckets
        self._table = SharedMemory(buckets * _ENTRY * _WAYS)

    def put(self, prediction_id: str, label: int) -> int | None:
        """Keep the label, not 0, of a prediction that has none; the label that it has, if it has one."""
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
