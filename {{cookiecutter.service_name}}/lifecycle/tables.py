"""Columns of a data file with their types, and rows in the types of the contract.

    batches of a file -> profile() -> a Column each: type, missing values, range, or why it is unusable
    every row -> sample() -> categories with counts, and an Arrow file of at most SAMPLE_ROWS rows
    read_table() -> instances() under the contract, truths() of the target column

All rows decide on a column's type, not only the first block, and every format gives the same types. `wanted`
gives the types that a model or a contract needs: a column that is wanted as `string` keeps codes like 08
unchanged. Only columns in use are judged: a fault is noted in `Column.unusable`, and becomes an error if the
column is required.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ValidationError

from app.schemas.contract import contract_inputs
from app.schemas.predict import Features
from lifecycle.command import LifecycleError
from lifecycle.formats import MISSING, TEXT, batches, format_of

SAMPLE_ROWS = 200_000
MAX_DISTINCT = 1_000  # values of a text column; beyond it there are no categories
ROWS_A_CALL = 256
MISSING_WORDS = {word.lower() for word in MISSING}
TRUE, FALSE = ["True", "TRUE", "true"], ["False", "FALSE", "false"]
ARROW = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
KINDS = (
    (pa.types.is_null, "null"), (pa.types.is_boolean, "bool"), (pa.types.is_integer, "int64"),
    (pa.types.is_floating, "float64"), (pa.types.is_decimal, "float64"), (pa.types.is_string, "string"),
    (pa.types.is_large_string, "string"), (pa.types.is_string_view, "string"),
)  # fmt: skip

Progress = Callable[[int], object]  # called with the number of rows done


@dataclass
class Column:
    """A column, summarised over all rows of the file."""

    name: str
    dtype: str | None = None  # float64, int64, bool or string; None while all values are missing
    present: int = 0
    low: float | None = None
    high: float | None = None
    unusable: str = ""  # why no model can take it, to follow the column's name in a message
    counts: Counter[str] | None = field(default_factory=Counter)  # of text values, None beyond MAX_DISTINCT
    rows: int = 0

    @property
    def nullable(self) -> bool:
        """Whether a value was missing in any row."""
        return self.present < self.rows


@dataclass
class Table:
    """A data file with its columns in order."""

    path: Path
    columns: dict[str, Column]
    rows: int = 0


def profile(path: Path, progress: Progress, wanted: Mapping[str, str] | None = None) -> Table:
    """Every column's type, missing values and range, from every row. Raises LifecycleError."""
    columns: dict[str, Column] = {}
    rows, as_text = 0, {name for name, dtype in (wanted or {}).items() if dtype == "string"}
    text = format_of(path) in TEXT
    for batch in batches(path, as_text):
        for name, array in batch.columns.items():
            column = columns.setdefault(name, Column(name))
            if isinstance(array, str):
                column.unusable = column.unusable or array
            elif not column.unusable:
                _learn(column, array, rows, text=text, wanted="string" if name in as_text else None)
        rows += batch.rows
        progress(rows)
    if not rows:
        raise LifecycleError(f"{path.name}: has no rows")
    for column in columns.values():
        column.rows = rows
    return Table(path, columns, rows)


def _learn(column: Column, array: Any, before: int, *, text: bool, wanted: str | None) -> None:
    """Update a column from a batch after `before` rows; `text`: the types must be inferred from text."""
    kind = _kind(array)
    if not kind:
        column.unusable = f"is of type {array.type}, which JSON does not have: write it as text or numbers"
        return
    kind = wanted or kind
    if not text:
        values = (array if kind == "null" else _typed(array, kind)).drop_null()
    elif wanted or column.dtype == "string":
        kind, values = "string", array.drop_null()
    else:
        kind, values = _narrowest(array.drop_null())
    column.present += len(values)
    if kind == "null":
        return
    if column.dtype in (None, kind):
        column.dtype = kind
    elif {column.dtype, kind} == {"int64", "float64"}:
        column.dtype = "float64"
    elif text:
        column.dtype = "string"
    elif len(values):
        column.unusable = f"mixes {column.dtype} and {kind} from row {before + 1} on; give all rows one type"
        return
    if kind == "float64" and pc.any(pc.is_inf(values)).as_py():
        column.unusable = "holds infinity, which JSON does not have: leave such values empty"
    elif kind in ("int64", "float64") and len(values):
        ends = pc.min_max(values).as_py()
        column.low = ends["min"] if column.low is None else min(column.low, ends["min"])
        column.high = ends["max"] if column.high is None else max(column.high, ends["max"])


def _narrowest(present: Any) -> tuple[str, Any]:
    """The narrowest type for all of these texts, and the values in that type."""
    if not len(present):
        return "null", present
    if pc.all(pc.is_in(present, pa.array(TRUE + FALSE))).as_py():
        return "bool", present
    numbers = _numerals(present)
    digits = pc.all(pc.match_substring_regex(numbers, "^-?[0-9]+$")).as_py()
    for kind in ("int64", "float64") if digits else ("float64",):
        with suppress(pa.ArrowInvalid):
            return kind, pc.cast(numbers, ARROW[kind])
    return "string", present


def _numerals(array: Any) -> Any:
    """Texts without outer spaces and plus signs, which Arrow does not accept in numbers."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(array), r"^\+", "")


def _kind(array: Any) -> str | None:
    """float64, int64, bool or string; `null` if all values are missing; None if JSON has no such type."""
    array = _decoded(array)
    if pa.types.is_uint64(array.type) and (pc.max(array).as_py() or 0) > np.iinfo(np.int64).max:
        return "float64"
    return next((kind for is_such, kind in KINDS if is_such(array.type)), None)


def _decoded(array: Any) -> Any:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _typed(array: Any, dtype: str) -> Any:
    """An array of the file in the column's type; NaN becomes null."""
    array = _decoded(array)
    if _kind(array) == "string" and dtype != "string":
        if dtype == "bool":
            # `is_in` would turn a missing value into false.
            return pc.if_else(pc.is_null(array), None, pc.is_in(array, pa.array(TRUE)))
        array = _numerals(array)
    array = pc.cast(array, ARROW[dtype], safe=dtype != "float64")  # a cast to float64 may lose precision
    return pc.if_else(pc.is_nan(array), None, array) if dtype == "float64" else array


def typed_batches(table: Table, columns: Sequence[Column]) -> Iterator[Any]:
    """All rows, read again as record batches of these columns in their types."""
    schema = pa.schema([(one.name, ARROW.get(one.dtype or "", pa.null())) for one in columns])
    for batch in batches(table.path, {one.name for one in columns if one.dtype == "string"}):
        arrays = [batch.columns.get(one.name) if one.dtype else None for one in columns]
        typed = [
            pa.nulls(batch.rows, type_) if array is None else _typed(array, one.dtype or "")
            for one, array, type_ in zip(columns, arrays, schema.types, strict=True)
        ]
        yield pa.record_batch(typed, schema)


def sample(table: Table, target: Path, progress: Progress) -> int:
    """Write the rows for comparing answers, all of them up to SAMPLE_ROWS; returns their number.

    Also counts categories over all rows.
    """
    columns = [one for one in table.columns.values() if one.dtype and not one.unusable]
    schema = pa.schema([(one.name, ARROW[one.dtype or ""]) for one in columns])
    chosen = None
    if table.rows > SAMPLE_ROWS:
        chosen = np.sort(np.random.default_rng(0).choice(table.rows, SAMPLE_ROWS, replace=False))
    start = 0
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part in typed_batches(table, columns):
            rows = part.num_rows
            for one, array in zip(columns, part.columns, strict=True):
                if one.dtype == "string" and one.counts is not None:
                    found = pc.value_counts(array.drop_null()).to_pylist()
                    one.counts.update({entry["values"]: entry["counts"] for entry in found})
                    one.counts = one.counts if len(one.counts) <= MAX_DISTINCT else None
            if chosen is not None:
                first, last = np.searchsorted(chosen, [start, start + rows])
                part = part.take(pa.array(chosen[first:last] - start))
            if part.num_rows:
                writer.write_batch(part)
            start += rows
            progress(start)
    return min(table.rows, SAMPLE_ROWS)


def read_sample(path: Path) -> Any:
    """The sample as a memory-mapped pyarrow table."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# --- values under the contract ---------------------------------------------------------------------------


def read_table(
    path: Path, wanted: Mapping[str, str] | None = None, columns: Collection[str] | None = None
) -> Any:
    """All rows of a data file as a pyarrow table; raises LifecycleError if one of `columns` is unusable.

    Without `columns` every column must be usable; with them, other unusable columns are left out.
    """
    table = profile(path, lambda _: None, wanted)
    for one in table.columns.values():
        if one.unusable and (columns is None or one.name in columns):
            raise LifecycleError(f"{path.name}: column {one.name!r} {one.unusable}")
    return pa.Table.from_batches(
        typed_batches(table, [one for one in table.columns.values() if not one.unusable])
    )


def contract_types(target: str, labels: Sequence[Any]) -> dict[str, str]:
    """The types, for `read_table`, of the contract's columns and the target."""
    types = {entry["name"]: str(entry["dtype"]) for entry in contract_inputs()}
    return types | ({target: "string"} if labels and isinstance(labels[0], str) else {})


def spelling(value: Any) -> str:
    """A label or category as text: text without outer spaces, other values as JSON, 1.0 as 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # integers with missing values are read as floats
    return value.strip() if isinstance(value, str) else json.dumps(value, default=str)


def is_missing(value: Any, *, text: bool = False) -> bool:
    """Whether a value means missing; with `text`, only "" does, not "NA" or "null"."""
    if isinstance(value, str):
        return not value.strip() if text else value.strip().lower() in MISSING_WORDS
    return value is None or (isinstance(value, float) and math.isnan(value))


def choice(value: Any, choices: Sequence[Any]) -> Any:
    """The element of `choices` that `value` means: "1" is 1, "True" is true; else `value` itself."""
    text = spelling(value)
    by_text = {spelling(one): one for one in choices}
    if text not in by_text and all(isinstance(one, bool) for one in choices):
        text = {"1": "true", "0": "false"}.get(text, text.lower())
    return by_text.get(text, value)


def typed(entry: dict[str, Any], value: Any) -> Any:
    """A value converted to the type of its input, or unchanged if that fails: the contract refuses it."""
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
    """The rows as validated instances, ROWS_A_CALL at a time; raises LifecycleError for an invalid row."""
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
                first = error.errors(include_input=False, include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise LifecycleError(f"{name}: row {number}: {where}: {first['msg']}") from None
        yield found


def truths(column: Iterable[Any], labels: Sequence[Any], name: str, target: str) -> NDArray[Any]:
    """The truth of each row: an index in `labels`, or a number if there are no labels."""
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
