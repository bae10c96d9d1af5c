"""Gates of a release: each can fail, and what fails is refused in one line, with nothing changed on disk."""

import csv
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from app.core.pipeline import Pipeline
from app.core.runtimes import load_runtime
from app.core.store import read_artifact
from app.schemas.contract import contract_inputs, contract_outputs
from lifecycle.__main__ import MODULES, commands
from lifecycle.command import LifecycleError, sha256
from lifecycle.operations.documents import DOCUMENTS, documents
from lifecycle.release import evaluate, promote, rollback
from lifecycle.release.evaluation import Answers, Data, Thresholds, ask, judge, measure, parts, slices
from lifecycle.release.promotion import CHECKLIST, parse
from lifecycle.tables import instances, read_table, spelling, truths, typed
from tests.service.conftest import ARTIFACTS, SERVED, golden_set
from tests.service.integration.test_artifacts import edit, flip, rewrite

ROOT = ARTIFACTS.parent
CLASSES = ["no", "yes"]
# Of rows that are sure, right, and a tie: every metric of a classifier but the one tested is well.
TRUTHS, SURE = np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
VALUES = np.array([1.0, 2.0, 3.0, 4.0])
OWN = """
[data]
file = "rows.jsonl"
target = "truth"
[classification]
accuracy = 0.9
[regression]
r2 = 0.5
[against_served]
accuracy = 0.1
rmse = 0.1
[[slices]]
column = "target"
accuracy = 0.5
"""


def table(
    conditions: dict[str, Any], true: Any, values: Any, served: Any = None, **columns: list[Any]
) -> dict[str, bool]:
    """Which gates rows with these truths and answers pass."""
    true, values = np.asarray(true), np.asarray(values, float)
    labels = CLASSES if values.ndim == 2 else []
    cells = {"truth": [labels[one] if labels else one for one in true], **columns}
    data = Data("rows.csv", "0" * 64, "truth", pa.table(cells), true, labels)
    missing = int(np.isnan(values.reshape(len(values), -1)).any(axis=1).sum())
    answers = Answers(values, 0.0, Counter({"model_error": missing} if missing else {}))
    theirs = None if served is None else ("v1", measure(true, np.asarray(served, float), labels))
    wanted = Thresholds.model_validate(conditions)
    found = measure(true[answers.known], values[answers.known], labels)
    cut = slices(wanted, data, answers, None)
    return {one.name: one.passed for one in judge(wanted, data, answers, found, cut, theirs)}


UNSURE = np.array([[0.55, 0.45], [0.55, 0.45], [0.45, 0.55], [0.45, 0.55]])
ONE_WRONG = np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
TURNED = SURE[:, ::-1]


@pytest.mark.parametrize(
    ("conditions", "gate", "good", "bad"),
    [
        ({"classification": {"accuracy": 0.8}}, "accuracy", SURE, ONE_WRONG),
        ({"classification": {"auc": 0.9}}, "auc", SURE, ONE_WRONG),
        ({"classification": {"calibration": 0.2}}, "calibration", SURE, UNSURE),
        ({"regression": {"rmse": 0.5}}, "rmse", VALUES + 0.4, VALUES + 0.6),
        ({"regression": {"mae": 0.5}}, "mae", VALUES - 0.4, VALUES - 0.6),
        ({"regression": {"r2": 0.9}}, "r2", VALUES, VALUES[::-1]),
        ({"data": {"minimum_rows": 4}}, "rows", SURE, SURE[:3]),
        ({}, "answered rows", SURE, np.vstack([SURE[:3], [[math.nan, 0.1]]])),
        ({"slices": [{"column": "truth", "accuracy": 0.6}]}, "accuracy where truth is no", SURE, ONE_WRONG),
        (
            {"slices": [{"column": "truth", "mae": 1, "edges": [2]}]},
            "mae where truth is (2, inf]", VALUES, -VALUES,
        ),
        (
            {"slices": [{"column": "target", "accuracy": {"no": 0.6, "yes": 0.1}}]},
            "accuracy where target is no", SURE, ONE_WRONG,
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_each_gate_can_fail(conditions: dict[str, Any], gate: str, good: Any, bad: Any) -> None:
    """A threshold lets a version through that reaches it, and stops one that does not, by its own gate."""
    true = TRUTHS if good.ndim == 2 else VALUES
    assert table(conditions, true[: len(good)], good)[gate] is True
    assert table(conditions, true[: len(bad)], bad)[gate] is False


@pytest.mark.parametrize(
    ("metric", "worse", "served", "good", "bad"),
    [
        ("accuracy", 0.25, SURE, ONE_WRONG, TURNED),
        ("auc", 0.5, SURE, ONE_WRONG, TURNED),
        ("calibration", 0.2, SURE, SURE, UNSURE),
        ("rmse", 0.1, VALUES + 1, VALUES + 1.1, VALUES + 1.2),
        ("mae", 0.1, VALUES - 1, VALUES - 1.1, VALUES - 1.2),
        ("r2", 0.1, VALUES, VALUES + 0.1, VALUES + 1),
    ],
)
def test_a_version_may_be_no_worse_than_the_one_that_serves(
    metric: str, worse: float, served: Any, good: Any, bad: Any
) -> None:
    """On the same rows a version may lose to the served one as much as is allowed, errors by their share."""
    true, conditions = TRUTHS if good.ndim == 2 else VALUES, {"against_served": {metric: worse}}
    assert table(conditions, true, good, served)[f"{metric} against v1"] is True
    assert table(conditions, true, bad, served)[f"{metric} against v1"] is False


def test_what_cannot_be_measured_does_not_pass() -> None:
    """AUC of rows with one label, r2 of one value, a part without rows: none lets a version through."""
    assert table({"classification": {"auc": 0.1}}, [0, 0], SURE[:2])["auc"] is False
    assert table({"regression": {"r2": 0.1}}, [1.0], [1.0])["r2"] is False
    named = {"slices": [{"column": "truth", "accuracy": {"maybe": 0.5}}]}
    assert table(named, TRUTHS, SURE)["accuracy where truth is maybe"] is False


def test_small_parts_are_not_judged() -> None:
    """A part with fewer rows than `minimum_rows` is shown and decides nothing."""
    one = {"column": "region", "accuracy": 1.0, "minimum_rows": 2}
    found = table({"slices": [one]}, TRUTHS, ONE_WRONG, region=["north", "south", "north", "north"])
    assert found["accuracy where region is north"] is True
    assert "accuracy where region is south" not in found


def test_metrics_are_those_of_the_books() -> None:
    """A classifier's metrics of four rows and a regressor's of three are those worked out by hand."""
    found = measure(
        np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]), CLASSES
    )
    assert found == pytest.approx(
        {
            "accuracy": 0.75,
            "auc": 0.75,
            "calibration": (0.1 + 2 * 0.125 + 0.2) / 4,
            "brier": 2 * (0.01 + 0.16 + 0.4225 + 0.04) / 4,
        }
    )
    found = measure(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 6.0]), [])
    assert found == pytest.approx({"rmse": math.sqrt(3), "mae": 1, "bias": 1, "r2": -3.5})


def test_auc_averages_the_labels_that_rows_have() -> None:
    """With three labels AUC is the mean of each against the rest; one without rows is left out."""
    values = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.5, 0.4, 0.1]])
    assert measure(np.array([0, 1, 1]), values, ["a", "b", "c"])["auc"] == pytest.approx(1)
    assert measure(np.array([0, 0, 1]), values, ["a", "b", "c"])["auc"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("labels", "column"),
    [
        (["b", "a"], ["a", " a", "b"]),
        ([0, 1], ["1", 1, "0"]),
        ([0, 1], [1.0, 1, 0.0]),
        ([False, True], ["True", True, "false"]),
        ([False, True], [1, "1", 0]),
    ],
)
def test_truths_are_read_as_files_write_them(labels: list[Any], column: list[Any]) -> None:
    """Labels of any JSON type are known again in text, in whole floats and in Python's spelling."""
    assert truths(column, labels, "rows.csv", "truth").tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("labels", "value"), [(["a"], "c"), (["a"], None), (["a"], math.nan), ([1], "x"), ([], "x"), ([], "")]
)
def test_a_row_without_truth_is_named(labels: list[Any], value: Any) -> None:
    """A truth that is missing, or none of the model's, stops the evaluation with the number of its row."""
    first = labels[0] if labels else 1.0
    with pytest.raises(LifecycleError, match=r"^rows.csv: row 2: 'truth' is "):
        truths([first, value], labels, "rows.csv", "truth")


@pytest.mark.parametrize(
    ("dtype", "more", "value", "taken"),
    [
        ("float64", {}, "1.5", 1.5),
        ("float64", {}, 2, 2),
        ("float64", {}, math.nan, None),
        ("int64", {}, "7", 7),
        ("int64", {}, 7.0, 7),
        ("int64", {}, "7.5", "7.5"),
        ("bool", {}, "True", True),
        ("bool", {}, "0", False),
        ("string", {}, "x", "x"),
        ("string", {"categories": ["x", "y"]}, "y", "y"),
        ("int64", {"categories": [1, 2]}, "2", 2),
        ("string", {}, None, None),
    ],
)
def test_values_are_taken_as_the_contract_takes_them(
    dtype: str, more: dict[str, Any], value: Any, taken: Any
) -> None:
    """Text becomes the type of its column, NaN a missing value; what fits no type is left to be refused."""
    found = typed({"dtype": dtype, "nullable": True, "categories": None, **more}, value)
    assert (found, type(found)) == (taken, type(taken))


def test_columns_are_cut_by_value_by_edges_or_by_quartiles() -> None:
    """A column gives a part for each value, for each bin where it has many, and one for what is missing."""

    def sizes(column: list[Any], edges: list[float] | None = None) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in parts(column, edges).items()}

    assert sizes(["a", "b", "a", None]) == {"a": 2, "b": 1, "missing": 1}
    assert sizes([True, False, True]) == {"true": 2, "false": 1}
    assert sizes(["1", "2", "30", ""], [2]) == {"(-inf, 2]": 2, "(2, inf]": 1, "missing": 1}
    assert sorted(sizes([float(one) for one in range(100)]).values()) == [25, 25, 25, 25]


def test_a_row_that_the_model_fails_on_fails_alone() -> None:
    """Rows without an answer are counted by error code, and cost the others nothing."""
    artifact = read_artifact(ARTIFACTS, "v0")
    rows = golden_set("v0")[:5]
    inner = load_runtime(artifact)

    class Poisoned:
        """Raises for the third row."""

        dtype = getattr(inner, "dtype", None)

        def infer(self, matrix: Any) -> list[list[float]]:
            if poison in matrix.tolist():
                raise ValueError
            return inner.infer(matrix)

    poison: Any = object()
    pipeline = Pipeline.offline(artifact, runtime=Poisoned())
    file = [dict(row["features"], truth=truth(row)) for row in rows]
    data = data_of(file)
    poison = pipeline.model.run(
        [tuple(next(instances(data.table, "rows"))[2].__dict__.values())]
    ).matrix.tolist()[0]
    same = [one["features"] == rows[2]["features"] for one in rows]
    found = ask(pipeline, data)
    assert found.known.tolist() == [not one for one in same]
    assert found.failures == Counter(model_error=sum(same))


def truth(row: dict[str, Any]) -> Any:
    """What a golden row was answered."""
    return row["label"] if "label" in row else row["value"]


def data_of(rows: list[dict[str, Any]]) -> Data:
    """Rows as evaluation has them."""
    labels = contract_outputs()["labels"]
    known = truths([row["truth"] for row in rows], labels, "rows", "truth")
    table = pa.Table.from_pylist(rows)
    return Data("rows", "0" * 64, "truth", table, known, [spelling(one) for one in labels])


def contents(root: Path) -> dict[str, bytes]:
    """Every file with its bytes, git's too; but no reports, and nothing that git forgets."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    left = ("build/", ".git/objects/")
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(left)}


def git(root: Path, *arguments: str) -> str:
    """What git answers."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def unevaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A service's folder under git: v1 serves, v2 and v3 are the same model, golden rows are the truth."""
    root = tmp_path_factory.mktemp("promotion") / "service"
    shutil.copytree(ARTIFACTS / "v0", root / "artifacts" / "v0")
    for version in ("v1", "v2", "v3"):
        folder = Path(shutil.copytree(ARTIFACTS / SERVED, root / "artifacts" / version))
        document("manifest.json", version=version)(folder)
    release = {"serving": "v1", "previous": "v0", "shadow": None, "canary": None, "canary_percent": 0}
    (root / "artifacts" / "release.json").write_text(json.dumps(release), "utf-8")
    (root / "evaluation").mkdir()
    (root / CONDITIONS).write_text(OWN, "utf-8")
    golden = [json.dumps({**row["features"], "truth": truth(row)}) + "\n" for row in golden_set(SERVED)]
    (root / ROWS).write_text("".join(golden), "utf-8")
    (root / "docs").mkdir()
    for name in ("CHANGELOG.md", "docs/model_card.md", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    git(root, "init", "--quiet")
    for setting in ("user.name=somebody", "user.email=somebody@example.com"):
        git(root, "config", *setting.split("="))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=before")
    return root


@pytest.fixture
def place(unevaluated: Path, tmp_path: Path) -> Path:
    """A folder like it of one's own."""
    return Path(shutil.copytree(unevaluated, tmp_path / "service"))


@pytest.fixture(scope="module")
def with_verdict(unevaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, v2 evaluated."""
    root = Path(shutil.copytree(unevaluated, tmp_path_factory.mktemp("evaluated") / "service"))
    evaluate("v2", root=root)
    return root


@pytest.fixture
def evaluated(with_verdict: Path, tmp_path: Path) -> Path:
    """A folder like it of one's own."""
    return Path(shutil.copytree(with_verdict, tmp_path / "service"))


def run(command: str, *given: str, root: Path) -> Result:
    """What `python -m lifecycle COMMAND` gives."""
    return CliRunner().invoke(commands, [command, *given, "--root", str(root)])


def refused(command: str, *given: str, root: Path) -> str:
    """The one line with which a command refuses."""
    done = run(command, *given, root=root)
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 1
    return line


def test_an_evaluation_leaves_a_verdict_and_a_report_with_pictures(place: Path) -> None:
    """The verdict names bytes, thresholds and rows; a second evaluation writes the same; pictures are PNG."""
    evaluate("v2", root=place)
    first = (place / "evaluation" / "v2.json").read_bytes()
    verdict = json.loads(first)
    assert (verdict["passed"], verdict["failed"], verdict["served"]) == (True, [], "v1")
    assert verdict["data"]["file"] == "evaluation/rows.jsonl"
    assert verdict["metrics"] == verdict["served_metrics"]
    folder = place / "build" / "evaluation-v2"
    report = (folder / "report.md").read_text("utf-8")
    shown = [line[2:].partition("]")[0] for line in report.splitlines() if line.startswith("![")]
    assert report.startswith("# Evaluation of v2: passed")
    assert {path.name for path in folder.glob("*.png")} == set(shown)
    assert len(shown) == 2
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    evaluate("v2", root=place)
    assert (place / "evaluation" / "v2.json").read_bytes() == first


def test_a_version_that_fails_says_which_gates(place: Path) -> None:
    """A failed gate is a line and the exit code, stands in the verdict, and keeps a version from serving."""
    edit_text(place / "evaluation" / "thresholds.toml", "[data]", "[data]\nminimum_rows = 100000")
    rows = len(golden_set(SERVED))
    line = refused("evaluate", "v2", root=place)
    assert line == f"evaluate: v2: rows: {rows}, needed: at least 100000"
    assert json.loads((place / "evaluation" / "v2.json").read_bytes())["passed"] is False
    assert (place / "build" / "evaluation-v2" / "report.md").read_text("utf-8").count("**FAILED**") == 1
    git(place, "commit", "--quiet", "--all", "--message=stricter")
    before = contents(place)
    assert refused("promote", "v2", root=place).startswith("promote: v2 failed its evaluation: rows: ")
    assert contents(place) == before


def test_other_answers_than_recorded_fail(place: Path) -> None:
    """A version whose golden set has other answers than it gives fails, however good it is."""
    lines = [json.loads(line) for line in (place / "artifacts/v2/golden.jsonl").read_bytes().splitlines()]
    for line in lines:
        if "value" in line:
            line["value"] += 1
        else:
            line["probabilities"] = {label: 1 - one for label, one in line["probabilities"].items()}
    rewrite(
        place / "artifacts" / "v2",
        "golden.jsonl",
        b"".join(json.dumps(one).encode() + b"\n" for one in lines),
    )
    assert "golden set: v2/golden.jsonl: line 1 has another answer" in refused("evaluate", "v2", root=place)


def test_the_rows_of_training_prove_nothing(place: Path) -> None:
    """The very file that a version was trained on is refused, unless thresholds.toml accepts it."""
    own = sha256(place / "evaluation" / "rows.jsonl")
    edit(place / "artifacts/v2/manifest.json", lambda manifest: manifest["training"].update(data_sha256=own))
    assert "other rows than in training" in refused("evaluate", "v2", root=place)
    edit_text(place / "evaluation" / "thresholds.toml", "[data]", '[data]\ntraining_rows = "accept"')
    assert not evaluate("v2", root=place).failed


def edit_text(path: Path, old: str, new: str) -> None:
    """Change a text file in place."""
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


FIRST = contract_inputs()[0]["name"]
ROWS, CONDITIONS = "evaluation/rows.jsonl", "evaluation/thresholds.toml"
V2 = "artifacts/v2/manifest.json"
Spoil = Callable[[Path], object]


def untouched(_: Path) -> None:
    """Spoil nothing."""


def damaged(name: str) -> Spoil:
    """One bit of a file changed."""
    return lambda place: flip(place / name)


def written(name: str, content: str) -> Spoil:
    """A file with other content."""
    return lambda place: (place / name).write_text(content, "utf-8")


def text(name: str, old: str, new: str) -> Spoil:
    """Words of a file changed."""
    return lambda place: edit_text(place / name, old, new)


def document(name: str, **changes: Any) -> Spoil:
    """Entries of a JSON file changed."""
    return lambda place: edit(place / name, lambda now: now.update(changes))


def rows(change: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    """The rows of the evaluation changed."""

    def spoil(place: Path) -> None:
        found = [json.loads(line) for line in (place / ROWS).read_text("utf-8").splitlines()]
        change(found)
        (place / ROWS).write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "version", "reason"),
    [
        (untouched, "v9", "v9: there is no such version"),
        (untouched, "latest", "is not a version name"),
        (damaged("artifacts/v2/model.onnx"), "v2", "v2/model.onnx: sha256 differs"),
        (written("artifacts/release.json", "{"), "v2", "release.json: "),
        (lambda place: (place / ROWS).unlink(), "v2", "or keep such rows as evaluation/rows.jsonl"),
        (written(ROWS, ""), "v2", "rows.jsonl: "),
        (written(ROWS, "[1]\n"), "v2", "rows.jsonl: "),
        (rows(lambda all_: [row.pop("truth") for row in all_]), "v2", "no column 'truth'; say which one"),
        (rows(lambda all_: [row.pop(FIRST) for row in all_]), "v2", f"no column {FIRST!r}; say which"),
        (rows(lambda all_: all_[2].update({FIRST: {"no": "value"}})), "v2", "rows.jsonl: "),
        (rows(lambda all_: all_[1].update(truth=None)), "v2", "row 2: 'truth' is missing"),
        (text(CONDITIONS, "accuracy", "acuracy"), "v2", "thresholds.toml: classification.acuracy: "),
        (text(CONDITIONS, "0.9", "90"), "v2", "thresholds.toml: classification.accuracy: "),
        (text(CONDITIONS, "0.9", "nine"), "v2", "thresholds.toml: "),
        (text(CONDITIONS, '"target"', '"region"'), "v2", "no column 'region', which thresholds.toml"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    place: Path,
    spoil: Callable[[Path], object],
    version: str,
    reason: str,
) -> None:
    """Bad input, bad thresholds and bad versions get one line that says where, and no verdict."""
    spoil(place)
    before = contents(place)
    line = refused("evaluate", version, root=place)
    assert line.startswith("evaluate: ")
    assert reason in line
    assert contents(place) == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", "", "is empty"),
        ("rows.csv", "a,b\n", "has no rows"),
        ("rows.csv", "a,a\n1,2\n", "2 columns are called 'a'"),
        ("rows.csv", "a,b\n1,2\n3\n", "Row #3: Expected 2 columns, got 1"),
        ("rows.csv", "a,b\n1,2,3\n", "Row #2: Expected 2 columns, got 3"),
        ("rows.jsonl", "{\n", "rows.jsonl: line 1 is not JSON"),
        ("rows.xlsx", "a", "(not|cannot be read as) .xlsx"),  # without and with openpyxl
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    """Empty files, columns that come twice, and rows of another length are each said in a line."""
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(LifecycleError, match=reason):
        read_table(tmp_path / name)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow", "jsonl"])
def test_rows_from_elsewhere_are_named_without_their_place(place: Path, tmp_path: Path, suffix: str) -> None:
    """DATA and TARGET take another file of any format; the verdict is the same, with no path of a machine."""
    evaluate("v2", root=place)
    verdict = json.loads((place / "evaluation" / "v2.json").read_bytes())
    lines = [json.loads(line) for line in (place / ROWS).read_text("utf-8").splitlines()]
    found = [{"what it was" if name == "truth" else name: row[name] for name in row} for row in lines]
    path = tmp_path / f"other.{suffix}"
    if suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    elif suffix == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(found), path)
    elif suffix == "arrow":
        table = pa.Table.from_pylist(found)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as arrow:
            arrow.write_table(table)
    else:
        path.write_text("\n".join(map(json.dumps, found)), "utf-8")
    evaluate("v2", data=path, target="what it was", root=place)
    other = json.loads((place / "evaluation" / "v2.json").read_bytes())
    assert (other["data"]["file"], other["data"]["target"]) == (path.name, "what it was")
    assert (other["metrics"], other["passed"]) == (verdict["metrics"], True)


def test_a_promotion_is_one_commit_of_its_own_files(evaluated: Path) -> None:
    """Release, changelog, version and verdict are committed together; what else is staged stays staged."""
    (evaluated / "other.txt").write_text("staged by somebody")
    git(evaluated, "add", "other.txt")
    promote("v2", limits="none that\nwe know of", root=evaluated)
    release = json.loads((evaluated / "artifacts" / "release.json").read_bytes())
    assert release == {"serving": "v2", "previous": "v1", "shadow": None, "canary": None, "canary_percent": 0}
    assert git(evaluated, "show", "--name-only", "--format=%f", "HEAD").split() == [
        "Release-model-v2-in-place-of-v1", "CHANGELOG.md", "artifacts/release.json", "evaluation/v2.json",
    ]  # fmt: skip
    assert git(evaluated, "status", "--porcelain") == "A  other.txt\n"
    changelog = (evaluated / "CHANGELOG.md").read_text("utf-8")
    training = json.loads((evaluated / "artifacts" / "v2" / "manifest.json").read_bytes())["training"]
    assert changelog.index("## Model v2, ") < changelog.index("## 0.1.0")
    assert f"data `{training['data_sha256'][:12]}`" in changelog
    assert "- Known limits: none that we know of\n" in changelog
    rollback(root=evaluated)
    release = json.loads((evaluated / "artifacts" / "release.json").read_bytes())
    assert (release["serving"], release["previous"]) == ("v1", "v2")
    assert git(evaluated, "log", "--format=%s").splitlines()[0] == "Roll back to model v1 from v2"
    assert "- Rolled back from `v2`.\n" in (evaluated / "CHANGELOG.md").read_text("utf-8")
    assert git(evaluated, "status", "--porcelain") == "A  other.txt\n"


def test_a_release_ends_shadow_and_canary(evaluated: Path) -> None:
    """Promotion and rollback begin without shadow and canary, whatever the release before had."""
    for command in (partial(promote, "v2"), rollback):
        edit(
            evaluated / "artifacts/release.json",
            lambda now: now.update(shadow="v2", canary="v2", canary_percent=5),
        )
        git(evaluated, "commit", "--quiet", "--all", "--message=trying v2")
        command(root=evaluated)
        release = json.loads((evaluated / "artifacts" / "release.json").read_bytes())
        assert (release["shadow"], release["canary"], release["canary_percent"]) == (None, None, 0)


def test_the_model_card_tells_the_known_limits(place: Path) -> None:
    """Without LIMITS the changelog has those of the model card, or says that none are stated."""
    (place / "docs/model_card.md").write_text(
        "# Card\n\n## Known limits\n- One.\n- Two.\n\n## More\n- Three.\n"
    )
    git(place, "commit", "--quiet", "--all", "--message=card")
    evaluate("v2", root=place)
    promote("v2", root=place)
    assert "- Known limits: One. Two.\n" in (place / "CHANGELOG.md").read_text("utf-8")
    (place / "docs/model_card.md").unlink()
    evaluate("v3", root=place)
    promote("v3", root=place)
    assert "- Known limits: none stated.\n" in (place / "CHANGELOG.md").read_text("utf-8")


def test_without_git_the_files_are_written(evaluated: Path) -> None:
    """Where the folder is in no work tree, promote and rollback write, and say that nothing is committed."""
    shutil.rmtree(evaluated / ".git")
    for command, serving in ((("promote", "v2"), "v2"), (("rollback",), "v1")):
        said = run(*command, root=evaluated).stdout
        assert "nothing is committed" in said
        assert json.loads((evaluated / "artifacts" / "release.json").read_bytes())["serving"] == serving


def hook(place: Path) -> None:
    """A hook of git's that refuses every commit."""
    path = place / ".git" / "hooks" / "pre-commit"
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("spoil", "version", "reason"),
    [
        (untouched, "v3", "v3 was never evaluated: make evaluate VERSION=v3"),
        (untouched, "v1", "v1 serves already"),
        (untouched, "v9", "v9: there is no such version"),
        (damaged("artifacts/v2/model.onnx"), "v2", "v2/model.onnx: sha256 differs"),
        (text(V2, "libraries", "libraries "), "v2", "manifest.json: "),
        (text(V2, ":", ": "), "v2", "v2 was evaluated before its manifest changed"),
        (text(CONDITIONS, "0.9", "0.1"), "v2", "before evaluation/thresholds.toml changed"),
        (rows(lambda all_: all_.pop()), "v2", "before evaluation/rows.jsonl changed"),
        (document("artifacts/release.json", serving="v3"), "v2", "was compared with v1, and v3 serves now"),
        (written("evaluation/v2.json", "{}"), "v2", "evaluation/v2.json cannot be read"),
        (text("CHANGELOG.md", "# Changelog", "# Changes"), "v2", "CHANGELOG.md has changes that are"),
        (written("artifacts/release.json", "{"), "v2", "release.json: "),
        (hook, "v2", "git commit: not today"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_a_promotion_that_is_refused_changes_nothing(
    evaluated: Path,
    spoil: Callable[[Path], object],
    version: str,
    reason: str,
) -> None:
    """Never evaluated, not of these bytes, damaged, or refused by git: one line, every byte as before."""
    spoil(evaluated)
    before = contents(evaluated)
    line = refused("promote", version, root=evaluated)
    assert line.startswith("promote: ")
    assert reason in line
    after = contents(evaluated)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (document("artifacts/release.json", previous=None), "names no previous version"),
        (lambda evaluated: shutil.rmtree(evaluated / "artifacts/v0"), "v0: there is no such version"),
        (damaged("artifacts/v0/golden.jsonl"), "v0/golden.jsonl: sha256 differs"),
        (document("artifacts/v0/manifest.json", inputs=[]), "contract_sha256"),
    ],
    ids=["none", "gone", "damaged", "other contract"],
)  # fmt: skip
def test_a_rollback_to_what_cannot_serve_changes_nothing(
    place: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    """The version before must be there, whole and of this contract; else one line, every byte as before."""
    spoil(place)
    before = contents(place)
    line = refused("rollback", root=place)
    assert line.startswith("rollback: ")
    assert reason in line
    assert contents(place) == before


def test_a_rollback_asks_nothing_of_git(place: Path) -> None:
    """Where the commit is refused the version before serves all the same, and a line says so."""
    hook(place)
    done = run("rollback", "--yes", root=place)
    assert done.exit_code == 0
    assert json.loads((place / "artifacts" / "release.json").read_bytes())["serving"] == "v0"
    assert done.stderr == "rollback: done, but not committed: git commit: not today\n"


def test_a_rollback_to_a_stub_that_answers_all_alike_is_confirmed(place: Path) -> None:
    """The stub of an import is no model: a rollback says so, and goes there only if that is meant."""
    rewrite(place / "artifacts" / "v0", "rules.json", stub_of(place / "artifacts" / "v0" / "rules.json"))
    before = contents(place)
    assert "v0 is a stub without rules" in refused("rollback", root=place)
    assert contents(place) == before
    assert run("rollback", "--yes", root=place).exit_code == 0
    assert json.loads((place / "artifacts" / "release.json").read_bytes())["serving"] == "v0"


def stub_of(rules: Path) -> bytes:
    """The same rules, without the first of them."""
    return json.dumps(json.loads(rules.read_bytes()) | {"rules": []}).encode()


def test_a_release_is_told_by_the_documents(evaluated: Path) -> None:
    """README, contract, card and example speak of the version that serves, in the commit of its release."""
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, evaluated / name)
    git(evaluated, "add", ".")
    git(evaluated, "commit", "--quiet", "--message=documents")
    promote("v2", root=evaluated)
    assert "| version | `v2`" in (evaluated / "docs/model_card.md").read_text("utf-8")
    assert '"model_version": "v2"' in (evaluated / "README.md").read_text("utf-8")
    assert documents(evaluated) == {name: (evaluated / name).read_text("utf-8") for name in DOCUMENTS}
    (evaluated / "README.md").open("a").write("\nOf somebody.\n")
    rollback(root=evaluated)
    assert documents(evaluated) == {name: (evaluated / name).read_text("utf-8") for name in DOCUMENTS}
    assert "| version | `v1`" in (evaluated / "docs/model_card.md").read_text("utf-8")
    assert git(evaluated, "status", "--porcelain") == " M README.md\n"
    (evaluated / "docs/model_card.md").write_bytes(b"\xff")
    done = run("rollback", root=evaluated)
    assert "not in the documents: model_card.md: is not UTF-8" in done.stderr
    assert json.loads((evaluated / "artifacts" / "release.json").read_bytes())["serving"] == "v2"


def test_a_rollback_waits_for_no_training_library() -> None:
    """Going back to the version before imports nothing that takes seconds; `--help` lists every command."""
    program = (
        "import sys; from typer.testing import CliRunner; from lifecycle.__main__ import commands;"
        "done = CliRunner().invoke(commands, ['rollback', '--help']);"
        "slow = {'sklearn', 'skl2onnx', 'onnx', 'pyarrow', 'pandas', 'matplotlib', 'structlog', 'httpx2'};"
        "print(done.exit_code, sorted(slow & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "0 []\n", done.stderr
    said = CliRunner().invoke(commands, ["--help"]).output
    assert all(f" {name} " in said for name in MODULES)


def test_every_line_of_the_checklist_is_run_or_signed() -> None:
    """Each command of docs/release_checklist.md is one that this project has; people sign what is left."""
    lines = parse((ROOT / CHECKLIST).read_text("utf-8"))
    targets = (ROOT / "Makefile").read_text("utf-8")
    for line in lines:
        words = (line.command or "").split()
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in targets, line
        elif words[:3] == ["python", "-m", "lifecycle"]:
            assert words[3] in MODULES, line
        else:
            assert not words or shutil.which(words[0]), line
    commanded = [line.command for line in lines if line.command]
    assert "make evaluate VERSION=$VERSION" in commanded
    assert len(commanded) > 5
    assert len(lines) > len(commanded)


def test_the_checklist_is_run_in_order_and_ticked(place: Path) -> None:
    """Every line is run, also after one that failed; and each is PASS, FAIL or SIGN; a FAIL is an error."""
    document = "# List\n- [ ] Run `git tag first-$VERSION`: one.\n- [ ] Sign: somebody looked.\n"
    (place / CHECKLIST).write_text(
        document + "- [ ] Run `git tag first-$VERSION`: two.\n- [ ] Run `git tag last`: three.\n"
    )
    said = run("release-check", "v2", root=place)
    assert said.exit_code == 1
    assert [line.split()[1] for line in said.stdout.splitlines() if line.startswith("| ")][2:] == [
        "PASS",
        "SIGN",
        "FAIL",
        "PASS",
    ]
    assert "already exists" in said.stderr
    assert git(place, "tag").split() == ["first-v2", "last"]
    copy = (place / "build" / "release-check-v2" / CHECKLIST.rpartition("/")[2]).read_text("utf-8")
    assert copy.splitlines()[1:] == [
        "- [x] Run `git tag first-v2`: one.",
        "- [ ] Sign: somebody looked. Name: ____ Date: ____",
        "- [ ] **FAILED** Run `git tag first-v2`: two.",
        "- [x] Run `git tag last`: three.",
    ]
    git(place, "tag", "--delete", "first-v2", "last")
    (place / CHECKLIST).write_text(document)
    assert "1 passed, 0 failed, 1 to be signed" in run("release-check", "v2", root=place).stdout


@pytest.mark.parametrize(
    ("document", "version", "reason"),
    [
        ("- [ ] Perhaps\n", "v2", "line 1 is neither"),
        ("- [ ] Sign: one\n", "latest", "'latest' is not a version name"),
    ],
)
def test_a_checklist_that_cannot_be_read_is_refused(
    place: Path, document: str, version: str, reason: str
) -> None:
    """A line that says neither Run nor Sign, or a name that is no version, stops before anything is run."""
    (place / CHECKLIST).write_text(document)
    assert reason in refused("release-check", version, root=place)
    assert not (place / "build").exists()
