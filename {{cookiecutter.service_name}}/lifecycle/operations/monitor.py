"""How the model does where it serves: what has moved since training, and how often it is right.

Prometheus, a scrape of /metrics, or the log -> rows by bin -> PSI against baseline.json -> table, pictures
predictions in the log + truth by prediction_id -> by version, of labels accuracy, calibration and confusion,
  of values errors -> the same
"""

import csv
import json
import math
import re
import urllib.error
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from prometheus_client.parser import text_string_to_metric_families

from app.core.errors import ArtifactError
from app.core.store import read_artifact
from app.monitoring.drift import settled
from load.profile import get, picture, text

ROOT = Path(__file__).resolve().parents[2]
# As in ops/prometheus/drift_rules.yml.
MINIMUM, FLOOR, STABLE, DRIFTED = 300, 0.001, 0.1, 0.2
PREDICTION = "(prediction)"
THEN, NOW = "#4878a8", "#d08030"
MOST_DOTS = 5000  # in a picture

Prometheus = Annotated[str, typer.Option(envvar="PROMETHEUS", help="Ask this Prometheus.")]
Scrape = Annotated[Path | None, typer.Option(envvar="METRICS", help="Or read a saved answer of /metrics.")]
Window = Annotated[str, typer.Option(envvar="WINDOW", help="How far to look back in Prometheus.")]
Counts = defaultdict[tuple[str, str], Counter[str]]  # rows by bin, of (version, feature or PREDICTION)


class UnusableError(Exception):
    """What was given cannot be used; one line."""


@dataclass(frozen=True)
class Moved:
    """One feature of one version beside its baseline; the lists have an entry a bin.

    `trained` says whether training had rows enough for the index to mean something.
    """

    version: str
    feature: str
    rows: float
    bins: list[str]
    then: list[float]
    now: list[float]
    trained: bool

    @property
    def psi(self) -> float:
        """The population stability index."""
        return sum(map(_term, self.then, self.now))

    @property
    def enough(self) -> bool:
        """Whether there are rows enough, then and now."""
        return self.trained and self.rows >= MINIMUM

    @property
    def verdict(self) -> str:
        """What it says, in a word or two."""
        if not self.enough:
            return "too few rows"
        return "stable" if self.psi < STABLE else "moving" if self.psi <= DRIFTED else "drifted"

    @property
    def most(self) -> int:
        """The bin that adds most to the index."""
        return max(range(len(self.bins)), key=lambda index: _term(self.then[index], self.now[index]))


def _term(then: float, now: float) -> float:
    then, now = max(then, FLOOR), max(now, FLOOR)
    return (now - then) * math.log(now / then)


def compare(version: str, baseline: dict[str, Any], counts: Counts) -> list[Moved]:
    """Every feature of `version`, and what it predicts, beside the baseline."""
    expected = {name: _baseline_counts(feature) for name, feature in baseline["features"].items()}
    found = []
    values = baseline.get("values")  # a regressor's
    predicted = _baseline_counts(values) if values else Counter(baseline["labels"])
    for name, then in (expected | {PREDICTION: predicted}).items():
        now = counts[version, name]
        rows, bins = sum(now.values()), list(then)
        shares = [now[bin_] / max(rows, 1e-9) for bin_ in bins]
        trained = settled(then.values(), baseline["rows"])
        before = [count / baseline["rows"] for count in then.values()]
        found.append(Moved(version, name, rows, bins, before, shares, trained))
    return found


def trained_features(root: Path, version: str) -> set[str]:
    """Features of `version`, and PREDICTION, of which training had rows enough for the index."""
    content = read_artifact(root, version).files.get("baseline.json", b"")
    moved = compare(version, json.loads(content), defaultdict(Counter)) if content else []
    return {one.feature for one in moved if one.trained}


def _baseline_counts(feature: dict[str, Any]) -> Counter[str]:
    counts = Counter(dict(zip(feature["bins"], feature["counts"], strict=True)))
    counts.update({key: feature[key] for key in ("missing", "other") if key in feature})
    return counts


def from_prometheus(address: str, window: str) -> Counts:
    """Rows by bin in the last `window`, such as 1h."""
    counts: Counts = defaultdict(Counter)
    for metric, labels in (
        ("feature_observations_total", ("model_version", "feature", "bin")),
        ("predictions_total", ("model_version", "label")),
    ):
        for found, value in ask(address, f"sum by ({','.join(labels)}) (increase({metric}[{window}]))"):
            _add(counts, found, value)
    return counts


def ask(address: str, query: str) -> list[tuple[dict[str, str], float]]:
    """What Prometheus answers: labels and value of each series."""
    try:
        url = f"{address.rstrip('/')}/api/v1/query?query={urllib.parse.quote(query)}"
        series = json.loads(get(url))["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in series]
    except (OSError, ValueError, KeyError) as error:
        raise UnusableError(f"{address}: no answer from Prometheus ({_words(error)})") from None


def from_scrape(path: Path) -> Counts:
    """Rows by bin since the service started, from what /metrics gave."""
    counts: Counts = defaultdict(Counter)
    for name, labels, value in scraped(path):
        if name in ("feature_observations_total", "predictions_total"):
            _add(counts, labels, value)
    return counts


def scraped(path: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample in a saved answer of /metrics."""
    try:
        for family in text_string_to_metric_families(_read(path)):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise UnusableError(f"{path}: not a scrape of /metrics ({_words(error)})") from None


def from_log(path: Path) -> Counts:
    """Rows by bin in the `drift` lines of a log."""
    counts: Counts = defaultdict(Counter)
    for line in _lines(path):
        if line.get("event") == "drift":
            version = line["model_version"]
            for name, bins in line["features"].items():
                counts[version, name].update(bins)
            counts[version, PREDICTION].update(line["predictions"])
    return counts


def _add(counts: Counts, labels: dict[str, str], value: float) -> None:
    feature, bin_ = labels.get("feature", PREDICTION), labels.get("bin") or labels["label"]
    counts[labels["model_version"], feature][bin_] += value  # type: ignore[assignment]  # increase() is no whole number


def drift_table(found: Sequence[Moved]) -> str:
    """A line a feature."""
    width = max(len(one.feature) for one in found)
    lines = [f"version  {'feature':<{width}}     PSI  verdict           rows  moved most"]
    for one in found:
        index = f"{one.psi:.3f}" if one.enough else "-"
        most = f"{one.bins[one.most]}: {one.then[one.most]:.0%} in training, {one.now[one.most]:.0%} now"
        lines.append(
            f"{one.version:<7}  {one.feature:<{width}}  {index:>6}  {one.verdict:<12} {one.rows:>9,.0f}  "
            + (most if one.rows else "-")
        )
    return "\n".join(lines)


def drift_picture(moved: Moved) -> str:
    """Training and now, bin by bin, as SVG."""
    top, step = max(*moved.then, *moved.now, 1e-9), 96
    parts = [text(16, 24, f"{moved.feature}, {moved.version}: PSI {moved.psi:.3f}", "start")]
    parts += [text(16, 44, "training", "start", THEN), text(80, 44, "now", "start", NOW)]
    for index, bin_ in enumerate(moved.bins):
        left = 16 + index * step
        for shift, share, colour in ((12, moved.then[index], THEN), (48, moved.now[index], NOW)):
            height = 150 * share / top
            parts.append(
                f'<rect x="{left + shift}" y="{240 - height:.1f}" width="32" height="{height:.1f}" '
                f'fill="{colour}"/>'
            )
            parts.append(text(left + shift + 16, 234 - height, f"{share:.0%}"))
        parts.append(text(left + step / 2, 260, bin_))
    return picture(max(32 + step * len(moved.bins), 360), 280, parts)


def drift(
    prometheus: Prometheus = "http://127.0.0.1:9090",
    metrics: Scrape = None,
    logs: Annotated[
        Path | None, typer.Option(envvar="LOGS", help="Or read the `drift` lines of a log.")
    ] = None,
    window: Window = "1h",
    artifacts: Annotated[Path, typer.Option(help="Folder of the versions.")] = ROOT / "artifacts",
    pictures: Annotated[Path, typer.Option(help="Where a picture of each drifted feature goes.")] = ROOT
    / "build",
) -> None:
    """Say how far inputs and predictions have moved from training (PSI), and show what drifted."""
    try:
        if metrics and logs:
            raise UnusableError("give METRICS or LOGS, not both")
        counts = (
            from_scrape(metrics)
            if metrics
            else from_log(logs)
            if logs
            else from_prometheus(prometheus, window)
        )
        source = metrics or logs or prometheus
        found: list[Moved] = []
        for version in sorted({version for version, _ in counts}):
            baseline = read_artifact(artifacts, version).files.get("baseline.json")
            if baseline is None:
                typer.echo(f"drift: {version} has no baseline, being made of rules", err=True)
            else:
                found += compare(version, json.loads(baseline), counts)
        if not found:
            raise UnusableError(f"{source}: nothing was observed of a version that has a baseline")
    except (UnusableError, ArtifactError) as error:
        typer.echo(f"drift: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(drift_table(found))
    for moved in found:
        if moved.verdict == "drifted":
            _write(pictures / f"drift-{moved.version}-{moved.feature}", drift_picture(moved))


@dataclass(frozen=True)
class Judged:
    """A prediction whose truth is known; labels as text."""

    label: str
    truth: str
    score: float

    @property
    def right(self) -> bool:
        """Whether it was."""
        return self.label == self.truth


@dataclass(frozen=True)
class Measured:
    """A regressor's prediction whose truth is known."""

    value: float
    truth: float

    @property
    def error(self) -> float:
        """By how much it was too large."""
        return self.value - self.truth


def join(logs: Path, labels: Path | None) -> dict[str, list[Judged | Measured]]:
    """Predictions in the log with the truth, by version; without a file of labels that of feedback."""
    made: dict[str, tuple[str, dict[str, Any]]] = {}
    truths: dict[str, str] = {}
    for line in _lines(logs):
        for one in line.get("predictions", []) if isinstance(line.get("thresholds"), dict) else []:
            made[one["prediction_id"]] = (line["model_version"], one)
        if line.get("news"):
            truths[line["prediction_id"]] = _label(line["feedback"])
    if not made:
        raise UnusableError(f"{logs}: no predictions in this log; they are logged at APP_LOG_LEVEL=INFO")
    if labels is not None:
        truths = dict(_labels(labels))
    by_version: defaultdict[str, list[Judged | Measured]] = defaultdict(list)
    for prediction_id, (version, one) in made.items():
        if (truth := truths.get(prediction_id)) is not None:
            by_version[version].append(_judged(one, truth))
    if not by_version:
        source = labels or "feedback"
        raise UnusableError(f"none of the {len(made)} predictions in {logs} has a label from {source}")
    return dict(sorted(by_version.items()))


def _judged(one: dict[str, Any], truth: str) -> Judged | Measured:
    if "label" in one:
        return Judged(_label(one["label"]), truth, float(one["score"]))
    try:
        return Measured(float(one["value"]), float(truth))
    except ValueError:
        words = f"{one['prediction_id']} has a truth that is no number"
        raise UnusableError(words) from None


def _labels(path: Path) -> Iterator[tuple[str, str]]:
    """prediction_id and label, from JSON lines or from CSV with these columns; the last of an id counts."""
    content = _read(path)
    if content.lstrip().startswith("{"):
        rows: Iterable[Any] = enumerate(content.splitlines(), 1)
    else:
        rows = enumerate(csv.DictReader(content.splitlines()), 2)
    for number, row in rows:
        try:
            if isinstance(row, str):
                if not row.strip():
                    continue
                row = json.loads(row)
            prediction_id, label = row["prediction_id"], row["label"]
        except (ValueError, KeyError, TypeError):
            label = None
        if label in (None, "") or not isinstance(prediction_id, str):
            raise UnusableError(f"{path}:{number}: needs prediction_id and label, as CSV or JSON lines")
        yield prediction_id.strip(), _label(label)


def _label(label: Any) -> str:
    """As CSV has it too: 1 is 1 and true is true."""
    return label.strip() if isinstance(label, str) else json.dumps(label)


@dataclass(frozen=True)
class Bin:
    """Predictions with scores up to `high`."""

    low: float
    high: float
    count: int
    score: float  # mean
    right: float  # share


def reliability(judged: Sequence[Judged]) -> list[Bin]:
    """Tenths of the score that have predictions: what they promised, and what was right."""
    tenths: defaultdict[int, list[Judged]] = defaultdict(list)
    for one in judged:
        tenths[min(int(one.score * 10), 9)].append(one)
    return [
        Bin(
            tenth / 10,
            (tenth + 1) / 10,
            len(own),
            sum(one.score for one in own) / len(own),
            sum(one.right for one in own) / len(own),
        )
        for tenth, own in sorted(tenths.items())
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """ECE: how far scores are from the share that was right, on average over predictions."""
    return sum(one.count * abs(one.score - one.right) for one in bins) / sum(one.count for one in bins)


def confusion(judged: Sequence[Judged]) -> tuple[list[str], Counter[tuple[str, str]]]:
    """Labels, and predictions by (true label, predicted label)."""
    labels = sorted({label for one in judged for label in (one.truth, one.label)})
    return labels, Counter((one.truth, one.label) for one in judged)


def quality_report(version: str, judged: Sequence[Judged]) -> str:
    """Accuracy, calibration and confusion of one version."""
    bins, (labels, cells) = reliability(judged), confusion(judged)
    accuracy = sum(one.right for one in judged) / len(judged)
    lines = [
        f"{version}: {len(judged):,} predictions with a label, accuracy {accuracy:.3f}, "
        f"calibration error {calibration_error(bins):.3f}",
        "",
        "  score       predictions  mean score  right",
        *(
            f"  {one.low:.1f} to {one.high:.1f}  {one.count:>11,}  {one.score:>10.3f}  {one.right:>5.3f}"
            for one in bins
        ),
        "",
    ]
    width = max(map(len, (*labels, "true, predicted")))
    lines.append(f"  {'true, predicted':<{width}}  " + "  ".join(f"{label:>8}" for label in labels))
    for truth in labels:
        row = "  ".join(f"{cells[truth, label]:>{max(8, len(label))},}" for label in labels)
        lines.append(f"  {truth:<{width}}  {row}")
    return "\n".join(lines) + "\n"


def quality_picture(version: str, judged: Sequence[Judged]) -> str:
    """Calibration on the left, confusion on the right, as SVG."""
    bins, (labels, cells) = reliability(judged), confusion(judged)
    parts = [
        text(16, 24, f"{version}: right against score", "start"),
        text(400, 24, "true, predicted", "start"),
    ]
    parts.append(
        '<path d="M50 250h200v-200" fill="none" stroke="#ddd"/><path d="M50 250L250 50" stroke="#999"/>'
    )
    parts += [text(50, 268, "0"), text(250, 268, "1"), text(42, 54, "1", "end"), text(150, 268, "score")]
    most = max(one.count for one in bins)
    for one in bins:
        radius = 3 + 9 * math.sqrt(one.count / most)
        x, y = 50 + 200 * one.score, 250 - 200 * one.right
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{THEN}" opacity="0.8"/>')
    side = 90
    for row, truth in enumerate(labels):
        own = max(sum(cells[truth, label] for label in labels), 1)
        parts.append(text(400, 84 + 36 * row, truth, "start"))
        parts.append(text(560 + side * row, 54, truth))
        for column, label in enumerate(labels):
            colour, share = THEN if truth == label else NOW, cells[truth, label] / own
            parts.append(
                f'<rect x="{515 + side * column}" y="{62 + 36 * row}" width="{side - 4}" height="32" '
                f'fill="{colour}" opacity="{0.08 + 0.8 * share:.2f}"/>'
            )
            parts.append(text(560 + side * column, 82 + 36 * row, f"{cells[truth, label]:,}"))
    return picture(530 + side * len(labels), max(290, 80 + 36 * len(labels)), parts)


def error_report(version: str, measured: Sequence[Measured]) -> str:
    """RMSE, MAE and bias of one version, in all and from the least predictions to the largest."""
    figures = _errors(measured)
    lines = [
        f"{version}: {len(measured):,} predictions with a true value, "
        f"RMSE {figures[0]:.4g}, MAE {figures[1]:.4g}, bias {figures[2]:+.4g}",
        "",
        "  predicted                  predictions       RMSE        MAE       bias",
    ]
    ordered = sorted(measured, key=lambda one: one.value)
    tenths = min(10, len(ordered))
    for tenth in range(tenths):
        own = ordered[tenth * len(ordered) // tenths : (tenth + 1) * len(ordered) // tenths]
        figures = _errors(own)
        lines.append(
            f"  {own[0].value:>10.4g} to {own[-1].value:<10.4g}  {len(own):>12,} {figures[0]:>10.4g} "
            f"{figures[1]:>10.4g} {figures[2]:>+10.4g}"
        )
    return "\n".join(lines) + "\n"


def _errors(measured: Sequence[Measured]) -> tuple[float, float, float]:
    """Root of the mean square, mean of the absolute, and mean of the errors."""
    errors, count = [one.error for one in measured], len(measured)
    return (
        math.sqrt(sum(error * error for error in errors) / count),
        sum(map(abs, errors)) / count,
        sum(errors) / count,
    )


def error_picture(version: str, measured: Sequence[Measured]) -> str:
    """The error of each prediction against its value, as SVG."""
    values, errors = [one.value for one in measured], [one.error for one in measured]
    low, wide = min(values), max(max(values) - min(values), 1e-9)
    most = max(*map(abs, errors), 1e-9)
    parts = [text(16, 24, f"{version}: predicted less true, against predicted", "start")]
    parts.append('<path d="M60 50v200h400M60 150h400" fill="none" stroke="#999"/>')
    parts += [text(54, 58, f"{most:+.3g}", "end"), text(54, 154, "0", "end")]
    parts += [text(54, 252, f"{-most:+.3g}", "end"), text(60, 268, f"{low:.4g}")]
    parts.append(text(460, 268, f"{low + wide:.4g}"))
    for value, error in zip(values[-MOST_DOTS:], errors[-MOST_DOTS:], strict=True):
        x, y = 60 + 400 * (value - low) / wide, 150 - 96 * error / most
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{THEN}" opacity="0.5"/>')
    return picture(500, 290, parts)


def quality(
    logs: Annotated[Path | None, typer.Option(envvar="LOGS", help="The service's log.")] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            envvar="LABELS", help="CSV or JSON lines: prediction_id, label; else feedback in the log."
        ),
    ] = None,
    pictures: Annotated[Path, typer.Option(help="Where a picture of each version goes.")] = ROOT / "build",
) -> None:
    """Say how often each version was right, and whether its scores mean what they say."""
    try:
        if logs is None:
            raise UnusableError("say which log: LOGS=service.log")
        by_version = join(logs, labels)
    except UnusableError as error:
        typer.echo(f"quality: {error}", err=True)
        raise typer.Exit(1) from None
    for version, known in by_version.items():
        judged = [one for one in known if isinstance(one, Judged)]
        measured = [one for one in known if isinstance(one, Measured)]
        if judged:
            typer.echo(quality_report(version, judged))
            _write(pictures / f"quality-{version}", quality_picture(version, judged))
        if measured:
            typer.echo(error_report(version, measured))
            _write(pictures / f"quality-{version}", error_picture(version, measured))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a log, also where a collector put something in front of them."""
    for line in _read(path).splitlines():
        try:
            document = json.loads(line[line.find("{") :])
        except ValueError:
            continue
        if isinstance(document, dict):
            yield document


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise UnusableError(f"{path}: {error.strerror or 'cannot be read'}") from None


def _write(stem: Path, svg: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.parent / (re.sub(r"[^\w.-]+", "_", stem.name) + ".svg")
    path.write_text(svg, "utf-8")
    typer.echo(f"picture: {path}")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
