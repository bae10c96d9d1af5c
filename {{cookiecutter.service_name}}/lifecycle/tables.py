"""Rows from a file, a batch at a time, and their values as the contract takes them.

    .csv .tsv .parquet .jsonl .ndjson .arrow .feather -> batches() of columns
    every row -> profile() -> Column each: type, whether values are missing, range
    every row -> sample()  -> categories with counts, and an Arrow file of at most SAMPLE_ROWS rows
    read_table() -> instances() under the contract, truths() of the target column

All rows decide on a column's type, never the first block alone. In CSV, text means what pandas' `read_csv`
takes it for, because most estimators were fitted on that.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
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
from numpy.typing import NDArray
from pydantic import ValidationError

from app.schemas.contract import contract_inputs
from app.schemas.predict import Features
from lifecycle.command import LifecycleError

SAMPLE_ROWS = 200_000
BATCH_ROWS, BLOCK_BYTES = 16_384, 2**22
MAX_DISTINCT = 1_000  # of a text column; with more there are no categories
# Words that pandas reads as missing.
MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip
TRUE, FALSE = ["True", "TRUE", "true"], ["False", "FALSE", "false"]
ARROW = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
KINDS = (
    (pa.types.is_null, "null"), (pa.types.is_boolean, "bool"), (pa.types.is_integer, "int64"),
    (pa.types.is_floating, "float64"), (pa.types.is_decimal, "float64"), (pa.types.is_string, "string"),
    (pa.types.is_large_string, "string"), (pa.types.is_string_view, "string"),
)  # fmt: skip

MISSING_WORDS = {word.lower() for word in MISSING}
ROWS_A_CALL = 256

Batch = dict[str, Any]  # name -> pyarrow array
Progress = Callable[[int], None]  # is told how many rows are done


@dataclass
class Column:
    """A column, as all rows of the file show it."""

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


def batches(path: Path) -> Iterator[Batch]:
    """All rows, a batch at a time; from CSV as text, missing values as nulls. Raises LifecycleError."""
    readers = {
        ".csv": _csv, ".tsv": _csv, ".txt": _csv, ".parquet": _parquet, ".pq": _parquet,
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".arrow": _arrow, ".feather": _arrow, ".ipc": _arrow,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise LifecycleError(
            f"{path.name}: takes .csv, .parquet, .jsonl or .arrow, not {path.suffix or 'this'}"
        )
    try:
        if not path.stat().st_size:
            raise LifecycleError(f"{path.name}: is empty")
        yield from reader(path)
    except OSError as error:
        raise LifecycleError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise LifecycleError(
            f"{path.name}: cannot be read as {path.suffix}: {_without_values(error)}"
        ) from None


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
            raise LifecycleError(f"{path.name}: {count} columns are called {name!r}")
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
                    raise LifecycleError(f"{path.name}: line {row} is not JSON") from None
                if not isinstance(objects[-1], dict):
                    raise LifecycleError(f"{path.name}: line {row} is not an object of named values")
            for one in objects:
                names.update(dict.fromkeys(one))
            yield {name: _json_column(path, name, [one.get(name) for one in objects]) for name in names}


def _json_column(path: Path, name: str, values: list[Any]) -> Any:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int, float}:
        return pa.array(values, pa.float64(), from_pandas=True)
    if len(kinds) > 1:
        raise LifecycleError(
            f"{path.name}: column {name!r} mixes {' and '.join(sorted(k.__name__ for k in kinds))}"
        )
    return pa.array(values)


def profile(path: Path, progress: Progress) -> Table:
    """Every column's type, missing values and range, from every row. Raises LifecycleError."""
    columns: dict[str, Column] = {}
    rows = 0
    text = path.suffix.lower() in (".csv", ".tsv", ".txt")
    for batch in batches(path):
        for name, array in batch.items():
            _learn(path, columns.setdefault(name, Column(name)), array, text=text)
        rows += len(next(iter(batch.values()), ()))
        progress(rows)
    if not rows:
        raise LifecycleError(f"{path.name}: has no rows")
    for column in columns.values():
        column.rows = rows
    return Table(path, columns, rows)


def _learn(path: Path, column: Column, array: Any, *, text: bool) -> None:
    """Update a column from a batch; with `text` the type is read from the text."""
    if text:
        present = values = array.drop_null()
        kind = "string" if column.dtype == "string" else "null"
        if len(present) and kind == "null":
            kind, values = _narrowest(present)
    else:
        kind = _kind(array.type) or ""
        if not kind:
            column.unusable = str(array.type)
            return
        present = values = array.drop_null() if kind == "null" else _typed(array, kind).drop_null()
    column.present += len(present)
    if kind == "null":
        return
    if column.dtype in (None, kind):
        column.dtype = kind
    elif {column.dtype, kind} == {"int64", "float64"}:
        column.dtype = "float64"
    elif text:
        column.dtype = "string"
    elif len(present):
        raise LifecycleError(f"{path.name}: column {column.name!r} mixes {column.dtype} and {kind}")
    if kind in ("int64", "float64") and len(values):
        _widen_range(path, column, values)


def _narrowest(present: Any) -> tuple[str, Any]:
    """The narrowest type that takes every one of these texts, and the values as that type."""
    if pc.all(pc.is_in(present, pa.array(TRUE + FALSE))).as_py():
        return "bool", present
    trimmed = pc.utf8_trim_whitespace(present)
    if pc.all(pc.match_substring_regex(trimmed, "^-?[0-9]{1,18}$")).as_py():
        return "int64", pc.cast(trimmed, pa.int64())
    try:
        return "float64", pc.cast(trimmed, pa.float64())
    except pa.ArrowInvalid:
        return "string", present


def _kind(type_: Any) -> str | None:
    """float64, int64, bool or string; `null` where there are no values; None if JSON has no such type."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return next((kind for is_such, kind in KINDS if is_such(type_)), None)


def _widen_range(path: Path, column: Column, values: Any) -> None:
    if pa.types.is_floating(values.type) and pc.any(pc.is_inf(values)).as_py():
        raise LifecycleError(
            f"{path.name}: column {column.name!r} holds infinity, which JSON has no word for"
        )
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


# --- values under the contract ---------------------------------------------------------------------------


def read_table(path: Path) -> Any:
    """All rows of a data file as a pyarrow table, with the types of the file; raises LifecycleError."""
    parts = [pa.table(batch) for batch in batches(path)]
    try:
        table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})
    except pa.ArrowException:
        raise LifecycleError(f"{path.name}: a column has numbers in some rows and text in others") from None
    if not table.num_rows:
        raise LifecycleError(f"{path.name}: has no rows")
    return table


def spelling(value: Any) -> str:
    """A label or category as text: text without outer spaces, anything else as JSON spells it; 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integers with gaps among them are read as floats
    return value.strip() if isinstance(value, str) else json.dumps(value, default=str)


def is_missing(value: Any, *, text: bool = False) -> bool:
    """Whether a value stands for a missing one; in a column of text only "" does, not "NA" or "null"."""
    if isinstance(value, str):
        return not value.strip() if text else value.strip().lower() in MISSING_WORDS
    return value is None or (isinstance(value, float) and math.isnan(value))


def choice(value: Any, choices: Sequence[Any]) -> Any:
    """The one of `choices` that a file means by `value`: "1" is 1, "True" is true; else `value` itself."""
    text = spelling(value)
    by_text = {spelling(one): one for one in choices}
    if text not in by_text and all(isinstance(one, bool) for one in choices):
        text = {"1": "true", "0": "false"}.get(text, text.lower())
    return by_text.get(text, value)


def typed(entry: dict[str, Any], value: Any) -> Any:
    """A value with the type of its input; one that cannot have it is left for the contract to refuse."""
    dtype = entry["dtype"]
    if is_missing(value, text=dtype == "string"):
        return value if dtype == "string" and isinstance(value, str) and not entry["nullable"] else None
    if entry["categories"]:
        return choice(value, entry["categories"])
    if dtype == "bool":
        return choice(value, (False, True))
    with suppress(ValueError, OverflowError):
        if dtype == "float64" and isinstance(value, str):
            return float(value)
        if dtype == "int64" and isinstance(value, str | float) and float(value).is_integer():
            return int(float(value)) if isinstance(value, float) or "." in value else int(value)
    return value


def instances(table: Any, name: str) -> Iterator[list[Features]]:
    """The rows under the contract, ROWS_A_CALL at a time; raises LifecycleError where one breaks it."""
    inputs, number = contract_inputs(), 0
    for entry in inputs:
        if entry["name"] not in table.column_names:
            raise LifecycleError(f"{name}: has no column {entry['name']!r}; say which file with DATA=...")
    for part in table.to_batches(max_chunksize=ROWS_A_CALL):
        found = []
        for row in part.to_pylist():
            number += 1
            values = {entry["name"]: typed(entry, row[entry["name"]]) for entry in inputs}
            try:
                found.append(Features.model_validate(values))
            except ValidationError as error:
                raise LifecycleError(f"{name}: row {number}: {first_error(error)}") from None
        yield found


def first_error(error: ValidationError) -> str:
    """Where the first error of a document is, and which; without the value."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def truths(column: Iterable[Any], labels: Sequence[Any], name: str, target: str) -> NDArray[Any]:
    """The truth of each row: a position among `labels`, or a number where there are none."""
    positions = {spelling(label): index for index, label in enumerate(labels)}
    found: list[float] = []
    for number, value in enumerate(column, 1):
        if is_missing(value, text=True):
            raise LifecycleError(f"{name}: row {number}: {target!r} is missing")
        try:
            found.append(positions[spelling(choice(value, labels))] if labels else float(value))
        except (KeyError, TypeError, ValueError):
            wanted = "none of the model's labels" if labels else "no number"
            raise LifecycleError(f"{name}: row {number}: {target!r} is {wanted}") from None
    return np.array(found, np.int64 if labels else np.float64)
