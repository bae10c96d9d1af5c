"""Importing a model: what a data file is taken for, the contract written from it, and all or nothing."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from app.schemas.contract import contract_inputs, contract_outputs
from lifecycle.command import LifecycleError
from lifecycle.importing import assemble
from lifecycle.importing.contract_writer import Feature, field_names, formatted, source
from lifecycle.importing.importer import parsed_bounds
from lifecycle.importing.steps import WORK, alone, apply, recover, run
from lifecycle.tables import SAMPLE_ROWS, Column, Table, profile, read_sample, read_table, sample
from tests.service.where import ROOT


def quietly(_: int) -> None:
    """Say nothing of progress."""


def table(path: Path, text: str) -> Table:
    """The profile of a file with this text."""
    path.write_text(text, "utf-8")
    return profile(path, quietly)


def described(column: Column) -> tuple[Any, ...]:
    """Type, whether values are missing, and range."""
    return column.dtype, column.nullable, column.low, column.high


def refusal(path: Path, text: str) -> str:
    """The line that says why a file is not taken."""
    path.write_text(text, "utf-8")
    with pytest.raises(LifecycleError) as refused:
        read_table(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_types_are_those_of_all_rows(tmp_path: Path) -> None:
    """One value near the end of a large file makes its column a float, text, or one with missing values."""
    rows = [f"{row},{row},{row},True,{row}.5,word" for row in range(400_000)]
    rows[-7] = "0.5,,x,False,-1e3,"
    found = table(tmp_path / "train.csv", "\n".join(["a,b,c,d,e,f", *rows])).columns
    assert described(found["a"]) == ("float64", False, 0, 399_999)
    assert described(found["b"]) == ("int64", True, 0, 399_999)
    assert found["c"].dtype == "string"
    assert described(found["d"])[:2] == ("bool", False)
    assert described(found["e"]) == ("float64", False, -1000, 399_999.5)
    assert described(found["f"])[:2] == ("string", True)


def test_missing_is_what_pandas_takes_for_it(tmp_path: Path) -> None:
    """NA, NaN, null, None and nothing at all are missing values in CSV, in text as in numbers."""
    found = table(tmp_path / "train.csv", "n;t\n1;a\nNA;NaN\nnull;None\n;b\n").columns
    assert described(found["n"]) == ("int64", True, 1, 1)
    assert (found["t"].dtype, found["t"].present) == ("string", 2)


def test_formats_agree(tmp_path: Path) -> None:
    """The same rows as CSV, Parquet, Arrow and JSON lines have the same types, ranges and sample."""
    columns = {
        "whole": [1, 2, None],
        "number": [0.5, 1.0, 2.5],
        "yes": [True, False, True],
        "t": ["é", "b", "b"],
    }
    rows = pa.table(columns)
    pa.parquet.write_table(rows, tmp_path / "train.parquet")
    with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    lines = [{name: value for name, value in row.items() if value is not None} for row in rows.to_pylist()]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (tmp_path / "train.csv").write_text(
        "whole,number,yes,t\n1,0.5,True,é\n2,1,False,b\n,2.5,True,b\n", "utf-8"
    )
    for path in sorted(tmp_path.iterdir()):
        found = profile(path, quietly)
        assert {name: described(column)[:2] for name, column in found.columns.items()} == {
            "whole": ("int64", True),
            "number": ("float64", False),
            "yes": ("bool", False),
            "t": ("string", False),
        }
        target = path.with_suffix(".sample")
        assert sample(found, target, quietly) == 3
        assert read_sample(target).to_pydict() == columns
        assert found.columns["t"].counts == {"b": 2, "é": 1}
        target.unlink()


def test_a_long_file_is_compared_on_a_sample(tmp_path: Path) -> None:
    """Beyond 200,000 rows the sample has exactly so many, the same ones each time, in their order."""
    rows = pa.table({"row": np.arange(SAMPLE_ROWS + 50_000)})
    pa.parquet.write_table(rows, tmp_path / "train.parquet")
    found = profile(tmp_path / "train.parquet", quietly)
    taken = []
    for name in ("one", "two"):
        assert sample(found, tmp_path / name, quietly) == SAMPLE_ROWS
        taken.append(read_sample(tmp_path / name).column("row").to_numpy())
    assert (taken[0] == taken[1]).all()
    assert (np.diff(taken[0]) > 0).all()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("train.csv", "", "is empty"),
        ("train.csv", "a,b\n", "has no rows"),
        ("train.csv", "a,b,a\n1,2,3\n", "2 columns are called 'a'"),
        ("train.csv", "a,b\n1\n", "Expected 2 columns, got 1"),
        ("train.csv", "a\ninf\n", "holds infinity"),
        ("train.jsonl", '{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("train.jsonl", '{"a": 1}\n{"a": "x"}\n', "mixes int and str"),
        ("train.xlsx", "a", " .xlsx"),  # not taken without openpyxl, and no sheet with it
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    """The line says what is wrong with the file, and quotes no value of it."""
    line = refusal(tmp_path / name, text)
    assert said in line
    assert name in line


def test_names_that_no_field_can_have_get_another(tmp_path: Path) -> None:
    """Spaces, keywords, digits, and what a model or the module itself uses are changed; others are kept."""
    names = [
        "age",
        "größe",
        "sepal length (cm)",
        "class",
        "1st",
        "copy",
        "float",
        "_x",
        "x",
        "model_kind",
        "💰",
    ]
    assert field_names(names) == [
        "age", "größe", "sepal_length_cm", "class_", "column_1st", "copy_", "float_", "x_2", "x",
        "model_kind_", "column_11",
    ]  # fmt: skip


def written(features: Sequence[Feature], labels: Sequence[Any], example: dict[str, Any]) -> ModuleType:
    """The generated contract, imported."""
    text = source(features, labels, [example], "target")
    assert formatted(text) == text
    module = ModuleType("written_contract")
    sys.modules[module.__name__] = module
    exec(compile(text, "predict.py", "exec"), module.__dict__)  # noqa: S102  # what was just written
    return module


FEATURES = [
    Feature("plain", "float64", nullable=False),
    Feature('with a "quote" and \\', "int64", nullable=True, minimum=0, maximum=120, unit="a"),
    Feature("kind", "string", nullable=True, categories=["a", 'b"', "ü"]),
    Feature("free text", "string", nullable=False, title="Text", description="Whatever."),
    Feature("yes", "bool", nullable=False),
]
EXAMPLE = {FEATURES[0].name: 1.5, FEATURES[1].name: None, "kind": 'b"', "free text": "x", "yes": True}


@pytest.mark.parametrize("labels", [["a", "b"], [0, 1, 2], [False, True], []])
def test_the_written_contract_is_what_was_inferred(labels: list[Any]) -> None:
    """Types, missing values, categories, bounds, words, labels and task are read back as they were found."""
    module = written(FEATURES, labels, EXAMPLE)
    keys = ("name", "dtype", "nullable", "categories", "unit", "minimum", "maximum")
    assert [{key: entry[key] for key in keys} for entry in contract_inputs(module.Features)] == [
        {key: getattr(feature, key) for key in keys} for feature in FEATURES
    ]
    fields = module.Features.model_fields.values()
    assert [(field.title or "", field.description or "") for field in fields] == [
        (feature.title, feature.description) for feature in FEATURES
    ]
    task = "classification" if labels else "regression"
    assert contract_outputs(module.Prediction) == {"task": task, "labels": labels}
    assert list(module.Features.model_validate(EXAMPLE).__dict__.values()) == list(EXAMPLE.values())


@pytest.mark.parametrize("change", [{"plain": True}, {"kind": "c"}, {FEATURES[1].name: 121}, {"yes": None}])
def test_the_written_contract_refuses_what_training_never_saw(change: dict[str, Any]) -> None:
    """Another type, an unknown category, a value out of bounds and an unexpected null are invalid."""
    with pytest.raises(ValueError, match=r"Input should|valid"):
        written(FEATURES, ["a", "b"], EXAMPLE).Features.model_validate(EXAMPLE | change)


def test_bounds_are_read_from_the_command_line() -> None:
    """Either side may be left out, and a name may hold an equals sign."""
    assert parsed_bounds(["age=0:120", "a=b=:1.5"]) == {"age": (0, 120), "a=b": (None, 1.5)}
    for text in ("age", "age=1", "=0:1", "age=a:b"):
        with pytest.raises(LifecycleError, match="name=least:greatest"):
            parsed_bounds([text])


def test_thresholds_of_a_new_contract_ask_for_more_than_one_answer_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A classifier has to beat the commonest label, a regressor the mean; what was of old columns is gone."""
    text = (ROOT / "evaluation" / "thresholds.toml").read_text("utf-8")
    text += '\n[[slices]]\ncolumn = "an old column"\nrmse = 7\n'
    for labels, truths, section, wanted in (
        (["a", "b"], ["a", "b", "b"], "classification", {"accuracy": 0.666, "auc": 0.5}),
        ([], [-1.0, None, 1.0], "regression", {"rmse": 1.0}),
    ):
        monkeypatch.setattr(assemble, "labels", lambda labels=labels: labels)
        found = tomllib.loads(assemble.thresholds(text, "é", pa.array(truths)))
        assert wanted.items() <= found[section].items()
        assert found["slices"] == [{"column": "target", "minimum_rows": 5}]


@pytest.fixture
def half_made(tmp_path: Path) -> Path:
    """A repository with an import whose files are ready to be moved."""
    for path, text in {
        "kept": "old",
        f"{WORK}/repository/kept": "new",
        f"{WORK}/repository/v2/made": "new",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, "utf-8")
    return tmp_path


CHANGES = [Path("kept"), Path("v2/made")]


def test_an_import_moves_all_its_files(half_made: Path) -> None:
    """After an import every file stands in its place."""
    apply(half_made, half_made / WORK, CHANGES)
    assert [(half_made / path).read_text("utf-8") for path in CHANGES] == ["new", "new"]


def test_an_import_that_fails_while_moving_is_undone(half_made: Path) -> None:
    """When a file cannot be moved, those moved before are put back and new folders are gone."""
    (half_made / "v3").write_text("a file where a folder has to be", "utf-8")
    with pytest.raises(OSError, match="v3"):
        apply(half_made, half_made / WORK, [*CHANGES, Path("v3/made")])
    assert sorted(path.name for path in half_made.iterdir()) == ["kept", "v3"]
    assert (half_made / "kept").read_text("utf-8") == "old"


def test_an_import_that_was_killed_is_undone_by_the_next(half_made: Path) -> None:
    """What a killed import had begun to move is as before when the next one starts."""
    work = half_made / WORK
    (work / "backup").mkdir()
    (half_made / "kept").rename(work / "backup" / "kept")
    (work / "journal.json").write_text(json.dumps({"kept": True, "v2/made": False}), "utf-8")
    (half_made / "v2").mkdir()
    for path in CHANGES:
        (work / "repository" / path).rename(half_made / path)
    recover(half_made)
    assert [path.name for path in half_made.iterdir()] == ["kept"]
    assert (half_made / "kept").read_text("utf-8") == "old"


def test_an_import_that_is_stopped_while_moving_is_undone(half_made: Path) -> None:
    """Ctrl-C, even twice, between two files leaves everything as it was."""

    class Stopping(list[Path]):
        """Changes, with Ctrl-C pressed each time one was looked at."""

        def __iter__(self) -> Iterator[Path]:
            for path in super().__iter__():
                yield path
                if (half_made / WORK / "journal.json").is_file():
                    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        apply(half_made, half_made / WORK, Stopping(CHANGES))
    assert [path.name for path in half_made.iterdir()] == ["kept"]
    assert (half_made / "kept").read_text("utf-8") == "old"


def test_an_undone_import_can_be_undone_again(half_made: Path) -> None:
    """An undoing that was itself stopped half-way, with a file back in its place, is finished by the next."""
    work = half_made / WORK
    (work / "journal.json").write_text(json.dumps({"kept": True, "v2/made": False}), "utf-8")
    (work / "repository" / "kept").unlink()  # had been moved, and what was there has come back
    recover(half_made)
    assert [path.name for path in half_made.iterdir()] == ["kept"]
    assert (half_made / "kept").read_text("utf-8") == "old"


def test_two_imports_at_once_are_refused(tmp_path: Path) -> None:
    """The second import in a service says that another is at work; when that has ended it may begin."""
    (tmp_path / "pyproject.toml").write_bytes(b"")
    with alone(tmp_path), pytest.raises(LifecycleError, match="another import is at work"), alone(tmp_path):
        raise AssertionError("both are at work")
    with alone(tmp_path):
        pass


def test_ctrl_c_amid_the_start_of_a_step_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step that Ctrl-C meets while it is being started ends with the import."""
    started = []

    def begin(_command: list[str], **options: Any) -> Any:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", begin)
    with pytest.raises(KeyboardInterrupt):
        run("convert", tmp_path)
    assert started[0].poll() is not None
