"""Data files as people have them: read as pandas would, or refused in one line; all formats alike."""

import bz2
import codecs
import decimal
import gzip
import importlib.util
import io
import json
import lzma
import math
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, strategies

from lifecycle.command import LifecycleError
from lifecycle.tables import contract_types, profile, read_sample, read_table, sample, truths

ROWS = {"n": [1, 2], "t": ["a", "b"]}
PLAIN = "n,t\n1,a\n2,b\n"


def quietly(_: int) -> None:
    """Say nothing of progress."""


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(**members: str) -> bytes:
    """A ZIP archive with these files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


def zstandard(text: str) -> bytes:
    """A text compressed as .zst."""
    target = pa.BufferOutputStream()
    with pa.CompressedOutputStream(target, "zstd") as stream:
        stream.write(text.encode())
    return bytes(target.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", PLAIN),
        ("rows.csv", PLAIN.replace(",", ";")),
        ("rows.csv", PLAIN.replace(",", "|")),
        ("rows.csv", PLAIN.replace(",", "\t")),
        ("rows.tsv", PLAIN.replace(",", "\t")),
        ("rows.csv", PLAIN.replace("\n", "\r\n")),
        ("rows.csv", PLAIN.replace("\n", "\r")),
        ("rows.csv", "\n\n" + PLAIN),
        ("rows.csv", ",,\n" + PLAIN),
        ("rows.csv", "# made by us, in May, for you\n#\n" + PLAIN),
        ("rows.csv", PLAIN.replace("2,b", "# half of them\n\n2,b")),
        ("rows.csv", '"n","t"\n+1,"a"\n 2,"b"\n'),
        ("rows.csv", codecs.BOM_UTF8 + PLAIN.encode()),
        ("rows.csv", PLAIN.encode("utf-16")),
        ("rows.csv", PLAIN.encode("utf-16-le")),
        ("rows.csv.gz", gzip.compress(PLAIN.encode(), mtime=0)),
        ("rows.csv.bz2", bz2.compress(PLAIN.encode())),
        ("rows.csv.xz", lzma.compress(PLAIN.encode())),
        ("rows.csv.zst", zstandard(PLAIN)),
        ("rows.csv.zip", zipped(**{"rows.csv": PLAIN, "__MACOSX/rows.csv": ""})),
        ("rows.jsonl", '{"n": 1, "t": "a"}\n\n{"n": 2, "t": "b"}'),
        ("rows.jsonl.zst", zstandard('{"n": 1, "t": "a"}\n{"n": 2, "t": "b"}\n')),
        ("rows.jsonl", '{"n": 1, "t": "a", "unused": NaN}\n{"n": 2, "t": "b", "unused": 1}\n'),
        ("rows.json", '[{"n": 1, "t": "a"},\n {"n": 2, "t": "b"}]'),
    ],
)
def test_the_same_rows_are_read_however_they_are_written(
    name: str, content: str | bytes, tmp_path: Path
) -> None:
    """Separators, line ends, blank and comment lines, encodings and compressions change nothing."""
    path = written(tmp_path, name, content)
    assert read_table(path).select([*ROWS]).to_pydict() == ROWS
    found = profile(path, quietly)
    assert {one: found.columns[one].dtype for one in ROWS} == {"n": "int64", "t": "string"}
    sample(found, tmp_path / "sample", quietly)
    assert read_sample(tmp_path / "sample").select([*ROWS]).to_pydict() == ROWS


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("n;t\n1,5;a\n-2;b\n", {"n": [1.5, -2.0], "t": ["a", "b"]}),
        ("n\tt\n1.234,5\ta\n3\tb\n", {"n": [1234.5, 3.0], "t": ["a", "b"]}),
        ("n;m\n1,5;3,504\n2,5;1\n", {"n": [1.5, 2.5], "m": [3.504, 1.0]}),
        ('n,t\n"3,504",a\n12,b\n', {"n": [3504, 12], "t": ["a", "b"]}),
        ('n,t\n"1,234.5",a\n"1,234,567",b\n', {"n": [1234.5, 1234567.0], "t": ["a", "b"]}),
        ('"Weight, kg","two\nlines"\n1,"x\ny"\n2,"say ""so"""\n',
         {"Weight, kg": [1, 2], "two\nlines": ["x\ny", 'say "so"']}),
        (",a,\n0,1,\n1,2,\n", {"Unnamed: 0": [0, 1], "a": [1, 2], "Unnamed: 2": [None, None]}),
        ("#id,a\n1,2\n", {"#id": [1], "a": [2]}),
        ('a,b\n5" pipe,x\n', {"a": ['5" pipe'], "b": ["x"]}),
        ("a,b\n0x1F,9223372036854775808\n", {"a": ["0x1F"], "b": [2.0**63]}),
    ],
)  # fmt: skip
def test_numbers_and_names_are_what_pandas_makes_of_them(
    text: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """Decimal commas, thousands, names with commas or line breaks, and columns without a name."""
    assert read_table(written(tmp_path, "rows.csv", text)).to_pydict() == values


@pytest.mark.parametrize(
    "text",
    [
        "n;t\n3,504;a\n",  # decimals or thousands: nothing in the file tells
        "n;t\n1,5;a\n1.5;b\n",
        "n,t\n1,a\nn.a.,b\n",
    ],
)
def test_what_may_be_no_number_stays_text(text: str, tmp_path: Path) -> None:
    """A column that is not clearly of numbers is text as it stands."""
    path = written(tmp_path, "rows.csv", text)
    assert profile(path, quietly).columns["n"].dtype == "string"
    assert read_table(path).column("n").to_pylist()[0] in text


def test_codes_stay_text_where_they_are_wanted_as_text(tmp_path: Path) -> None:
    """08 is 8 for pandas; a model that was fitted on texts gets 08, from every format what it holds."""
    path = written(tmp_path, "rows.csv", 'code,n\n08,"1,5"\n09,2\n')
    assert read_table(path).column("code").to_pylist() == [8, 9]
    wanted = {"code": "string", "n": "string"}
    assert profile(path, quietly, wanted).columns["code"].dtype == "string"
    assert read_table(path, wanted).to_pydict() == {"code": ["08", "09"], "n": ["1,5", "2"]}
    lines = written(tmp_path, "rows.jsonl", '{"code": 8}\n{"code": 9}\n')
    assert read_table(lines, wanted).to_pydict() == {"code": ["8", "9"]}


def test_western_letters_are_read_and_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows-1252 is read, which is said; an alphabet that it does not have is asked for in UTF-8."""
    path = written(tmp_path, "rows.csv", "n,t\n1,Größe\n2,5 €\n".encode("cp1252"))
    assert read_table(path).column("t").to_pylist() == ["Größe", "5 €"]
    assert capsys.readouterr().err == "rows.csv: is not UTF-8, read as Windows-1252\n"
    for encoding, word in (
        ("cp1251", "привет"),
        ("cp1253", "καλημέρα"),
        ("shift-jis", "日本語"),
        ("cp1250", "biały"),
        ("cp1250", "książka"),
        ("cp1250", "poľana"),
    ):
        path = written(tmp_path, f"{encoding}.csv", f"n,t\n1,{word}\n".encode(encoding))
        with pytest.raises(LifecycleError, match=r"line 2 is not UTF-8: save the file as UTF-8"):
            read_table(path)


LINE = {
    "number": 1, "hash": 2**64 - 1, "huge": 2**70, "mixed": 1, "list": ["a", 1], "object": {"site": 1},
    "yes": True,
}  # fmt: skip
UNUSABLE = {
    "mixed": 'mixes int and str: row 2 holds "A"', "list": "mixed lists or objects",
    "object": "mixed lists or objects", "yes": "mixes bool and int: row 2 holds 0",
}  # fmt: skip


def test_only_columns_that_are_used_are_judged(tmp_path: Path) -> None:
    """Mixed, nested and huge values in columns that nobody asks for stop nothing; a used one is named."""
    other = LINE | {"mixed": "A", "object": {"site": "x"}, "list": [2], "yes": 0}
    path = written(tmp_path, "rows.jsonl", f"{json.dumps(LINE)}\n{json.dumps(other)}\n")
    assert read_table(path, columns=["number"]).column("number").to_pylist() == [1, 1]
    assert read_table(path, columns=["hash", "huge"]).column("hash").to_pylist() == [2.0**64, 2.0**64]
    for name, why in UNUSABLE.items():
        with pytest.raises(LifecycleError, match=rf"^rows.jsonl: column '{name}' .*{why}"):
            read_table(path, columns=[name])


def test_a_column_of_two_types_far_apart_is_named(tmp_path: Path) -> None:
    """Numbers in the first 20,000 rows and text after them are one unusable column, and the rest is read."""
    lines = [json.dumps({"n": row, "m": row if row < 20_000 else "x"}) for row in range(20_001)]
    path = written(tmp_path, "rows.jsonl", "\n".join(lines))
    assert profile(path, quietly).columns["m"].unusable
    assert read_table(path, columns=["n"]).column_names == ["n"]


def test_what_pandas_writes_as_parquet_is_read(tmp_path: Path) -> None:
    """Categories, decimals, 64-bit hashes and an index are read; dates have no like in JSON and are named."""
    frame = pd.DataFrame(
        {
            "category": pd.Categorical(["x", None]),
            "level": pd.Categorical([3, 4]),
            "price": [decimal.Decimal("1.50"), None],
            "hash": pd.Series([2**64 - 1, 1], dtype="uint64"),
            "day": [date(2026, 1, 1)] * 2,
        }
    ).set_index(pd.Index(["a", "b"], name="key"))
    frame.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    assert read_table(path, columns=[]).to_pydict() == {
        "category": ["x", None], "level": [3, 4], "price": [1.5, None], "hash": [2.0**64, 1.0]
    }  # fmt: skip
    with pytest.raises(LifecycleError, match=r"column 'day' is of type date32.*write it as text or numbers"):
        read_table(path, columns=["day"])


@pytest.mark.parametrize("labels", [[0, 1], ["0", "1"], [False, True]])
def test_a_target_of_0_and_1_is_the_same_from_every_format(labels: list[Any], tmp_path: Path) -> None:
    """0.0 in CSV, in Parquet and in JSON lines is the label that it was fitted as."""
    frame = pd.DataFrame({"y": [0.0, 1.0, 1.0]})
    if isinstance(labels[0], str):
        frame = frame.astype(int)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    for path in tmp_path.iterdir():
        column = read_table(path, contract_types("y", labels), ["y"]).column("y").to_pylist()
        assert truths(column, labels, path.name, "y").tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.csv.gz", b"no gzip", "Not a gzipped file"),
        ("rows.csv.gz", gzip.compress(b"a" * 1000, mtime=0)[:20], "Compressed file ended"),
        ("rows.csv.bz2", b"no bzip2", "Invalid data stream"),
        ("rows.csv.xz", b"no xz", "Input format not supported"),
        ("rows.csv.zst", b"no zstandard", "rows.csv.zst: "),
        ("rows.csv.zip", b"no zip", "File is not a zip file"),
        ("rows.csv.zip", zipped(a="1", b="2"), "holds 2 files"),
        ("rows.parquet", b"PAR1", "cannot be read as .parquet"),
        ("rows.arrow", b"no arrow", "cannot be read as .arrow"),
        ("rows.json", b'{"a": {"0": 1}}', "column 'a' is of type struct"),
        ("rows.jsonl", b"[[[[", "line 1 is not JSON"),
        ("rows.csv", b"\xff\xfe\x00", "cannot be read as .csv"),
        ("rows.csv", b"\n\n", "has no rows"),
        ("rows.csv", b'a,b\n1,"x' + b"x" * 5_000_000, "a quote is opened and never closed"),
        ("rows.csv", b'a,b\n1,"x\n2,y\n', "a quote is opened and never closed"),
        ("rows.exe", b"x", "takes .csv"),
        ("rows.gz", b"x", "takes .csv"),
    ],
)
def test_a_file_that_is_broken_is_refused_in_one_line(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    """Whatever the bytes are, the reason is one short line that begins with the file's name."""
    with pytest.raises(LifecycleError) as refused:
        read_table(written(tmp_path, name, content))
    line = str(refused.value)
    assert line.startswith(f"{name}: ")
    assert said in line
    assert "\n" not in line
    assert len(line) <= 300


def test_a_sheet_is_read_where_openpyxl_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sheet is what pandas makes of it; without openpyxl the line says what to install."""
    frame = pd.DataFrame({"n": [1, 2], "t": ["a", None], "m": [1, "x"]})
    monkeypatch.setattr("lifecycle.formats.find_spec", lambda name: importlib.util.find_spec("json"))
    monkeypatch.setattr(pd, "read_excel", lambda path, dtype: frame.astype(object))
    path = written(tmp_path, "rows.xlsx", "x")
    assert read_table(path, columns=["n"]).to_pydict() == {"n": [1, 2], "t": ["a", None]}
    with pytest.raises(LifecycleError, match="column 'm' mixes int and str"):
        read_table(path)
    monkeypatch.setattr("lifecycle.formats.find_spec", lambda name: None)
    with pytest.raises(LifecycleError, match="unless openpyxl is installed"):
        read_table(path)


TEXT = strategies.text("abz #;,|\t\"\n'1.5-é0+eE", max_size=8)
CELLS = [
    strategies.integers(-(2**63), 2**63 - 1), strategies.integers(-9, 9), strategies.booleans(), TEXT,
    strategies.floats(allow_nan=False, allow_infinity=False), strategies.none() | TEXT,
    strategies.none() | strategies.integers(0, 9), strategies.integers(0, 9).map(str) | TEXT,
]  # fmt: skip


def comparable(column: list[Any]) -> list[Any]:
    """Values without the difference of integers and floats, missing ones as None."""
    numbers = [
        float(one) if isinstance(one, int | float) and not isinstance(one, bool) else one for one in column
    ]
    return [None if isinstance(one, float) and math.isnan(one) else one for one in numbers]


@given(strategies.data(), strategies.integers(1, 6), strategies.sampled_from(",;\t|"))
def test_any_table_is_read_as_pandas_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: strategies.DataObject, rows: int, separator: str
) -> None:
    """Quotes, line breaks, separators and hash signs within values, gaps, numbers of any size."""
    kinds = data.draw(strategies.lists(strategies.sampled_from(CELLS), min_size=2, max_size=4))
    cells = [data.draw(strategies.lists(kind, min_size=rows, max_size=rows)) for kind in kinds]
    frame = pd.DataFrame({f"c{index}": pd.Series(one, dtype=object) for index, one in enumerate(cells)})
    path = tmp_path_factory.mktemp("any") / "rows.csv"
    frame.to_csv(path, sep=separator, index=False)
    expected, found = pd.read_csv(path, sep=separator), read_table(path).to_pydict()
    assert {name: comparable(found[name]) for name in found} == {
        name: comparable(expected[name].tolist()) for name in expected
    }
