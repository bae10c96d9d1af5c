"""Rows from a file, a batch at a time, so that memory does not grow with the file.

    .csv .tsv .parquet .jsonl .ndjson .arrow .feather -> batches of columns
    every row -> profile() -> Column each: type, whether values are missing, range
    every row -> sample()  -> categories with counts, and an Arrow file of at most SAMPLE_ROWS rows

What a type is, is decided by all rows, never by the first block. In CSV, text means what pandas' `read_csv`
takes it for, because that is what most estimators were fitted on.
"""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

SAMPLE_ROWS = 200_000
BATCH_ROWS, BLOCK_BYTES = 16_384, 2**22
MAX_DISTINCT = 1_000  # of a text column; with more there are no categories
# What pandas reads as missing.
MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip
TRUE, FALSE = ["True", "TRUE", "true"], ["False", "FALSE", "false"]
ARROW = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}

Batch = dict[str, Any]  # name -> pyarrow array
Progress = Callable[[int], None]


class Refusal(Exception):
    """Why nothing was imported: one line for the person who asked."""


@dataclass
class Column:
    """What all rows say of a column."""

    name: str
    dtype: str | None = None  # float64, int64, bool or string; None as long as every value is missing
    present: int = 0
    low: float | None = None
    high: float | None = None
    unusable: str = ""  # the type, if JSON has none like it
    counts: Counter[str] | None = field(default_factory=Counter)  # of text, up to MAX_DISTINCT values
    rows: int = 0

    @property
    def nullable(self) -> bool:
        """Whether a value was missing in any row."""
        return self.present < self.rows


@dataclass
class Table:
    """A data file: its columns, in its order."""

    path: Path
    columns: dict[str, Column]
    rows: int = 0


def fingerprint(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def batches(path: Path) -> Iterator[Batch]:
    """All rows, a batch at a time; from CSV as text, missing values as nulls. Raises Refusal."""
    readers = {
        ".csv": _csv, ".tsv": _csv, ".txt": _csv, ".parquet": _parquet, ".pq": _parquet,
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".arrow": _arrow, ".feather": _arrow, ".ipc": _arrow,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Refusal(f"{path.name}: takes .csv, .parquet, .jsonl or .arrow, not {path.suffix or 'this'}")
    try:
        if not path.stat().st_size:
            raise Refusal(f"{path.name}: is empty")
        yield from reader(path)
    except OSError as error:
        raise Refusal(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise Refusal(f"{path.name}: cannot be read as {path.suffix}: {_without_values(error)}") from None


def _without_values(error: Exception) -> str:
    """The first words of a library's message: what follows may quote the data."""
    words = str(error).splitlines()[0] if str(error) else type(error).__name__
    if words.startswith("CSV parse error"):
        found = re.search(r"(Row #\d+: )?Expected \d+ columns, got \d+", words)
        return found[0] if found else "CSV parse error"
    return words[:120]


def _distinct(path: Path, names: list[str]) -> list[str]:
    for name, count in Counter(names).items():
        if count > 1:
            raise Refusal(f"{path.name}: {count} columns are called {name!r}")
    return names


def _csv(path: Path) -> Iterator[Batch]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline()
        delimiter = max(",;\t", key=line.count)
        file.seek(0)
        names = _distinct(path, next(csv.reader(file, delimiter=delimiter), []))
    reader = pyarrow.csv.open_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False,  # of a line that is wrong, threads do not know the number
            block_size=BLOCK_BYTES,
            column_names=names,
            skip_rows=1,
        ),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=MISSING, strings_can_be_null=True
        ),
    )
    for batch in reader:
        yield dict(zip(names, batch.columns, strict=True))


def _parquet(path: Path) -> Iterator[Batch]:
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False) as file:
        names = _distinct(path, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            yield {name: batch.column(name) for name in names}


def _arrow(path: Path) -> Iterator[Batch]:
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            parts = (file.get_batch(index) for index in range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            file = parts = pa.ipc.open_stream(source)
        names = _distinct(path, file.schema.names)
        for batch in parts:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield dict(zip(names, part.columns, strict=True))


def _json_lines(path: Path) -> Iterator[Batch]:
    row, names = 0, dict[str, None]()
    with path.open("rb") as file:
        while lines := list(islice(file, BATCH_ROWS)):
            objects = []
            for line in lines:
                row += 1
                if not line.strip():
                    continue
                try:
                    objects.append(orjson.loads(line))
                except orjson.JSONDecodeError:
                    raise Refusal(f"{path.name}: line {row} is not JSON") from None
                if not isinstance(objects[-1], dict):
                    raise Refusal(f"{path.name}: line {row} is not an object of named values")
            for one in objects:
                names.update(dict.fromkeys(one))
            yield {name: _json_column(path, name, [one.get(name) for one in objects]) for name in names}


def _json_column(path: Path, name: str, values: list[Any]) -> Any:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int, float}:
        return pa.array(values, pa.float64(), from_pandas=True)
    if len(kinds) > 1:
        raise Refusal(f"{path.name}: column {name!r} mixes {' and '.join(sorted(k.__name__ for k in kinds))}")
    return pa.array(values)


def profile(path: Path, progress: Progress) -> Table:
    """Every column's type, missing values and range, from every row. Raises Refusal."""
    columns: dict[str, Column] = {}
    rows = 0
    text = path.suffix.lower() in (".csv", ".tsv", ".txt")
    for batch in batches(path):
        for name, array in batch.items():
            column = columns.setdefault(name, Column(name))
            (_read_text if text else _read_typed)(path, column, array)
        rows += len(next(iter(batch.values()), ()))
        progress(rows)
    if not rows:
        raise Refusal(f"{path.name}: has no rows")
    for column in columns.values():
        column.rows = rows
    return Table(path, columns, rows)


def _read_text(path: Path, column: Column, array: Any) -> None:
    present = array.drop_null()
    column.present += len(present)
    if not len(present) or column.dtype == "string":
        return
    kind, values = _kind_of_text(present)
    column.dtype = kind if column.dtype in (None, kind) else _wider(column.dtype, kind)
    _widen_range(path, column, values)


def _wider(one: str, other: str) -> str:
    return "float64" if {one, other} == {"int64", "float64"} else "string"


def _kind_of_text(present: Any) -> tuple[str, Any]:
    """The narrowest type that takes every one of these texts, and the values as that type."""
    if pc.all(pc.is_in(present, pa.array(TRUE + FALSE))).as_py():
        return "bool", None
    trimmed = pc.utf8_trim_whitespace(present)
    if pc.all(pc.match_substring_regex(trimmed, "^-?[0-9]{1,18}$")).as_py():
        return "int64", pc.cast(trimmed, pa.int64())
    try:
        return "float64", pc.cast(trimmed, pa.float64())
    except pa.ArrowInvalid:
        return "string", None


def _read_typed(path: Path, column: Column, array: Any) -> None:
    kind = _kind(array.type)
    if kind is None:
        column.unusable = str(array.type)
        return
    if kind == "null":
        return
    present = _typed(array, kind).drop_null()
    column.present += len(present)
    if not len(present):
        column.dtype = column.dtype or kind
        return
    if column.dtype not in (None, kind):
        if {column.dtype, kind} != {"int64", "float64"}:
            raise Refusal(f"{path.name}: column {column.name!r} mixes {column.dtype} and {kind}")
        kind = "float64"
    column.dtype = kind
    if kind in ("int64", "float64"):
        _widen_range(path, column, present)


def _kind(type_: Any) -> str | None:
    """float64, int64, bool or string, for any type of Arrow that JSON has a like of; `null` for no values."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_null(type_):
        return "null"
    if pa.types.is_boolean(type_):
        return "bool"
    if pa.types.is_integer(type_):
        return "int64"
    if pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "float64"
    string = pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    return "string" if string else None


def _widen_range(path: Path, column: Column, values: Any) -> None:
    if values is None or not len(values):
        return
    if pa.types.is_floating(values.type) and pc.any(pc.is_inf(values)).as_py():
        raise Refusal(f"{path.name}: column {column.name!r} holds infinity, which JSON has no word for")
    ends = pc.min_max(values).as_py()
    column.low = ends["min"] if column.low is None else min(column.low, ends["min"])
    column.high = ends["max"] if column.high is None else max(column.high, ends["max"])


def _typed(array: Any, dtype: str) -> Any:
    """An array of the file as the column's type; NaN is a missing value."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string(array.type) and dtype != "string":
        if dtype == "bool":
            # A missing value is in neither list, and stays missing.
            return pc.if_else(pc.is_null(array), None, pc.is_in(array, pa.array(TRUE)))
        array = pc.utf8_trim_whitespace(array)
    array = pc.cast(array, ARROW[dtype])
    if dtype == "float64":
        array = pc.if_else(pc.is_nan(array), None, array)
    return array


def sample(table: Table, target: Path, progress: Progress) -> int:
    """Write the rows that answers are compared on; the number of rows. All of them up to SAMPLE_ROWS.

    Counts categories over all rows on the way.
    """
    columns = [one for one in table.columns.values() if one.dtype and not one.unusable]
    schema = pa.schema([(one.name, ARROW[one.dtype or ""]) for one in columns])
    chosen = None
    if table.rows > SAMPLE_ROWS:
        chosen = np.sort(np.random.default_rng(0).choice(table.rows, SAMPLE_ROWS, replace=False))
    start = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches(table.path):
            rows = len(next(iter(batch.values())))
            arrays = [
                _typed(batch[one.name], one.dtype or "") if one.name in batch else pa.nulls(rows, field_.type)
                for one, field_ in zip(columns, schema, strict=True)
            ]
            for one, array in zip(columns, arrays, strict=True):
                _count(one, array)
            part = pa.record_batch(arrays, schema)
            if chosen is not None:
                first, last = np.searchsorted(chosen, [start, start + rows])
                part = part.take(pa.array(chosen[first:last] - start))
            if part.num_rows:
                writer.write_batch(part)
            start += rows
            progress(start)
    return min(table.rows, SAMPLE_ROWS)


def _count(column: Column, array: Any) -> None:
    if column.dtype != "string" or column.counts is None:
        return
    for entry in pc.value_counts(array.drop_null()).to_pylist():
        column.counts[entry["values"]] += entry["counts"]
        if len(column.counts) > MAX_DISTINCT:
            column.counts = None
            return


def read_sample(path: Path) -> Any:
    """The sample as a pyarrow table, mapped rather than read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
