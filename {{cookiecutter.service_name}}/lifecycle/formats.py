"""Data files of all supported formats, read as batches of columns.

    .csv .tsv .txt .jsonl .json, compressed or not; .parquet .arrow .xlsx -> batches() of columns
    a column that cannot be read -> the reason in its place, for callers that need the column

Text files are read as pandas reads them, because most estimators were fitted on such data. Encoding,
separator, comment lines and the meaning of commas in numbers are detected from the file.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import re
import sys
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from lifecycle.command import LifecycleError

BATCH_ROWS, BLOCK_BYTES, HEAD_CHARACTERS = 16_384, 2**22, 2**18
# Words that pandas reads as missing.
MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
    "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip
TEXT = (".csv", ".tsv", ".txt")  # formats without types
DELIMITERS = ",;\t|"
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(str(path), "zstd"), ".zip": lambda path: _only_member(path),
}  # fmt: skip
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# How words of other alphabets look when read as Windows-1252: three such letters, or a sign within a word.
FOREIGN = re.compile(r"[^\x00-\x7f]{3}|[^\W\d_][¡¢£¤¥¦¬±³¹¼½¾¿][^\W\d_]")
# Numbers that show the meaning of a comma; ambiguous numbers; numbers that are accepted for each meaning.
SHOWS = {
    "decimal": re.compile(r"[-+]?(\d{1,3}(\.\d{3})+,\d+|\d+,(\d{1,2}|\d{4,}))"),
    "thousands": re.compile(r"[-+]?(\d{1,3}(,\d{3})+\.\d+|\d{1,3}(,\d{3}){2,})"),
}
AMBIGUOUS = re.compile(r"[-+]?\d{1,3},\d{3}")
READ = {
    "decimal": r"^[-+]?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+)(,[0-9]*)?$",
    "thousands": r"^[-+]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]*)?$",
}


class Batch(NamedTuple):
    """Some rows: for each column a pyarrow array, or the reason why no model can take the column."""

    rows: int
    columns: dict[str, Any]


def batches(path: Path, text: Collection[str] = ()) -> Iterator[Batch]:
    """All rows in batches; CSV values as text, missing values as nulls. Raises LifecycleError.

    In columns that `text` names, numbers with commas stay as they are.
    """
    suffix = format_of(path)
    reader = {
        ".csv": _csv, ".tsv": _csv, ".txt": _csv, ".jsonl": _json, ".ndjson": _json, ".json": _json,
        ".parquet": _parquet, ".pq": _parquet, ".arrow": _arrow, ".feather": _arrow, ".ipc": _arrow,
        ".xlsx": _excel,
    }.get(suffix)  # fmt: skip
    if reader is None or (reader is _excel and not find_spec("openpyxl")):
        unless = ", unless openpyxl is installed" if reader else ""
        raise LifecycleError(
            f"{path.name}: takes .csv, .parquet, .jsonl or .arrow, not {suffix or 'this'}{unless}; "
            "compressed as .gz, .bz2, .xz, .zst or .zip"
        )
    try:
        if not path.stat().st_size:
            raise LifecycleError(f"{path.name}: is empty")
        yield from reader(path, text)
    except OSError as error:
        raise LifecycleError(f"{path.name}: {error.strerror or _without_values(error)}") from None
    except (ValueError, RuntimeError, EOFError, csv.Error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise LifecycleError(f"{path.name}: cannot be read as {suffix}: {_without_values(error)}") from None


def format_of(path: Path) -> str:
    """The suffix of the format, without a suffix of compression; without any, guessed from the first byte."""
    if not path.suffix and path.is_file():
        with path.open("rb") as file:
            return ".jsonl" if file.read(1) == b"{" else ".csv"
    name = Path(path.name.lower())
    return name.with_suffix("").suffix if name.suffix in OPENERS else name.suffix


def _only_member(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    if len(names) != 1:
        raise LifecycleError(f"{path.name}: holds {len(names)} files: put a single table into it")
    return archive.open(names[0])


def _opened(path: Path) -> Any:
    opener = OPENERS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")


def _without_values(error: Exception) -> str:
    """The first line of a library's message: later lines may quote the data."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# --- text ------------------------------------------------------------------------------------------------


def _text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_opened(path), _encoding(path, path.stat().st_mtime_ns), newline="")


@lru_cache(maxsize=4)
def _encoding(path: Path, changed: int) -> str:
    """UTF-8 or UTF-16; else Windows-1252 with a note, unless the words seem to be of another alphabet."""
    with _opened(path) as file:
        decoder, block = codecs.getincrementaldecoder("utf-8")(), file.read(BLOCK_BYTES)
        if found := next((name for bom, name in BOMS.items() if block.startswith(bom)), ""):
            return found
        if b"\0" in block[:2]:
            return "utf-16-le" if block[1:2] == b"\0" else "utf-16-be"
        with suppress(UnicodeDecodeError):
            while block:
                decoder.decode(block)
                block = file.read(BLOCK_BYTES)
            decoder.decode(b"", final=True)
            return "utf-8"
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            words = line.decode("cp1252", errors="replace")
            if "\ufffd" in words or FOREIGN.search(words):
                raise LifecycleError(f"{path.name}: line {number} is not UTF-8: save the file as UTF-8")
    print(f"{path.name}: is not UTF-8, read as Windows-1252", file=sys.stderr)
    return "cp1252"


class _Rest:
    """The rest of a text file, encoded as UTF-8 for pyarrow."""

    closed = False

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file, self.quotes = file, 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes: a character has up to four."""
        text = self._file.read(size // 4)
        self.quotes += text.count('"')
        return text.encode()


def _csv(path: Path, text: Collection[str]) -> Iterator[Batch]:
    with _text(path) as file:
        head = file.read(HEAD_CHARACTERS)
    delimiter, rows = _records(head, DELIMITERS if format_of(path) != ".tsv" else "\t")
    width = len(rows[0]) if rows else 0
    with _text(path) as file:
        for names in csv.reader(file, delimiter=delimiter):
            comment = names and names[0].startswith("#") and (names[0][1:2] == " " or len(names) != width)
            if any(names) and not comment:
                break
        else:
            raise LifecycleError(f"{path.name}: has no rows")
        names = [name or f"Unnamed: {index}" for index, name in enumerate(names)]  # as in pandas
        commas = {name: mark for name, mark in _commas(names, rows, delimiter).items() if name not in text}
        rest = _Rest(file)
        yield from _csv_batches(path, rest, names, delimiter, commas)
    if rest.quotes % 2:  # usually a quote within a value, but Arrow does not report a quote without an end
        with _text(path) as file:
            try:
                deque(csv.reader(file, delimiter=delimiter, strict=True), maxlen=0)
            except csv.Error:
                raise LifecycleError(f"{path.name}: a quote is opened and never closed") from None


def _records(head: str, delimiters: str) -> tuple[str, list[list[str]]]:
    """The separator that gives most of the first lines equally many fields, and these fields."""
    found = []
    for delimiter in delimiters:
        with suppress(csv.Error):
            rows = list(islice(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), 500))
            rows = rows[: -1 if len(rows) > 1 and len(head) == HEAD_CHARACTERS else None]
            rows = [row for row in rows if any(row) and not row[0].startswith("#")]
            width = len(rows[0]) if rows else 0
            agreeing = sum(len(row) == width for row in rows) / max(len(rows), 1)
            found.append(((width > 1, agreeing, width), -delimiters.index(delimiter), delimiter, rows))
    return max(found)[2:] if found else (",", [])


def _commas(names: list[str], rows: list[list[str]], delimiter: str) -> dict[str, str]:
    """The meaning of a comma in each column of numbers: `decimal` or `thousands`.

    3,504 is ambiguous, and read as other columns of the file show. If none does, it means thousands if commas
    also separate the fields, else the column stays text. A column that shows both meanings stays text, too.
    """
    known, open_ = dict[str, str](), []
    for name, *cells in zip(names, *(row for row in rows[1:] if len(row) == len(names)), strict=True):
        numbers = [cell.strip() for cell in cells if cell not in MISSING]
        meant = [mark for mark, pattern in SHOWS.items() if any(map(pattern.fullmatch, numbers))]
        if len(meant) == 1:
            known[name] = meant[0]
        elif not meant and any(map(AMBIGUOUS.fullmatch, numbers)):
            open_.append(name)
    marks = {*known.values()} | ({"thousands"} if delimiter == "," else set())
    return known | (dict.fromkeys(open_, marks.pop()) if len(marks) == 1 else {})


def _csv_batches(
    path: Path, rest: _Rest, names: list[str], delimiter: str, commas: Mapping[str, str]
) -> Iterator[Batch]:
    keys, ragged = [f"{index}" for index in range(len(names))], list[str]()

    def misfit(row: Any) -> str:
        if row.text.startswith("#"):
            return "skip"
        counts = f"Expected {row.expected_columns} columns, got {row.actual_columns}"
        ragged.append(f"Row #{row.number + 1}: {counts}")
        return "error"

    try:
        for batch in pyarrow.csv.open_csv(
            pa.PythonFile(rest, mode="r"),
            # With threads, pyarrow cannot tell the number of a wrong line.
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=4 * BLOCK_BYTES, column_names=keys
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=misfit
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(keys, pa.string()), null_values=MISSING, strings_can_be_null=True
            ),
        ):
            columns = _named(names, batch.columns)
            for name, mark in commas.items():
                columns[name] = _without_commas(columns[name], mark)
            yield Batch(batch.num_rows, columns)
    except pa.ArrowInvalid as error:
        if "Empty CSV" not in str(error):
            why = ragged[-1] if ragged else f"is broken: {_without_values(error)}"
            raise LifecycleError(f"{path.name}: {why}") from None


def _without_commas(array: Any, mark: str) -> Any:
    """Numbers in Python's notation if all values are numbers, else the column unchanged."""
    trimmed = pc.utf8_trim_whitespace(array)
    if not pc.all(pc.match_substring_regex(trimmed.drop_null(), READ[mark])).as_py():
        return array
    if mark == "thousands":
        return pc.replace_substring(trimmed, ",", "")
    return pc.replace_substring(pc.replace_substring(trimmed, ".", ""), ",", ".")


def _named(names: Sequence[str], arrays: Iterable[Any]) -> dict[str, Any]:
    count = Counter(names)
    return {
        name: array if count[name] == 1 else f"is not unique: {count[name]} columns are called {name!r}"
        for name, array in zip(names, arrays, strict=True)
    }


# --- other formats ---------------------------------------------------------------------------------------


def _parquet(path: Path, text: Collection[str]) -> Iterator[Batch]:
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**16, pre_buffer=False) as file:
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            yield _without_index(file.schema_arrow, batch)


def _arrow(path: Path, text: Collection[str]) -> Iterator[Batch]:
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
            parts = (file.get_batch(index) for index in range(file.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            file = parts = pa.ipc.open_stream(source)
        for batch in parts:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield _without_index(file.schema, batch.slice(start, BATCH_ROWS))


def _without_index(schema: Any, batch: Any) -> Batch:
    """The columns without those that were the index of a DataFrame."""
    columns = _named(batch.schema.names, batch.columns)
    for index in (schema.pandas_metadata or {}).get("index_columns", []):
        if isinstance(index, str):
            columns.pop(index, None)
    return Batch(batch.num_rows, columns)


def _excel(path: Path, text: Collection[str]) -> Iterator[Batch]:
    import pandas as pd  # here: takes a second

    frame = pd.read_excel(path, dtype=object)
    columns = {str(name): _array(frame[name].tolist(), 1) for name in frame}
    yield Batch(len(frame), columns)


def _json(path: Path, text: Collection[str]) -> Iterator[Batch]:
    rows, names = 0, dict[str, None]()

    def parsed(line: str, number: int) -> Any:
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(line)
        try:
            return json.loads(line)  # accepts NaN, as Python writes it
        except (ValueError, RecursionError):
            raise LifecycleError(f"{path.name}: line {number} is not JSON") from None

    with _text(path) as file:
        first = file.readline()
        if first.lstrip().startswith("["):  # one array of objects
            found = ((1, one) for one in parsed(first + file.read(), 1))
        else:
            lines = enumerate(chain([first], file), 1)
            found = ((number, parsed(line, number)) for number, line in lines if line.strip())
        while some := list(islice(found, BATCH_ROWS)):
            for number, one in some:
                if not isinstance(one, dict):
                    raise LifecycleError(f"{path.name}: line {number} is not an object of named values")
                names.update(dict.fromkeys(one))
            columns = {name: _array([one.get(name) for _, one in some], rows + 1) for name in names}
            yield Batch(len(some), columns)
            rows += len(some)


def _array(values: list[Any], first: int) -> Any:
    """Values of any type as an array, or the reason why not; `first` is the number of their first row."""
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    kinds = dict.fromkeys(type(value) for value in values if value is not None)
    if len(kinds) > 1 and kinds.keys() != {int, float}:
        usual = next(iter(kinds))
        odd = next(row for row, value in enumerate(values) if type(value) not in (usual, type(None)))
        named = " and ".join(sorted(kind.__name__ for kind in kinds))
        text = json.dumps(values[odd], ensure_ascii=False, default=str)
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        return f"mixes {named}: row {first + odd} holds {shown}; give all rows one type"
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError):
        if kinds.keys() <= {int, float}:  # integers beyond 64 bits, or beyond floats
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
        return "holds mixed lists or objects, which no model takes: write a column for each value"
