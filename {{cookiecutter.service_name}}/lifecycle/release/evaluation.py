"""Whether a version is good enough to be released: its golden set, and rows whose truth is known.

labelled rows -> answers of the version and of the served one -> metrics, also of slices -> gates
-> report and pictures in build/, verdict in evaluation/<version>.json, which a promotion needs

Imports pyarrow, pandas and scikit-learn, which takes seconds: import it where it is needed.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn import metrics

from app.core.errors import ArtifactError, ServiceError
from app.core.pipeline import Pipeline
from app.core.store import MANIFEST, read_artifact, read_release
from lifecycle.errors import LifecycleError
from lifecycle.figures import calibration_error, reliability
from lifecycle.files import ROOT, sha256, write_file
from lifecycle.package import canonical_json
from lifecycle.release.documents import THRESHOLDS, Rows, Slice, Thresholds, Verdict, read_thresholds
from lifecycle.tables import instances, is_missing, read_table, spelling, truths

MAX_VALUES = 20  # a numeric column with more different values is cut into bins
LOWER_IS_BETTER = {"calibration", "rmse", "mae"}
LOSS_IS_A_SHARE = {"rmse", "mae"}  # of the served version's figure; of other metrics it is a difference

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Data:
    """Rows as the file has them, and the truth of each."""

    name: str
    sha256: str
    target: str
    table: Any  # pyarrow
    truths: NDArray[Any]  # [rows] of values, or of positions among `labels`
    labels: list[str]  # as text; [] for a regressor


@dataclass(frozen=True)
class Answers:
    """The answers of one version to every row; NaN where it gave an error."""

    values: Floats  # [rows, labels] of probabilities, or [rows]
    reviewed: float  # share of rows with action `review`
    failures: Counter[str]  # rows with an error, by its code

    @property
    def known(self) -> Mask:
        """Rows that have an answer."""
        return np.array(np.isfinite(self.values.reshape(len(self.values), -1)).all(axis=1), np.bool_)


@dataclass(frozen=True)
class Part:
    """One part of a slice; metrics are empty where it has no answered row."""

    name: str
    rows: int
    judged: bool
    metrics: Metrics
    served: Metrics


@dataclass(frozen=True)
class Gate:
    """One condition of a release."""

    name: str
    found: str
    needed: str
    passed: bool


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation found."""

    verdict: Verdict
    note: str  # why there is no comparison
    data: Data
    answers: Answers
    slices: list[tuple[Slice, list[Part]]]
    gates: list[Gate]

    @property
    def failed(self) -> list[str]:
        """A line for each gate that keeps the version from being released; none if it passed."""
        return self.verdict.failed


def evaluate(
    version: str, *, data: Path | None = None, target: str | None = None, root: Path = ROOT
) -> Evaluation:
    """Judge `version` by `root`/evaluation/thresholds.toml; writes its verdict, and a report with pictures.

    `data` are labelled rows (.csv, .parquet, .jsonl, .arrow) with the truth in column `target`; by default
    those that the thresholds name. The version passed if nothing is in `failed` of the result. Raises
    ArtifactError or LifecycleError if it cannot be evaluated; then nothing is written.
    """
    from lifecycle.release.report import write_report

    artifacts, thresholds = root / "artifacts", read_thresholds(root / "evaluation" / THRESHOLDS)
    artifact = read_artifact(artifacts, version)
    manifest, training = artifact.manifest, artifact.manifest.training
    column = target or thresholds.data.target or (training.target if training else None)
    if not column:
        raise LifecycleError(f"{version}: its manifest names no target; say which column with TARGET=...")
    path = data or root / "evaluation" / thresholds.data.file
    if data is None and not path.is_file():
        raise LifecycleError(
            f"no rows to judge {version} by: give DATA=rows.csv with the column {column!r}, or keep "
            f"such rows as evaluation/{thresholds.data.file}"
        )
    rows = read_data(path, column, manifest.outputs.labels, root)
    pipeline = Pipeline.offline(artifact)
    gates = [golden_gate(pipeline)]
    if training and thresholds.data.training_rows == "refuse":
        same = training.data_sha256 == rows.sha256
        gates.append(
            Gate("other rows than in training", "the same" if same else "others", "others", not same)
        )
    answers, served, note, theirs = ask(pipeline, rows), read_release(artifacts).serving, "", None
    if served == version:
        note = f"{version} is the one that serves"
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
    found = Evaluation(verdict, note, rows, answers, cut, gates)
    write_report(found, root / "build" / f"evaluation-{version}")
    write_file(root / "evaluation" / f"{version}.json", canonical_json(verdict.model_dump()))
    return found


def read_data(path: Path, target: str, labels: Sequence[Any], root: Path) -> Data:
    """The rows of `path` with the truth in column `target`; raises LifecycleError for the first bad row."""
    table = read_table(path)
    # The place in the repository, or the file's name alone: a verdict must show no path of a machine.
    name = path.resolve().relative_to(root).as_posix() if path.resolve().is_relative_to(root) else path.name
    if target not in table.column_names:
        raise LifecycleError(f"{name}: has no column {target!r}; say which one with TARGET=...")
    for _ in instances(table, name):
        pass  # validate every row before the first is asked
    known = truths(table.column(target).to_pylist(), labels, name, target)
    return Data(name, sha256(path), target, table, known, [spelling(label) for label in labels])


def ask(pipeline: Pipeline, data: Data) -> Answers:
    """The answers of a version to every row."""
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
    """The metrics of the answered rows among `mask`; {} without answers."""
    if answers is None:
        return {}
    mask = answers.known & mask
    return measure(data.truths[mask], answers.values[mask], data.labels)


def measure(truths: NDArray[Any], values: Floats, labels: Sequence[str]) -> Metrics:
    """Every metric that these rows allow: a classifier's if there are labels, else a regressor's.

    `truths` and `values` as in Data and Answers, without rows that have no answer. `calibration` is the
    expected calibration error, `auc` the mean over labels of each against the rest.
    """
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
    found = {
        "accuracy": right.mean(),
        "calibration": calibration_error(reliability(values.max(axis=1), right)),
    }
    if len(labels) > 1:
        # Probabilities in float32 sum to 1 only nearly, and those of rules and other models need not.
        shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-9)
        every = range(len(labels))
        found["brier"] = metrics.brier_score_loss(truths, shares, labels=[*every], scale_by_half=False)
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
    """The parts of every slice, with the metrics of both versions; raises LifecycleError."""
    found = []
    for one in thresholds.slices:
        name = one.column if one.column in data.table.column_names or one.column != "target" else data.target
        if name not in data.table.column_names:
            raise LifecycleError(f"{data.name}: has no column {name!r}, which {THRESHOLDS} has a slice of")
        cut = []
        for part, mask in parts(data.table.column(name).to_pylist(), one.edges).items():
            rows = int(mask.sum())
            both = measured(data, answers, mask), measured(data, served, mask)
            cut.append(Part(part, rows, rows >= one.minimum_rows, *both))
        found.append((one, cut))
    return found


def parts(column: Sequence[Any], edges: list[float] | None) -> dict[str, Mask]:
    """The rows of each part of a column, by its name: by value, or of numbers by `edges` or quartiles."""
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


def gate(metric: str, found: float | None, threshold: float, where: str = "") -> Gate:
    """The condition that a metric reaches its threshold; a metric that cannot be measured does not."""
    lower = metric in LOWER_IS_BETTER
    passed = found is not None and (found <= threshold if lower else found >= threshold)
    said = "not measurable on these rows" if found is None else f"{found:.4g}"
    return Gate(metric + where, said, f"{'at most' if lower else 'at least'} {threshold:g}", passed)


def against(metric: str, found: float | None, served: float, worse: float, version: str) -> Gate:
    """The condition that a metric is at most `worse` than the served version's."""
    loss = served * worse if metric in LOSS_IS_A_SHARE else worse
    # Rounded, so that the last bits of a computation decide nothing.
    allowed = round(served + loss if metric in LOWER_IS_BETTER else served - loss, 9)
    one = gate(metric, found, allowed, f" against {version}")
    needed = f"{one.needed.rpartition(' ')[0]} {allowed:.4g} ({version} has {served:.4g})"
    return Gate(one.name, one.found, needed, one.passed)


def slice_gates(one: Slice, parts: list[Part], metric: str) -> Iterator[Gate]:
    """The conditions on a metric in the parts of a column."""
    by_name = {part.name: part for part in parts}
    threshold = getattr(one, metric)
    wanted = threshold if isinstance(threshold, dict) else dict.fromkeys(by_name, threshold)
    for name, needed in wanted.items():
        where = f" where {one.column} is {name}"
        if name not in by_name:
            yield Gate(metric + where, "no such rows", f"{needed:g}", passed=False)
        elif by_name[name].judged:
            yield gate(metric, by_name[name].metrics.get(metric), needed, where)


def judge(
    thresholds: Thresholds,
    data: Data,
    answers: Answers,
    own: Metrics,
    sliced: list[tuple[Slice, list[Part]]],
    served: tuple[str, Metrics] | None,
) -> Iterator[Gate]:
    """Every condition on what was measured; `served` is the served version and its metrics."""
    rows, failed, least = data.table.num_rows, answers.failures.total(), thresholds.data.minimum_rows
    yield Gate("rows", str(rows), f"at least {least}", rows >= least)
    codes = ", ".join(f"{count} {code}" for code, count in sorted(answers.failures.items()))
    answered = f"{rows - failed} of {rows}" + (f" ({codes})" if codes else "")
    yield Gate("answered rows", answered, "all", not failed)
    wanted: dict[Any, float] = thresholds.classification if data.labels else thresholds.regression
    for metric, threshold in wanted.items():
        yield gate(metric, own.get(metric), threshold)
    if served:
        version, theirs = served
        for metric, worse in thresholds.against_served.items():
            if metric in theirs:
                yield against(metric, own.get(metric), theirs[metric], worse, version)
    for one, parts in sliced:
        for metric in ("accuracy",) if data.labels else ("rmse", "mae"):
            if getattr(one, metric) is not None:
                yield from slice_gates(one, parts, metric)


def golden_gate(pipeline: Pipeline) -> Gate:
    """The condition that every golden row gets the recorded answer."""
    found = needed = "the recorded answers"
    try:
        pipeline.model.replay()
    except ArtifactError as error:
        found = str(error)
    return Gate("golden set", found, needed, found == needed)
