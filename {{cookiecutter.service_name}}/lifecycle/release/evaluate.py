"""Whether a version is good enough to be released: its golden set, and rows whose truth is known.

    rows with their truth -> the serving pipeline -> metrics, also of slices -> gates of thresholds.toml
    -> report and pictures in build/, verdict in evaluation/<version>.json, which `make promote` asks for

The served version answers the same rows, so that a release is never worse than what it replaces.
"""

import hashlib
import itertools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import ArtifactError, ServiceError
from app.core.pipeline import Pipeline
from app.core.store import MANIFEST, Artifact, read_artifact, read_release
from app.schemas.contract import contract_inputs
from app.schemas.predict import Features
from lifecycle.package import canonical_json

ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = "thresholds.toml"
ROWS_A_CALL = 256
MAX_VALUES = 20  # a column with more different values is cut into bins
MAX_POINTS = 5000  # in a picture
MISSING = ("", "nan", "null", "none", "na", "n/a")  # where the column is no text
BINS = 10  # of the score
BLUE, ORANGE, GREY = "#4878a8", "#d08030", "#999999"

Floats = NDArray[np.float64]
Column = list[Any]


class EvaluationError(Exception):
    """Nothing could be measured; one line."""


@dataclass(frozen=True)
class Metric:
    """Which way is good, and whether a difference is a share of the other figure."""

    lower: bool = False
    share: bool = False


METRICS = {
    "accuracy": Metric(),
    "auc": Metric(),
    "calibration": Metric(lower=True),
    "r2": Metric(),
    "rmse": Metric(lower=True, share=True),
    "mae": Metric(lower=True, share=True),
}
Unit = Annotated[float, Field(ge=0, le=1)]
Error = Annotated[float, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Strict):
    """Where the rows are."""

    file: str = "holdout.csv"
    target: str | None = None
    minimum_rows: Annotated[int, Field(ge=1)] = 1
    training_rows: Literal["refuse", "accept"] = "refuse"


class Classification(_Strict):
    """Least accuracy and AUC, most calibration error."""

    accuracy: Unit | None = None
    auc: Unit | None = None
    calibration: Unit | None = None


class Regression(_Strict):
    """Least r2, most errors in the unit of the target."""

    r2: float | None = None
    rmse: Error | None = None
    mae: Error | None = None


class AgainstServed(_Strict):
    """How much worse a version may be than the one that serves."""

    accuracy: Unit | None = None
    auc: Unit | None = None
    calibration: Unit | None = None
    r2: Error | None = None
    rmse: Error | None = None
    mae: Error | None = None


class Slice(_Strict):
    """Parts of the rows by one column, and what each part must reach: all alike, or by the part's name."""

    column: str
    edges: list[float] | None = None
    minimum_rows: Annotated[int, Field(ge=1)] = 1
    accuracy: Unit | dict[str, Unit] | None = None
    rmse: Error | dict[str, Error] | None = None
    mae: Error | dict[str, Error] | None = None


class Thresholds(_Strict):
    """`thresholds.toml`."""

    data: Source = Source()
    classification: Classification = Classification()
    regression: Regression = Regression()
    against_served: AgainstServed = AgainstServed()
    slices: list[Slice] = []


@dataclass(frozen=True)
class Data:
    """Rows as the file has them, and what is true of each."""

    name: str
    sha256: str
    target: str
    table: Any  # pyarrow
    truths: NDArray[Any]  # [rows] of values, or of positions among `labels`
    labels: list[str]  # as text; [] for a regressor


@dataclass(frozen=True)
class Answers:
    """What a version said to every row; NaN where it had no answer."""

    values: Floats  # [rows, labels] of probabilities, or [rows]
    reviewed: float  # share that goes to a person
    failures: Counter[str]  # rows without an answer, by the code of the error

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which rows it answered."""
        return np.array(np.isfinite(self.values.reshape(len(self.values), -1)).all(axis=1), np.bool_)


@dataclass(frozen=True)
class Gate:
    """One condition of a release."""

    name: str
    found: str
    needed: str
    passed: bool


@dataclass(frozen=True)
class Part:
    """One slice of the rows; `metrics` is empty where it has no answered row."""

    name: str
    rows: int
    judged: bool
    metrics: dict[str, float]
    served: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """All that was found."""

    version: str
    served: str | None
    note: str  # why there is no comparison
    data: Data
    answers: Answers
    metrics: dict[str, float]
    served_metrics: dict[str, float]
    slices: list[tuple[Slice, list[Part]]] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether it may be released."""
        return all(gate.passed for gate in self.gates)


def read_thresholds(path: Path) -> Thresholds:
    """The conditions of a release; raises EvaluationError."""
    try:
        return Thresholds.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or 'cannot be read'}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise EvaluationError(f"{path}: {where}: {first['msg']}") from None
    except ValueError as error:  # no TOML, or not UTF-8
        raise EvaluationError(f"{path}: {' '.join(str(error).split())[:160]}") from None


def read_table(path: Path) -> Any:
    """The rows of a data file as a pyarrow table, of the types that it has; raises EvaluationError."""
    import pyarrow as pa  # here, because no other command needs it

    from lifecycle.tables import Refusal, batches

    try:
        parts = [pa.table(batch) for batch in batches(path)]
        table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})
    except Refusal as refusal:
        raise EvaluationError(str(refusal)) from None
    except pa.ArrowException:
        raise EvaluationError(f"{path.name}: a column has numbers in some rows and text in others") from None
    if not table.num_rows:
        raise EvaluationError(f"{path.name}: has no rows")
    return table


def key(value: Any) -> str:
    """A label or category as text: itself, else as JSON has it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what integers with gaps among them are read as
    return value.strip() if isinstance(value, str) else json.dumps(value, default=str)


def _same(value: Any, choices: Sequence[Any]) -> Any:
    """The one of `choices` that a file means by `value`: 1 is 1 and True is true; else `value` itself."""
    text = key(value)
    by_text = {key(choice): choice for choice in choices}
    if text not in by_text and all(isinstance(choice, bool) for choice in choices):
        text = {"1": "true", "0": "false"}.get(text, text.lower())
    return by_text.get(text, value)


def typed(entry: dict[str, Any], value: Any) -> Any:
    """A value as the contract takes it; what cannot be one is left for the contract to refuse."""
    dtype, nullable = entry["dtype"], entry["nullable"]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str) and value.strip().lower() in MISSING[: 1 if dtype == "string" else None]:
        return value if dtype == "string" and not nullable else None
    if value is None:
        return None
    if entry["categories"]:
        return _same(value, entry["categories"])
    if dtype == "bool":
        return _same(value, (False, True))
    with suppress(ValueError, OverflowError):
        if dtype == "float64" and isinstance(value, str):
            return float(value)
        if dtype == "int64" and isinstance(value, str | float) and float(value).is_integer():
            return int(float(value)) if isinstance(value, float) or "." in value else int(value)
    return value


def instances(table: Any, name: str) -> Iterator[list[Features]]:
    """The rows under the contract, ROWS_A_CALL at a time; raises EvaluationError where one breaks it."""
    inputs, number = contract_inputs(), 0
    for entry in inputs:
        if entry["name"] not in table.column_names:
            raise EvaluationError(f"{name}: has no column {entry['name']!r}; say which file with DATA=...")
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
                raise EvaluationError(f"{name}: row {number}: {where}: {first['msg']}") from None
        yield found


def truths(column: Column, labels: Sequence[Any], name: str, target: str) -> NDArray[Any]:
    """What is true of each row: a position among `labels`, or a number where there are none."""
    positions = {key(label): index for index, label in enumerate(labels)}
    found: list[float] = []
    for number, value in enumerate(column, 1):
        if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
            raise EvaluationError(f"{name}: row {number}: {target!r} is missing")
        if labels:
            position = positions.get(key(_same(value, labels)))
            if position is None:
                raise EvaluationError(f"{name}: row {number}: {target!r} is none of the model's labels")
            found.append(position)
        else:
            try:
                found.append(float(value))
            except (TypeError, ValueError):
                raise EvaluationError(f"{name}: row {number}: {target!r} is no number") from None
    return np.array(found, np.int64 if labels else np.float64)


def read_data(path: Path, target: str, labels: Sequence[Any], root: Path) -> Data:
    """The rows of `path` with the truth in their column `target`; raises EvaluationError."""
    table = read_table(path)
    # Its place in the repository, or else its name alone: where it lies on a machine is nobody's business.
    name = path.resolve().relative_to(root).as_posix() if path.resolve().is_relative_to(root) else path.name
    if target not in table.column_names:
        raise EvaluationError(f"{name}: has no column {target!r}; say which one with TARGET=...")
    for _ in instances(table, name):
        pass  # every row is looked at before the first is asked
    return Data(
        name,
        sha256(path),
        target,
        table,
        truths(table.column(target).to_pylist(), labels, name, target),
        [key(label) for label in labels],
    )


def load(artifact: Artifact) -> Pipeline:
    """The pipeline that would serve it, with the settings a service has by default."""
    return Pipeline.offline(artifact)


def ask(pipeline: Pipeline, data: Data) -> Answers:
    """The version's answers to every row."""
    found = (pipeline.answers(rows) for rows in instances(data.table, data.name))
    answers = [answer for answers in found for answer in answers]
    failures = Counter(one.code for one in answers if isinstance(one, ServiceError))
    nothing = [math.nan] * max(len(data.labels), 1)
    values = []
    for one in answers:
        if isinstance(one, ServiceError):
            values.append(nothing)
        else:
            document = asdict(one)
            values.append(list(document["probabilities"].values()) if data.labels else [document["value"]])
    reviewed = sum(not isinstance(one, ServiceError) and one.action == "review" for one in answers)
    matrix = np.array(values, np.float64)
    return Answers(matrix if data.labels else matrix[:, 0], reviewed / len(answers), failures)


def measure(truths: NDArray[Any], values: Floats, labels: Sequence[str]) -> dict[str, float]:
    """Every metric that these rows allow: a classifier's where there are labels, else a regressor's.

    `calibration` is the expected calibration error, `auc` the mean over labels of each against the rest.
    """
    from sklearn import metrics  # here, because it takes seconds, and a rollback has none to lose

    if not len(truths):
        return {}
    if not labels:
        found = {
            "rmse": metrics.root_mean_squared_error(truths, values),
            "mae": metrics.mean_absolute_error(truths, values),
            "bias": float(np.mean(values - truths)),
        }
        if len(truths) > 1 and np.ptp(truths) > 0:
            found["r2"] = metrics.r2_score(truths, values)
        return {name: float(value) for name, value in found.items()}
    positions = range(len(labels))
    found = {
        "accuracy": metrics.accuracy_score(truths, values.argmax(axis=1)),
        "calibration": sum(
            count * abs(score - right) for _, count, score, right in reliability(truths, values)
        )
        / len(truths),
    }
    if len(labels) > 1:
        # Rounded to float32 they sum to 1 nearly; rules and other models need not even do that.
        shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-9)
        found["brier"] = metrics.brier_score_loss(truths, shares, labels=[*positions], scale_by_half=False)
    areas = [
        metrics.roc_auc_score(truths == index, values[:, index])
        for index in positions
        if 0 < (truths == index).sum() < len(truths)
    ]
    if areas:
        found["auc"] = float(np.mean(areas))
    return {name: float(value) for name, value in found.items()}


def reliability(truths: NDArray[Any], values: Floats) -> list[tuple[float, int, float, float]]:
    """Tenths of the score that have rows: lower edge, rows, mean score, share that was right."""
    scores, right = values.max(axis=1), values.argmax(axis=1) == truths
    tenths = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        (
            tenth / BINS,
            int((tenths == tenth).sum()),
            float(scores[tenths == tenth].mean()),
            float(right[tenths == tenth].mean()),
        )
        for tenth in np.unique(tenths).tolist()
    ]


def parts(column: Column, edges: list[float] | None) -> list[tuple[str, NDArray[np.bool_]]]:
    """Names of the parts that a column cuts the rows into, and which rows each has."""
    numbers = _numbers(column)
    missing = np.array([value is None or value == "" for value in column])
    if numbers is not None:
        missing = np.isnan(numbers)
    distinct = {key(value) for value, gone in zip(column, missing, strict=True) if not gone}
    if numbers is None or (edges is None and len(distinct) <= MAX_VALUES):
        names = np.array(["" if gone else key(value) for value, gone in zip(column, missing, strict=True)])
        found = [(name, (names == name) & ~missing) for name in sorted(distinct)]
    else:
        if edges is None:
            edges = np.unique(np.quantile(numbers[~missing], [0.25, 0.5, 0.75])).tolist()
        bounds = [-math.inf, *sorted(edges), math.inf]
        found = [
            (f"({low:g}, {high:g}]", (numbers > low) & (numbers <= high))
            for low, high in itertools.pairwise(bounds)
        ]
    if missing.any():
        found.append(("missing", missing))
    return found


def _numbers(column: Column) -> Floats | None:
    """The column as numbers, NaN where one is missing; None where one is something else."""
    found = []
    for value in column:
        if isinstance(value, bool):
            return None
        if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
            found.append(math.nan)
            continue
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            return None
    return None if all(map(math.isnan, found)) else np.array(found)


def slices(
    conditions: Thresholds, data: Data, answers: Answers, served: Answers | None
) -> list[tuple[Slice, list[Part]]]:
    """Every slice of the rows with the metrics of both versions; raises EvaluationError."""
    found = []
    for one in conditions.slices:
        name = one.column if one.column in data.table.column_names or one.column != "target" else data.target
        if name not in data.table.column_names:
            raise EvaluationError(f"{data.name}: has no column {name!r}, which {THRESHOLDS} has a slice of")
        cut = []
        for part, mask in parts(data.table.column(name).to_pylist(), one.edges):
            rows = int(mask.sum())
            theirs = _measured(data, served, mask) if served else {}
            cut.append(Part(part, rows, rows >= one.minimum_rows, _measured(data, answers, mask), theirs))
        found.append((one, cut))
    return found


def _measured(data: Data, answers: Answers, mask: NDArray[np.bool_]) -> dict[str, float]:
    mask = mask & answers.known
    return measure(data.truths[mask], answers.values[mask], data.labels)


def gate(metric: str, found: float | None, threshold: float, where: str = "") -> Gate:
    """The condition that a metric reaches its threshold; one that cannot be measured does not."""
    lower = METRICS[metric].lower
    passed = found is not None and (found <= threshold if lower else found >= threshold)
    needed = f"{'at most' if lower else 'at least'} {threshold:g}"
    return Gate(
        metric + where, "not measurable on these rows" if found is None else f"{found:.4g}", needed, passed
    )


def against(metric: str, found: float | None, served: float, worse: float, version: str) -> Gate:
    """The condition that a metric is at most `worse` than the served version's."""
    kind = METRICS[metric]
    allowed = served * (1 + worse) if kind.share else served + worse if kind.lower else served - worse
    # What was counted is compared, not the last bits of how it was computed.
    one = gate(metric, found, round(allowed, 9), f" against {version}")
    return Gate(
        one.name,
        one.found,
        f"{one.needed.rpartition(' ')[0]} {allowed:.4g} ({version} has {served:.4g})",
        one.passed,
    )


def slice_gates(one: Slice, found: list[Part], names: Sequence[str]) -> Iterator[Gate]:
    """The conditions of the parts of a column; `names` are the metrics that this kind of model has."""
    for metric in names:
        threshold = getattr(one, metric, None)
        if threshold is None:
            continue
        wanted = dict.fromkeys((part.name for part in found), threshold)
        if isinstance(threshold, dict):
            wanted = threshold
        by_name = {part.name: part for part in found}
        for name, needed in wanted.items():
            where = f" where {one.column} is {name}"
            part = by_name.get(name)
            if part is None:
                yield Gate(metric + where, "no such rows", f"{needed:g}", passed=False)
            elif part.judged:
                yield gate(metric, part.metrics.get(metric), needed, where)


def judge(
    conditions: Thresholds,
    data: Data,
    answers: Answers,
    metrics: dict[str, float],
    sliced: list[tuple[Slice, list[Part]]],
    served: tuple[str, dict[str, float]] | None,
) -> Iterator[Gate]:
    """Every condition on what was measured."""
    rows, failed = data.table.num_rows, sum(answers.failures.values())
    least = conditions.data.minimum_rows
    yield Gate("rows", str(rows), f"at least {least}", rows >= least)
    codes = ", ".join(f"{n} {code}" for code, n in sorted(answers.failures.items()))
    yield Gate(
        "answered rows", f"{rows - failed} of {rows}" + (f" ({codes})" if codes else ""), "all", not failed
    )
    wanted = conditions.classification if data.labels else conditions.regression
    for metric, threshold in wanted.model_dump(exclude_none=True).items():
        yield gate(metric, metrics.get(metric), threshold)
    if served:
        version, theirs = served
        for metric, worse in conditions.against_served.model_dump(exclude_none=True).items():
            if metric in theirs:
                yield against(metric, metrics.get(metric), theirs[metric], worse, version)
    for one, cut in sliced:
        yield from slice_gates(one, cut, list(type(wanted).model_fields))


def golden_gate(pipeline: Pipeline) -> Gate:
    """The condition that every golden row gets the recorded answer."""
    try:
        pipeline.model.replay()
    except ArtifactError as error:
        return Gate("golden set", str(error), "the recorded answers", passed=False)
    return Gate("golden set", "the recorded answers", "the recorded answers", passed=True)


def evaluation(version: str, root: Path, data_file: Path | None, target: str | None) -> Evaluation:
    """Measure `version` and what serves; raises ArtifactError, EvaluationError."""
    artifacts = root / "artifacts"
    conditions = read_thresholds(root / "evaluation" / THRESHOLDS)
    artifact = read_artifact(artifacts, version)
    manifest = artifact.manifest
    column = target or conditions.data.target or (manifest.training.target if manifest.training else None)
    if not column:
        raise EvaluationError(f"{version}: its manifest names no target; say which column with TARGET=...")
    path = data_file or root / "evaluation" / conditions.data.file
    if data_file is None and not path.is_file():
        raise EvaluationError(
            f"no rows to judge {version} by: give DATA=rows.csv with the column {column!r}, or keep "
            f"such rows as evaluation/{conditions.data.file}"
        )
    data = read_data(path, column, manifest.outputs.labels, root)
    pipeline = load(artifact)
    gates = [golden_gate(pipeline)]
    if manifest.training and conditions.data.training_rows == "refuse":
        own = manifest.training.data_sha256 == data.sha256
        gates.append(Gate("other rows than in training", "the same" if own else "others", "others", not own))
    served, note, theirs = read_release(artifacts).serving, "", None
    answers = ask(pipeline, data)
    if served == version:
        note = f"{version} is the one that serves"
    else:
        try:
            theirs = ask(load(read_artifact(artifacts, served)), data)
        except ArtifactError as error:
            note = f"{served} serves and cannot be asked: {error}"
    everything = np.ones(data.table.num_rows, bool)
    metrics = _measured(data, answers, everything)
    their_metrics = _measured(data, theirs, everything) if theirs else {}
    found = slices(conditions, data, answers, theirs)
    comparison = (served, their_metrics) if theirs else None
    gates += judge(conditions, data, answers, metrics, found, comparison)
    return Evaluation(
        version, served if theirs else None, note, data, answers, metrics, their_metrics, found, gates
    )


def verdict(found: Evaluation, root: Path) -> bytes:
    """What `make promote` wants to know, and under which circumstances it is true; no time, no machine."""

    def rounded(metrics: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 6) for name, value in metrics.items()}

    return canonical_json(
        {
            "version": found.version,
            "passed": found.passed,
            "failed": [
                f"{one.name}: {one.found}, needed: {one.needed}" for one in found.gates if not one.passed
            ],
            "manifest_sha256": sha256(root / "artifacts" / found.version / MANIFEST),
            "thresholds_sha256": sha256(root / "evaluation" / THRESHOLDS),
            "data": {
                "file": found.data.name,
                "sha256": found.data.sha256,
                "rows": found.data.table.num_rows,
                "target": found.data.target,
            },
            "metrics": rounded(found.metrics),
            "served": found.served,
            "served_metrics": rounded(found.served_metrics),
        }
    )


def sha256(path: Path) -> str:
    """Hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(found: Evaluation, pictures: Sequence[str]) -> str:
    """The whole of it as Markdown."""
    data, served = found.data, found.served
    lines = [
        f"# Evaluation of {found.version}: {'passed' if found.passed else 'failed'}",
        "",
        f"{data.table.num_rows:,} rows of `{data.name}` (sha256 `{data.sha256[:12]}`), truth in "
        f"`{data.target}`; "
        + (f"beside {served}, which serves." if served else f"no comparison: {found.note}."),
        f"To review: {found.answers.reviewed:.1%} of them.",
        "",
        "## Gates",
        *table(
            ("", "gate", "found", "needed"),
            [("ok" if one.passed else "**FAILED**", one.name, one.found, one.needed) for one in found.gates],
        ),
        "",
        "## Metrics",
        *table(
            ("metric", found.version, *([served] if served else [])),
            [
                (
                    name,
                    f"{value:.4g}",
                    *(
                        [f"{found.served_metrics[name]:.4g}"]
                        if name in found.served_metrics
                        else [""]
                        if served
                        else []
                    ),
                )
                for name, value in found.metrics.items()
            ],
        ),
        "",
    ]
    main = "accuracy" if data.labels else "rmse"
    for one, own in found.slices:
        lines += [
            f"## By {one.column}",
            *table(
                (one.column, "rows", f"{main} of {found.version}", *([f"of {served}"] if served else []), ""),
                [
                    (
                        part.name,
                        f"{part.rows:,}",
                        _figure(part.metrics, main),
                        *([_figure(part.served, main)] if served else []),
                        "" if part.judged else "too few to judge",
                    )
                    for part in own
                ],
            ),
            "",
        ]
    return "\n".join([*lines, *(f"![{name}]({name})\n" for name in pictures)])


def _figure(metrics: dict[str, float], name: str) -> str:
    return f"{metrics[name]:.4g}" if name in metrics else "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that is also one to the eye."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def draw(found: Evaluation, folder: Path) -> list[str]:
    """Write the pictures as PNG; their names."""
    # Here, because it takes a second and no other command needs it.
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    known = found.answers.known
    truths, values, labels = found.data.truths[known], found.answers.values[known], found.data.labels
    figures: dict[str, Any] = {}

    def figure(name: str, title: str, across: str, up: str, height: float = 4.5) -> Any:
        figures[name] = Figure(figsize=(6, height), layout="constrained")
        axes = figures[name].add_subplot(title=title, xlabel=across, ylabel=up)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    if not len(truths):
        return []
    if labels:
        bins = reliability(truths, values)
        axes = figure(
            "calibration", f"{found.version}: does the score keep its word?", "score", "share that was right"
        )
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--")
        sizes = [20 + 200 * rows / len(truths) for _, rows, _, _ in bins]
        axes.plot([score for _, _, score, _ in bins], [right for *_, right in bins], color=BLUE)
        axes.scatter([score for _, _, score, _ in bins], [right for *_, right in bins], sizes, BLUE)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.05))
        cells = confusion_matrix(truths, values.argmax(axis=1), labels=[*range(len(labels))])
        axes = figure("confusion", f"{found.version}: rows by truth and answer", "answer", "truth")
        axes.imshow(cells / np.maximum(cells.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1.4)
        axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
        axes.set_xticklabels(labels, rotation=0 if len(labels) < 5 else 90)
        axes.set_yticklabels(labels)
        if len(labels) <= MAX_VALUES:
            for (row, column), count in np.ndenumerate(cells):
                axes.text(column, row, f"{count:,}", ha="center", va="center")
    else:
        step = max(1, len(truths) // MAX_POINTS)
        truths, values = truths[::step], values[::step]
        axes = figure("calibration", f"{found.version}: answer and truth", "answer", "truth")
        ends = [min(truths.min(), values.min()), max(truths.max(), values.max())]
        axes.plot(ends, ends, color=GREY, linestyle="--")
        axes.scatter(values, truths, 10, BLUE, alpha=0.6)
        axes = figure("residuals", f"{found.version}: how far off, by answer", "answer", "answer - truth")
        axes.axhline(0, color=GREY, linestyle="--")
        axes.scatter(values, values - truths, 10, BLUE, alpha=0.6)
    main = "accuracy" if labels else "rmse"
    for number, (one, own) in enumerate(found.slices, 1):
        shown = [part for part in own if main in part.metrics][:40]
        axes = figure(f"slice-{number}", f"{main} by {one.column}", main, "", 1.5 + 0.45 * len(shown))
        places = np.arange(len(shown))
        axes.barh(places - 0.2, [part.metrics[main] for part in shown], 0.4, color=BLUE, label=found.version)
        if found.served:
            theirs = [part.served.get(main, 0.0) for part in shown]
            axes.barh(places + 0.2, theirs, 0.4, color=ORANGE, label=found.served)
        axes.set_yticks(places)
        axes.set_yticklabels([f"{part.name} ({part.rows})" for part in shown])
        axes.invert_yaxis()
        axes.legend(loc="lower left", bbox_to_anchor=(0, -0.45), ncols=2, frameon=False)
    for name, drawn in figures.items():
        drawn.savefig(folder / f"{name}.png", dpi=110)
    return [f"{name}.png" for name in figures]


def write(path: Path, content: bytes) -> None:
    """The whole file or, on any failure, what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def evaluate(
    version: Annotated[str, typer.Argument(help="The version to judge, like v2.")],
    data: Annotated[
        Path | None,
        typer.Option(envvar="DATA", help="Rows whose truth is known: .csv, .parquet, .jsonl or .arrow."),
    ] = None,
    target: Annotated[str | None, typer.Option(envvar="TARGET", help="The column with the truth.")] = None,
    root: Annotated[Path, typer.Option(help="The service's folder.", hidden=True)] = ROOT,
) -> None:
    """Hold a version to evaluation/thresholds.toml: golden set, quality, slices, and what serves."""
    try:
        found = evaluation(version, root, data, target)
        folder = root / "build" / f"evaluation-{version}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "report.md", report(found, draw(found, folder)).encode())
        write(root / "evaluation" / f"{version}.json", verdict(found, root))
    except (ArtifactError, EvaluationError, OSError) as error:
        typer.echo(f"evaluate: {error}", err=True)
        raise typer.Exit(1) from None
    lines = [("ok" if one.passed else "FAILED", one.name, one.found, one.needed) for one in found.gates]
    typer.echo("\n".join(table(("", "gate", "found", "needed"), lines)))
    typer.echo(f"report: {folder / 'report.md'}")
    for one in found.gates:
        if not one.passed:
            typer.echo(f"evaluate: {version}: {one.name}: {one.found}, needed: {one.needed}", err=True)
    if not found.passed:
        raise typer.Exit(1)
    typer.echo(f"{version} passed: make promote VERSION={version}")
