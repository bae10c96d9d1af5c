"""How far inputs and predictions have moved from training.

Prometheus, a scrape of /metrics, or the log -> rows by bin -> PSI against baseline.json -> table, pictures
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.store import read_artifact
from app.monitoring.drift import settled
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT
from lifecycle.operations.sources import MINIMUM, ask, log_lines, scraped
from lifecycle.printing import save_picture, table

FLOOR, STABLE, DRIFTED = 0.001, 0.1, 0.2  # as in ops/prometheus/drift_rules.yml
PREDICTION = "(prediction)"
Counts = defaultdict[tuple[str, str], Counter[str]]  # rows by bin, of (version, feature or PREDICTION)


@dataclass(frozen=True, eq=False)
class Moved:
    """One feature of one version beside its baseline; `bins` and the shares have an entry a bin.

    `trained` says whether training had enough rows for the index to mean something.
    """

    version: str
    feature: str
    rows: float
    bins: list[str]
    then: NDArray[np.float64]
    now: NDArray[np.float64]
    trained: bool

    @property
    def terms(self) -> NDArray[np.float64]:
        """What each bin adds to the index."""
        then, now = np.maximum(self.then, FLOOR), np.maximum(self.now, FLOOR)
        return np.asarray((now - then) * np.log(now / then))

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
    """Every feature of `version`, and its predictions, beside the baseline."""
    expected = {name: _baseline_counts(feature) for name, feature in baseline["features"].items()}
    values = baseline.get("values")  # a regressor's
    expected[PREDICTION] = _baseline_counts(values) if values else Counter(baseline["labels"])
    found = []
    for name, then in expected.items():
        now = np.array([counts[version, name][bin_] for bin_ in then], float)
        rows = float(counts[version, name].total())
        trained = settled(then.values(), baseline["rows"])
        before = np.array([*then.values()]) / baseline["rows"]
        found.append(Moved(version, name, rows, [*then], before, now / max(rows, 1e-9), trained))
    return found


def moved(
    prometheus: str = "http://127.0.0.1:9090",
    window: str = "1h",
    *,
    metrics: Path | None = None,
    logs: Path | None = None,
    artifacts: Path = ROOT / "artifacts",
) -> list[Moved]:
    """How far every feature of the versions in traffic has moved, by Prometheus or else a saved file."""
    if metrics and logs:
        raise LifecycleError("give METRICS or LOGS, not both")
    if metrics:
        counts = from_scrape(metrics)
    elif logs:
        counts = from_log(logs)
    else:
        counts = from_prometheus(prometheus, window)
    found: list[Moved] = []
    for version in sorted({version for version, _ in counts}):
        # A version that consists of rules has no baseline.
        if baseline := read_artifact(artifacts, version).files.get("baseline.json"):
            found += compare(version, json.loads(baseline), counts)
    if not found:
        source = metrics or logs or prometheus
        raise LifecycleError(f"{source}: nothing was observed of a version that has a baseline")
    return found


def trained_features(root: Path, version: str) -> set[str]:
    """Features of `version`, and PREDICTION, for which training had enough rows for the index."""
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
        ("feature_observations_total", "model_version,feature,bin"),
        ("predictions_total", "model_version,label"),
    ):
        for found, value in ask(address, f"sum by ({labels}) (increase({metric}[{window}]))"):
            _add(counts, found, value)
    return counts


def from_scrape(path: Path) -> Counts:
    """Rows by bin since the service started, from a saved answer of /metrics."""
    counts: Counts = defaultdict(Counter)
    for name, labels, value in scraped(path):
        if name in ("feature_observations_total", "predictions_total"):
            _add(counts, labels, value)
    return counts


def from_log(path: Path) -> Counts:
    """Rows by bin in the `drift` lines of a log."""
    counts: Counts = defaultdict(Counter)
    for line in log_lines(path):
        if line.get("event") == "drift":
            for name, bins in (line["features"] | {PREDICTION: line["predictions"]}).items():
                counts[line["model_version"], name].update(bins)
    return counts


def _add(counts: Counts, labels: dict[str, str], value: float) -> None:
    feature, bin_ = labels.get("feature", PREDICTION), labels.get("bin") or labels["label"]
    counts[labels["model_version"], feature][bin_] += value  # type: ignore[assignment]  # increase() is a float


def drift_table(found: Sequence[Moved]) -> str:
    """A line a feature."""
    head = ("version", "feature", "PSI", "verdict", "rows", "moved most")
    rows = []
    for one in found:
        most = int(one.terms.argmax())
        moved = f"{one.bins[most]}: {one.then[most]:.0%} in training, {one.now[most]:.0%} now"
        psi = "-" if one.verdict == "too few rows" else f"{one.psi:.3f}"
        rows.append(
            (one.version, one.feature, psi, one.verdict, f"{one.rows:,.0f}", moved if one.rows else "-")
        )
    return table(head, rows)


def draw(moved: Moved, folder: Path) -> Path:
    """Write a picture of the shares of each bin, in training and now; its path."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(max(5, len(moved.bins)), 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(moved.bins))
    for shift, shares, name, colour in (
        (-0.2, moved.then, "training", "#4878a8"),
        (0.2, moved.now, "now", "#d08030"),
    ):
        axes.bar_label(axes.bar(places + shift, shares, 0.4, label=name, color=colour), fmt="{:.0%}")
    axes.set_xticks(places, moved.bins)
    axes.set(title=f"{moved.feature}, {moved.version}: PSI {moved.psi:.3f}", ylabel="share of rows")
    axes.legend()
    return save_picture(figure, folder, f"drift-{moved.version}-{moved.feature}")
