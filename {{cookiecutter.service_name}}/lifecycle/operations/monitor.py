"""The drift of a running service from training, and the quality of its answers.

Prometheus, a scrape of /metrics, or the log -> rows by bin -> PSI against baseline.json -> table, pictures
predictions in the log + true labels by prediction_id -> by version: accuracy, calibration and confusion of
labels, errors of values -> tables, pictures
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from app.core.store import read_artifact
from lifecycle.command import (
    BINS,
    ROOT,
    LifecycleError,
    calibration_error,
    plot_reliability,
    reliability,
    save_picture,
    table,
)

if TYPE_CHECKING:
    import pandas as pd  # slow to import: done in the functions that need it

# As in ops/prometheus/drift_rules.yml; with fewer than MINIMUM rows there is no verdict.
MINIMUM, FLOOR, STABLE, DRIFTED = 300, 0.001, 0.1, 0.2
PREDICTION = "(prediction)"
SERIES = {
    "feature_observations_total": "model_version,feature,bin",
    "predictions_total": "model_version,label",
}
MOST_DOTS = 5000  # in a picture

Counts = defaultdict[tuple[str, str], Counter[str]]  # rows by bin, of (version, feature or PREDICTION)
Prometheus = Annotated[str, typer.Option(envvar="PROMETHEUS", help="Ask this Prometheus.")]
Scrape = Annotated[Path | None, typer.Option(envvar="METRICS", help="Or read a saved answer of /metrics.")]
Window = Annotated[str, typer.Option(envvar="WINDOW", help="How far to look back in Prometheus.")]
Pictures = Annotated[Path, typer.Option(help="Where pictures go.")]


def drift(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    logs: Annotated[
        Path | None, typer.Option(envvar="LOGS", help="Or read the `drift` lines of a log.")
    ] = None,
    window: Window = "1h",
    artifacts: Annotated[Path, typer.Option(help="Folder of the versions.")] = ROOT / "artifacts",
    pictures: Pictures = ROOT / "build",
) -> None:
    """Show how far inputs and predictions have moved from training (PSI), and draw those that drifted."""
    if metrics and logs:
        raise LifecycleError("give METRICS or LOGS, not both")
    counts = logged(logs) if logs else observed(prometheus, window, metrics)
    found: list[Moved] = []
    for version in sorted({version for version, _ in counts}):
        # A rules model has no baseline.
        if baseline := read_artifact(artifacts, version).files.get("baseline.json"):
            found += compare(version, json.loads(baseline), counts)
    if not found:
        source = metrics or logs or prometheus
        raise LifecycleError(f"{source}: nothing was observed of a version that has a baseline")
    typer.echo(drift_table(found))
    for one in found:
        if one.verdict == "drifted":
            typer.echo(f"picture: {draw_drift(one, pictures)}")


def quality(
    logs: Annotated[Path | None, typer.Option(envvar="LOGS", help="The service's log.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            envvar="LABELS", help="CSV or JSON lines: prediction_id, label; else feedback in the log."
        ),
    ] = None,
    pictures: Pictures = ROOT / "build",
) -> None:
    """Show how often each version was right, and whether its scores are calibrated."""
    if logs is None:
        raise LifecycleError("say which log: LOGS=service.log")
    for version, known in judged(logs, labels).items():
        lines = _classified(version, known) if "label" in known else _measured(version, known)
        typer.echo(f"{lines}\n\npicture: {draw_quality(version, known, pictures)}\n")


def ask(address: str, query: str) -> list[tuple[dict[str, str], float]]:
    """The result of an instant query to Prometheus: labels and value of each series."""
    import httpx2  # here: slow to import

    try:
        answer = httpx2.get(f"{address.rstrip('/')}/api/v1/query", params={"query": query}, timeout=10)
        series = answer.raise_for_status().json()["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in series]
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, KeyError) as error:
        raise LifecycleError(f"{address}: no answer from Prometheus ({_words(error)})") from None


def scraped(path: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample in a saved answer of /metrics."""
    try:
        for family in text_string_to_metric_families(path.read_text("utf-8", errors="replace")):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise LifecycleError(f"{path}: not a scrape of /metrics ({_words(error)})") from None


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log, also if a log collector has put a prefix on each line."""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            document = json.loads(line[line.find("{") :])
        except ValueError:
            continue
        if isinstance(document, dict):
            yield document


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def logged(path: Path) -> Counts:
    """Rows by bin in the `drift` lines of a log."""
    counts: Counts = defaultdict(Counter)
    for line in log_lines(path):
        if line.get("event") == "drift":
            for name, bins in (line["features"] | {PREDICTION: line["predictions"]}).items():
                counts[line["model_version"], name].update(bins)
    return counts


def observed(prometheus: str, window: str, metrics: Path | None) -> Counts:
    """Rows by bin: since the start of the service from a scrape, or in the last `window` of Prometheus."""
    counts: Counts = defaultdict(Counter)
    if metrics:
        samples = [(labels, value) for name, labels, value in scraped(metrics) if name in SERIES]
    else:
        queries = (f"sum by ({by}) (increase({name}[{window}]))" for name, by in SERIES.items())
        samples = [sample for query in queries for sample in ask(prometheus, query)]
    for labels, value in samples:
        feature, bin_ = labels.get("feature", PREDICTION), labels.get("bin") or labels["label"]
        counts[labels["model_version"], feature][bin_] += value  # type: ignore[assignment]  # increase() is a float
    return counts


class Moved(NamedTuple):
    """A feature of a version compared with its baseline; shares and terms have an entry per bin."""

    version: str
    feature: str
    rows: float
    bins: list[str]
    then: NDArray[np.float64]
    now: NDArray[np.float64]
    terms: NDArray[np.float64]  # contribution of each bin to the index
    trained: bool  # whether training had enough rows for a meaningful index

    @property
    def psi(self) -> float:
        """The population stability index."""
        return float(self.terms.sum())

    @property
    def verdict(self) -> str:
        """`too few rows`, `stable`, `moving` or `drifted`."""
        if not self.trained or self.rows < MINIMUM:
            return "too few rows"
        return "stable" if self.psi < STABLE else "moving" if self.psi <= DRIFTED else "drifted"


def compare(version: str, baseline: dict[str, Any], counts: Counts) -> list[Moved]:
    """Every feature of `version`, and its predictions, compared with the baseline."""
    from app.monitoring.drift import settled  # here: slow to import

    expected = {name: baseline_counts(feature) for name, feature in baseline["features"].items()}
    values = baseline.get("values")  # of a regressor
    expected[PREDICTION] = baseline_counts(values) if values else Counter(baseline["labels"])
    found = []
    for name, counted in expected.items():
        rows = float(counts[version, name].total())
        then = np.array([*counted.values()]) / baseline["rows"]
        now = np.array([counts[version, name][bin_] for bin_ in counted]) / max(rows, 1e-9)
        low, high = np.maximum(then, FLOOR), np.maximum(now, FLOOR)
        terms, trained = (high - low) * np.log(high / low), settled(counted.values(), baseline["rows"])
        found.append(Moved(version, name, rows, [*counted], then, now, terms, trained))
    return found


def trained_features(root: Path, version: str) -> set[str]:
    """Features of `version`, and PREDICTION, for which training had enough rows for the index."""
    content = read_artifact(root, version).files.get("baseline.json", b"")
    moved = compare(version, json.loads(content), defaultdict(Counter)) if content else []
    return {one.feature for one in moved if one.trained}


def baseline_counts(feature: dict[str, Any]) -> Counter[str]:
    """Training rows by bin, including `missing` and `other`."""
    counts = Counter(dict(zip(feature["bins"], feature["counts"], strict=True)))
    counts.update({key: feature[key] for key in ("missing", "other") if key in feature})
    return counts


def drift_table(found: Sequence[Moved]) -> str:
    """A table with a line per feature."""
    rows = []
    for one in found:
        most = int(one.terms.argmax())
        moved = f"{one.bins[most]}: {one.then[most]:.0%} in training, {one.now[most]:.0%} now"
        psi = "-" if one.verdict == "too few rows" else f"{one.psi:.3f}"
        rows += [(*one[:2], psi, one.verdict, f"{one.rows:,.0f}", moved if one.rows else "-")]
    return table(("version", "feature", "PSI", "verdict", "rows", "moved most"), rows)


def draw_drift(moved: Moved, folder: Path) -> Path:
    """Write a picture of the share of each bin, in training and now; returns its path."""
    import pandas as pd

    figure = _figure(max(5, len(moved.bins)))
    axes = figure.subplots()
    shares = pd.DataFrame({"training": moved.then, "now": moved.now}, moved.bins)
    shares.plot.bar(ax=axes, rot=0, ylabel="share of rows")
    for bars in axes.containers:
        axes.bar_label(bars, fmt="{:.0%}")
    axes.set_title(f"{moved.feature}, {moved.version}: PSI {moved.psi:.3f}")
    return save_picture(figure, folder, f"drift-{moved.version}-{moved.feature}")


def _figure(width: float) -> Any:
    from matplotlib.figure import Figure  # here: takes a second

    return Figure(figsize=(width, 4.5), layout="constrained")


def judged(logs: Path, labels: Path | None) -> dict[Any, "pd.DataFrame"]:
    """By version, the predictions in the log with known truth, from `labels` or else from feedback.

    The frame of a classifier has label, truth (both as text) and score, that of a regressor value and truth.
    """
    import pandas as pd

    from lifecycle.tables import spelling

    made: dict[str, dict[str, Any]] = {}
    truths: dict[str, str] = {}
    for line in log_lines(logs):
        for one in line.get("predictions", []) if isinstance(line.get("thresholds"), dict) else []:
            made[one["prediction_id"]] = {"version": line["model_version"], **one}
        if line.get("news"):
            truths[line["prediction_id"]] = spelling(line["feedback"])
    if not made:
        raise LifecycleError(f"{logs}: no predictions in this log; they are logged at APP_LOG_LEVEL=INFO")
    if labels is not None:
        truths = _labels(labels, text=any(isinstance(one.get("label"), str) for one in made.values()))
    known = pd.DataFrame([one | {"truth": truths[id_]} for id_, one in made.items() if id_ in truths])
    if known.empty:
        source = labels or "feedback"
        raise LifecycleError(f"none of the {len(made)} predictions in {logs} has a label from {source}")
    if "label" in known:
        known["label"] = known.label.map(spelling)
    else:
        known["truth"] = pd.to_numeric(known.truth, errors="coerce")
        for wrong in known.prediction_id[known.truth.isna()]:
            raise LifecycleError(f"{wrong} has a truth that is no number")
    return dict([*known.groupby("version")])


def _labels(path: Path, *, text: bool) -> dict[str, str]:
    """Label by prediction_id, from any data file with these columns; the last label of an id counts."""
    from lifecycle.formats import TEXT, format_of  # here: pyarrow takes a second
    from lifecycle.tables import read_table, spelling

    columns = ("prediction_id", "label")
    wanted = dict.fromkeys(columns if text else columns[:1], "string")
    try:
        table = read_table(path, wanted, columns)
        bad = 0 if {*columns} <= {*table.column_names} else 1
    except LifecycleError as error:
        if not (ragged := re.search(r"Row #(\d+)", str(error))):
            raise
        bad = int(ragged[1])
    pairs = [] if bad else [*zip(*(table.column(name).to_pylist() for name in columns), strict=True)]
    first = 2 if format_of(path) in TEXT else 1  # count the header
    bad = bad or next((row for row, pair in enumerate(pairs, first) if None in pair), 0)
    if bad:
        raise LifecycleError(f"{path}:{bad}: needs prediction_id and label, as CSV or JSON lines")
    return {id_.strip(): spelling(label) for id_, label in pairs}


def _classified(version: str, known: "pd.DataFrame") -> str:
    """Tables of accuracy, calibration and confusion."""
    import pandas as pd

    bins = reliability(known.score, known.label == known.truth)
    scores = [
        (f"{tenth / BINS:.1f} to {(tenth + 1) / BINS:.1f}", f"{count:,}", f"{score:.3f}", f"{right:.3f}")
        for tenth, count, score, right in bins.itertuples(name=None)
    ]
    labels, accuracy = sorted({*known.truth, *known.label}), (known.label == known.truth).mean()
    cells = pd.crosstab(known.truth, known.label).reindex(index=labels, columns=labels, fill_value=0)
    return (
        f"{version}: {len(known):,} predictions with a label, "
        f"accuracy {accuracy:.3f}, calibration error {calibration_error(bins):.3f}\n\n"
        f"{table(('score', 'predictions', 'mean score', 'right'), scores)}\n\n"
        f"{table(('true, predicted', *labels), cells.itertuples(name=None))}"
    )


def _measured(version: str, known: "pd.DataFrame") -> str:
    """RMSE, MAE and bias (positive if predictions are too large): overall and by tenths."""

    def errors(part: "pd.DataFrame") -> tuple[str, str, str]:
        off = part.value - part.truth
        return f"{(off**2).mean() ** 0.5:.4g}", f"{off.abs().mean():.4g}", f"{off.mean():+.4g}"

    ordered = known.sort_values("value")
    parts = map(ordered.iloc.__getitem__, np.array_split(np.arange(len(known)), min(BINS, len(known))))
    rows = [
        (f"{one.value.min():.4g} to {one.value.max():.4g}", f"{len(one):,}", *errors(one)) for one in parts
    ]
    rmse, mae, bias = errors(known)
    return (
        f"{version}: {len(known):,} predictions with a true value, RMSE {rmse}, MAE {mae}, bias {bias}\n\n"
        + table(("predicted", "predictions", "RMSE", "MAE", "bias"), rows)
    )


def draw_quality(version: str, known: "pd.DataFrame", folder: Path) -> Path:
    """Write a picture of calibration and confusion, or of a regressor's errors; returns its path."""
    from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay  # here: takes a second

    figure, truth = _figure(10), known.truth
    if "label" in known:
        left, right = figure.subplots(1, 2)
        plot_reliability(left, reliability(known.score, known.label == truth))
        ConfusionMatrixDisplay.from_predictions(truth, known.label, ax=right, cmap="Blues", colorbar=False)
    else:
        dots = {"subsample": min(MOST_DOTS, len(known)), "random_state": 0}
        PredictionErrorDisplay.from_predictions(truth, known.value, ax=figure.subplots(), **dots)
    figure.suptitle(f"{version}, {len(known):,} predictions")
    return save_picture(figure, folder, f"quality-{version}")
