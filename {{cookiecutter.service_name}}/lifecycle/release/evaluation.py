"""Decides whether a version is good enough to be released, by its golden set and labelled rows.

labelled rows -> answers of the version and of the served version -> metrics, also of slices -> gates
-> report and pictures in build/, verdict in evaluation/<version>.json, which a promotion needs

Functions import pyarrow, pandas, scikit-learn and matplotlib, because a rollback must not wait for them.
"""

import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.core.errors import ArtifactError, ServiceError
from app.core.pipeline import Pipeline
from app.core.store import MANIFEST, read_artifact, read_release
from lifecycle.command import (
    ROOT,
    LifecycleError,
    calibration_error,
    plot_reliability,
    reliability,
    sha256,
    table,
    write_file,
)
from lifecycle.package import canonical_json

THRESHOLDS = "thresholds.toml"

OfLabels = Literal["accuracy", "auc", "calibration"]
OfValues = Literal["r2", "rmse", "mae"]
Unit = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]
Rounded = Annotated[float, AfterValidator(lambda value: round(value, 6))]
Count = Annotated[int, Field(ge=1)]
MAX_VALUES = 20  # a numeric column with more distinct values is cut into bins
MAX_POINTS = 5000  # in a picture
LOWER_IS_BETTER = {"calibration", "rmse", "mae"}
LOSS_IS_A_SHARE = {"rmse", "mae"}  # of the served version's value; for other metrics it is a difference

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Metrics = dict[str, float]
Version = Annotated[str, typer.Argument(help="The version, like v2.")]
Root = Annotated[Path, typer.Option(help="The service's folder.", hidden=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Strict):
    """The labelled rows: a file in evaluation/, and its target column, by default the manifest's target."""

    file: str = "holdout.csv"
    target: str | None = None
    minimum_rows: Count = 1
    training_rows: Literal["refuse", "accept"] = "refuse"


class Slice(_Strict):
    """Parts of the rows by a column, with a threshold for all parts, or for each part by name."""

    column: str
    edges: list[float] | None = None
    minimum_rows: Count = 1
    accuracy: Unit | dict[str, Unit] | None = None
    rmse: Size | dict[str, Size] | None = None
    mae: Size | dict[str, Size] | None = None


class Thresholds(_Strict):
    """The conditions of a release, by metric; `against_served` is the allowed loss."""

    data: Source = Source()
    classification: dict[OfLabels, Unit] = {}
    regression: dict[OfValues, float] = {}
    against_served: dict[OfLabels | OfValues, Size] = {}
    slices: list[Slice] = []


class Rows(_Strict):
    """The rows of an evaluation; `file` is relative to the service's folder, or a name without folder."""

    file: str
    sha256: str
    rows: int
    target: str


class Verdict(_Strict):
    """`evaluation/<version>.json`: the result, and checksums of its inputs; no time, no machine data."""

    version: str
    passed: bool
    failed: list[str]
    manifest_sha256: str
    thresholds_sha256: str
    data: Rows
    metrics: dict[str, Rounded]
    served: str | None
    served_metrics: dict[str, Rounded]


@dataclass(frozen=True)
class Data:
    """The rows of the file, and the truth of each."""

    name: str
    sha256: str
    target: str
    table: Any  # pyarrow
    truths: NDArray[Any]  # [rows] of values, or of indexes in `labels`
    labels: list[str]  # as text; [] for a regressor


@dataclass(frozen=True)
class Answers:
    """The answers of one version to every row; NaN for errors."""

    values: Floats  # [rows, labels] of probabilities, or [rows]
    reviewed: float  # share of rows with action `review`
    failures: Counter[str]  # rows with an error, by its code

    @property
    def known(self) -> Mask:
        """Mask of rows that have an answer."""
        return np.array(np.isfinite(self.values.reshape(len(self.values), -1)).all(axis=1), np.bool_)


class Part(NamedTuple):
    """One part of a slice; metrics are empty if no row was answered."""

    name: str
    rows: int
    metrics: Metrics
    served: Metrics


class Gate(NamedTuple):
    """One condition of a release."""

    name: str
    found: str
    needed: str
    passed: bool


def evaluate(
    version: Version,
    *,
    data: Annotated[
        Path | None,
        typer.Option(envvar="DATA", help="Rows whose truth is known: .csv, .parquet, .jsonl or .arrow."),
    ] = None,
    target: Annotated[str | None, typer.Option(envvar="TARGET", help="The column with the truth.")] = None,
    root: Root = ROOT,
) -> Verdict:
    """Check a version against evaluation/thresholds.toml: golden set, quality, slices, served version.

    Writes a verdict, and a report with pictures; or nothing, if the version cannot be evaluated. The version
    passed if `failed` of the result is empty.
    """
    artifacts, thresholds = root / "artifacts", read_thresholds(root / "evaluation" / THRESHOLDS)
    artifact = read_artifact(artifacts, version)
    manifest, training = artifact.manifest, artifact.manifest.training
    column = target or thresholds.data.target or (training.target if training else None)
    if not column:
        raise LifecycleError(f"{version}: its manifest names no target; say which column with TARGET=...")
    path = data or root / "evaluation" / thresholds.data.file
    if data is None and not path.is_file():
        raise LifecycleError(
            f"no rows to evaluate {version} with: give DATA=rows.csv with the column {column!r}, or keep "
            f"such rows as evaluation/{thresholds.data.file}"
        )
    rows = read_data(path, column, manifest.outputs.labels, root)
    pipeline, recorded = Pipeline.offline(artifact), "the recorded answers"
    try:
        pipeline.model.replay()
        gates = [Gate("golden set", recorded, recorded, passed=True)]
    except ArtifactError as error:
        gates = [Gate("golden set", str(error), recorded, passed=False)]
    if training and thresholds.data.training_rows == "refuse":
        same = training.data_sha256 == rows.sha256
        gates += [Gate("other rows than in training", "the same" if same else "others", "others", not same)]
    answers, served, note, theirs = ask(pipeline, rows), read_release(artifacts).serving, "", None
    if served == version:
        note = f"{version} is the served version"
    else:
        try:
            theirs = ask(Pipeline.offline(read_artifact(artifacts, served)), rows)
        except ArtifactError as error:
            note = f"{served} serves and cannot be asked: {error}"
    own, others = measured(rows, answers), measured(rows, theirs)
    cut = slices(thresholds, rows, answers, theirs)
    gates += judge(thresholds, rows, answers, own, cut, (served, others) if theirs else None)
    failed = [f"{one.name}: {one.found}, needed: {one.needed}" for one in gates if not one.passed]
    verdict = Verdict(
        version=version,
        passed=not failed,
        failed=failed,
        manifest_sha256=sha256(artifacts / version / MANIFEST),
        thresholds_sha256=sha256(root / "evaluation" / THRESHOLDS),
        data=Rows(file=rows.name, sha256=rows.sha256, rows=rows.table.num_rows, target=column),
        metrics=own,
        served=served if theirs else None,
        served_metrics=others,
    )
    folder = root / "build" / f"evaluation-{version}"
    report = write_report(folder, verdict, gates, rows, answers, cut, note)
    write_file(root / "evaluation" / f"{version}.json", canonical_json(verdict.model_dump()))
    typer.echo(f"{gate_table(gates)}\nreport: {report}")
    for line in failed:
        typer.echo(f"evaluate: {version}: {line}", err=True)
    if not failed:
        typer.echo(f"{version} passed: make promote VERSION={version}")
    return verdict


def read_thresholds(path: Path) -> Thresholds:
    """The thresholds in a file; raises LifecycleError."""
    try:
        return Thresholds.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        reason = f"{where}: {first['msg']}"
    except ValueError as error:  # no TOML, or not UTF-8
        reason = " ".join(str(error).split())[:160]
    raise LifecycleError(f"{path}: {reason}")


def read_data(path: Path, target: str, labels: Sequence[Any], root: Path) -> Data:
    """The rows of `path` with the truth in column `target`; raises LifecycleError for the first bad row."""
    from lifecycle.tables import contract_types, instances, read_table, spelling, truths

    types = contract_types(target, labels)
    table = read_table(path, types, {*types, target})
    # The path in the repository, or only the file's name: a verdict must not contain paths of a machine.
    name = path.resolve().relative_to(root).as_posix() if path.resolve().is_relative_to(root) else path.name
    if target not in table.column_names:
        raise LifecycleError(f"{name}: has no column {target!r}; say which one with TARGET=...")
    for _ in instances(table, name):
        pass  # validate all rows first
    known = truths(table.column(target).to_pylist(), labels, name, target)
    return Data(name, sha256(path), target, table, known, [spelling(label) for label in labels])


def ask(pipeline: Pipeline, data: Data) -> Answers:
    """The answers of a version to every row."""
    from lifecycle.tables import instances

    answers: list[Any] = [
        answer for rows in instances(data.table, data.name) for answer in pipeline.answers(rows)
    ]
    values = np.full((len(answers), max(len(data.labels), 1)), math.nan)
    for row, answer in zip(values, answers, strict=True):
        if not isinstance(answer, ServiceError):
            row[:] = list(answer.probabilities.values()) if data.labels else answer.value
    failures = Counter(one.code for one in answers if isinstance(one, ServiceError))
    reviewed = sum(getattr(one, "action", "") == "review" for one in answers) / len(answers)
    return Answers(values if data.labels else values[:, 0], reviewed, failures)


def measured(data: Data, answers: Answers | None, mask: Mask | bool = True) -> Metrics:
    """The metrics of the answered rows in `mask`; {} without answers."""
    if answers is None:
        return {}
    mask = answers.known & mask
    return measure(data.truths[mask], answers.values[mask], data.labels)


def measure(truths: NDArray[Any], values: Floats, labels: Sequence[str]) -> Metrics:
    """All metrics that can be computed: of a classifier if there are labels, else of a regressor.

    `truths` and `values` as in Data and Answers, without unanswered rows. `calibration` is the expected
    calibration error, `auc` the mean over labels, each against the rest.
    """
    from sklearn import metrics

    if not len(truths):
        return {}
    if not labels:
        found = {
            "rmse": metrics.root_mean_squared_error(truths, values),
            "mae": metrics.mean_absolute_error(truths, values),
            "bias": np.mean(values - truths),
        }
        if len(truths) > 1 and np.ptp(truths) > 0:
            found["r2"] = metrics.r2_score(truths, values)
        return {name: float(value) for name, value in found.items()}
    right = values.argmax(axis=1) == truths
    error = calibration_error(reliability(values.max(axis=1), right))
    found = {"accuracy": right.mean(), "calibration": error}
    if len(labels) > 1:
        # Probabilities in float32 sum to 1 only approximately, and those of rules need not at all.
        shares, every = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-9), [*range(len(labels))]
        found["brier"] = metrics.brier_score_loss(truths, shares, labels=every, scale_by_half=False)
    areas = [
        metrics.roc_auc_score(truths == index, values[:, index])
        for index in range(len(labels))
        if 0 < (truths == index).sum() < len(truths)
    ]
    if areas:
        found["auc"] = np.mean(areas)
    return {name: float(value) for name, value in found.items()}


def slices(
    thresholds: Thresholds, data: Data, answers: Answers, served: Answers | None
) -> list[tuple[Slice, list[Part]]]:
    """Every slice with its parts and the metrics of both versions; raises LifecycleError."""
    found = []
    for one in thresholds.slices:
        name = one.column if one.column in data.table.column_names or one.column != "target" else data.target
        if name not in data.table.column_names:
            raise LifecycleError(f"{data.name}: has no column {name!r}, which {THRESHOLDS} has a slice of")
        cut = parts(data.table.column(name).to_pylist(), one.edges)
        found.append(
            (one, [
                Part(part, int(mask.sum()), measured(data, answers, mask), measured(data, served, mask))
                for part, mask in cut.items()
            ])
        )  # fmt: skip
    return found


def parts(column: Sequence[Any], edges: list[float] | None) -> dict[str, Mask]:
    """Masks of the parts of a column, by name: a part per value, or for numbers by `edges` or quartiles."""
    import pandas as pd

    from lifecycle.tables import is_missing, spelling

    texts = pd.Series([None if is_missing(one, text=True) else spelling(one) for one in column], dtype=object)
    numbers = pd.to_numeric(texts, errors="coerce")
    names = sorted(texts.dropna().unique())
    if numbers.notna().equals(texts.notna()) and (edges is not None or len(names) > MAX_VALUES):
        if edges is None:
            edges = numbers.quantile([0.25, 0.5, 0.75]).unique().tolist()
        bounds = [-math.inf, *sorted(edges), math.inf]
        names = [f"({low:g}, {high:g}]" for low, high in itertools.pairwise(bounds)]
        texts = pd.cut(numbers, bounds, labels=names)
    found = {name: np.asarray(texts == name) for name in names}
    return found | ({"missing": np.asarray(texts.isna())} if texts.isna().any() else {})


def gate(metric: str, found: float | None, threshold: float, where: str = "", note: str = "") -> Gate:
    """The condition that a metric reaches its threshold; a metric that cannot be measured fails."""
    lower = metric in LOWER_IS_BETTER
    passed = found is not None and (found <= threshold if lower else found >= threshold)
    said = "not measurable on these rows" if found is None else f"{found:.4g}"
    return Gate(metric + where, said, f"{'at most' if lower else 'at least'} {threshold:g}{note}", passed)


def judge(
    thresholds: Thresholds,
    data: Data,
    answers: Answers,
    own: Metrics,
    sliced: list[tuple[Slice, list[Part]]],
    served: tuple[str, Metrics] | None,
) -> Iterator[Gate]:
    """All conditions on the measurements; `served` is the served version with its metrics."""
    rows, failed, least = data.table.num_rows, answers.failures.total(), thresholds.data.minimum_rows
    yield Gate("rows", str(rows), f"at least {least}", rows >= least)
    codes = ", ".join(f"{count} {code}" for code, count in sorted(answers.failures.items()))
    answered = f"{rows - failed} of {rows}" + (f" ({codes})" if codes else "")
    yield Gate("answered rows", answered, "all", not failed)
    wanted: dict[Any, float] = thresholds.classification if data.labels else thresholds.regression
    for metric, threshold in wanted.items():
        yield gate(metric, own.get(metric), threshold)
    version, theirs = served or ("", {})
    for metric, worse in thresholds.against_served.items():
        if metric in theirs:
            was = theirs[metric]
            loss = was * worse if metric in LOSS_IS_A_SHARE else worse
            loss += 1e-9 * abs(was)  # so that floating-point noise decides nothing
            allowed = was + loss if metric in LOWER_IS_BETTER else was - loss
            note = f" ({version} has {was:.4g})"
            yield gate(metric, own.get(metric), allowed, f" against {version}", note)
    for one, parts in sliced:
        found = {part.name: part for part in parts}
        for metric in ("accuracy",) if data.labels else ("rmse", "mae"):
            every = getattr(one, metric)
            needed = every if isinstance(every, dict) else dict.fromkeys(found, every)
            for name, threshold in needed.items() if every is not None else ():
                where = f" where {one.column} is {name}"
                if name not in found:
                    yield Gate(metric + where, "no such rows", f"{threshold:g}", passed=False)
                elif found[name].rows >= one.minimum_rows:
                    yield gate(metric, found[name].metrics.get(metric), threshold, where)


def gate_table(gates: Sequence[Gate]) -> str:
    """The gates as Markdown."""
    cells = [("ok" if one.passed else "**FAILED**", *one[:3]) for one in gates]
    return table(("", "gate", "found", "needed"), cells)


def write_report(
    folder: Path,
    verdict: Verdict,
    gates: Sequence[Gate],
    data: Data,
    answers: Answers,
    cut: list[tuple[Slice, list[Part]]],
    note: str,
) -> Path:
    """Write report.md and its pictures (PNG) into `folder`; `note` explains a missing comparison."""
    version, served, theirs = verdict.version, verdict.served, verdict.served_metrics
    both, main = [version, served] if served else [version], "accuracy" if data.labels else "rmse"

    def cells(name: str, *metrics: Metrics) -> list[str]:
        return [f"{one[name]:.4g}" if name in one else "-" for one in metrics[: len(both)]]

    beside = f"beside {served}, which serves" if served else f"no comparison: {note}"
    metrics = [(name, *cells(name, verdict.metrics, theirs)) for name in verdict.metrics]
    lines = [
        f"# Evaluation of {version}: {'failed' if verdict.failed else 'passed'}",
        f"{data.table.num_rows:,} rows of `{data.name}` (sha256 `{data.sha256[:12]}`), truth in "
        f"`{data.target}`; {beside}.\nTo review: {answers.reviewed:.1%} of them.",
        f"## Gates\n{gate_table(gates)}",
        f"## Metrics\n{table(('metric', *both), metrics)}",
    ]
    for one, parts in cut:
        few = ["" if part.rows >= one.minimum_rows else "too few to judge" for part in parts]
        rows = [
            (part.name, f"{part.rows:,}", *cells(main, part.metrics, part.served), said)
            for part, said in zip(parts, few, strict=True)
        ]
        head = (one.column, "rows", *(f"{main} of {name}" for name in both), "")
        lines.append(f"## By {one.column}\n{table(head, rows)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures(version, data, answers):
        figure.savefig(folder / f"{name}.png", dpi=110)
        lines.append(f"![{name}.png]({name}.png)")
    path = folder / "report.md"
    write_file(path, ("\n\n".join(lines) + "\n").encode())
    return path


def pictures(version: str, data: Data, answers: Answers) -> Iterator[tuple[str, Any]]:
    """Names and figures: calibration, and the errors of labels or values."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay

    def axes(title: str) -> Any:
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        return figure.add_subplot(title=f"{version}: {title}")

    known, labels = answers.known, data.labels
    truths, values = data.truths[known], answers.values[known]
    if labels and len(truths):
        drawn = axes("score and share of right answers")
        plot_reliability(drawn, reliability(values.max(axis=1), values.argmax(axis=1) == truths))
        yield "calibration", drawn.figure
        few, names = len(labels) <= MAX_VALUES, {"labels": range(len(labels)), "display_labels": labels}
        drawn = axes("rows by truth and answer")
        turned = "horizontal" if len(labels) < 5 else "vertical"
        ConfusionMatrixDisplay.from_predictions(
            truths, values.argmax(axis=1), include_values=few, xticks_rotation=turned, ax=drawn, **names
        )
        yield "confusion", drawn.figure
    elif len(truths):
        dots = {"subsample": min(MAX_POINTS, len(truths)), "random_state": 0}
        for name, kind in (("calibration", "actual_vs_predicted"), ("residuals", "residual_vs_predicted")):
            drawn = axes(kind.replace("_", " "))
            PredictionErrorDisplay.from_predictions(truths, values, kind=kind, ax=drawn, **dots)
            yield name, drawn.figure
