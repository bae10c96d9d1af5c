"""Counts of model calls, and the distribution of inputs and predictions for comparison with training.

Batcher -> batch, shed (a list append) -> write, at the recorder's flush -> Prometheus children, rows held
baseline.json -> bins, and the share of training in each -> feature_baseline_ratio
rows of a second -> rows in each bin -> feature_observations_total, and a `drift` line a minute

Rows are held until they are counted, at most a second, and never stored. The distance from training (PSI) is
computed from the counts by Prometheus (ops/prometheus/drift_rules.yml), or by `make drift` from a log.
"""

import asyncio
import json
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.batcher import Batch, Observer
from app.core.errors import ArtifactError
from app.core.store import Artifact
from app.observability.logging import Logger
from app.observability.metrics import STAGES, Metrics, observe_many
from app.schemas.contract import label_key

MISSING, OTHER = "missing", "other"
LEAST_ROWS, ROWS_A_BIN = 100, 20  # of training: with fewer, chance looks like drift
# Rows are counted by bin less often than flushed: counting hundreds costs as much as one, and drift is slow.
COUNT_SECONDS, COUNT_ROWS = 1.0, 512
LINE_SECONDS = 60.0
LINE_ROWS = 20  # the bins of a few rows would disclose a client's input


def settled(counts: Iterable[int], rows: int) -> bool:
    """Whether these bins hold enough training rows for a meaningful distance (PSI)."""
    return rows >= max(LEAST_ROWS, ROWS_A_BIN * sum(count > 0 for count in counts))


class Drift:
    """The bins of one version's baseline, and the rows counted in them."""

    def __init__(
        self, version: str, baseline: bytes, names: Sequence[str], metrics: Metrics, log: Logger
    ) -> None:
        document = json.loads(baseline)
        self._version, self._log = version, log
        self._children: dict[tuple[str, str], Any] = {}
        self._features: list[tuple[str, list[str], Any]] = []  # name, bins, edges or values of the bins
        for name in names:
            feature = document["features"][name]
            bins = feature["bins"]
            if "edges" in feature:
                known: Any = np.array(feature["edges"], np.float32)
            else:
                known = dict(zip(feature["categories"], bins, strict=True))
            self._features.append((name, bins, known))
            counts = dict(zip(bins, feature["counts"], strict=True))
            counts |= {key: feature[key] for key in (MISSING, OTHER) if key in feature}
            enough = settled(counts.values(), document["rows"])
            for bin_, count in counts.items():
                if enough:
                    metrics.feature_baseline.labels(version, name, bin_).set(count / document["rows"])
                self._children[name, bin_] = metrics.observations.labels(version, name, bin_)
        self._missing = {name: metrics.missing.labels(name) for name in names}
        # A regressor has bins of values in place of labels.
        self._values = document.get("values", {"edges": []})
        if "values" in document:
            metrics.expect_values(self._values["edges"])
            document["labels"] = dict(zip(self._values["bins"], self._values["counts"], strict=True))
        enough = settled(document["labels"].values(), document["rows"])
        for label, count in document["labels"].items():
            if enough:
                metrics.prediction_baseline.labels(version, label).set(count / document["rows"])
            for action in ("accept", "review"):  # also labels that are never predicted
                metrics.predictions.labels(version, label, action)
        self._rows, self._counts, self._labels = 0, Tally[tuple[str, str]](), Tally[str]()
        self._since = monotonic()

    def bin_of(self, value: float) -> str:
        """The bin of a regressor's value."""
        name: str = self._values["bins"][bisect_left(self._values["edges"], value)]
        return name

    def observe(self, matrices: Sequence[NDArray[Any]], labels: Tally[str]) -> None:
        """Count rows, as matrices [rows, features] in the model's order, and the predicted labels."""
        rows = np.concatenate(matrices)
        counts = self._count(rows)
        for key, count in counts.items():
            self._children[key].inc(count)
            if key[1] == MISSING:
                self._missing[key[0]].inc(count)
        self._rows += len(rows)
        self._counts.update(counts)
        self._labels.update(labels)
        if monotonic() - self._since >= LINE_SECONDS:
            self.write_line()

    def write_line(self) -> None:
        """Log the counts since the last line, unless so few rows could disclose an input."""
        if self._rows < LINE_ROWS:
            return
        features: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (name, bin_), count in self._counts.items():
            features[name][bin_] = count
        fields = {"rows": self._rows, "features": features, "predictions": dict(self._labels)}
        self._log.info("drift", model_version=self._version, **fields)
        self._rows, self._since = 0, monotonic()
        self._counts.clear()
        self._labels.clear()

    def _count(self, rows: NDArray[Any]) -> Tally[tuple[str, str]]:
        counts = Tally[tuple[str, str]]()
        for (name, bins, known), column in zip(self._features, rows.T, strict=True):
            if isinstance(known, dict):
                for value, count in Tally(column.tolist()).items():
                    absent = value is None or value != value
                    counts[name, MISSING if absent else known.get(value, OTHER)] += count
            else:
                numbers = column.astype(np.float32)
                present = numbers[~np.isnan(numbers)]
                inside = np.bincount(np.searchsorted(known, present)).tolist()
                counts[name, MISSING] = len(column) - len(present)
                counts.update({(name, bins[at]): count for at, count in enumerate(inside)})
        return +counts  # without zeros


class Calls(Observer):
    """The observer of every pipeline of this process."""

    def __init__(self, metrics: Metrics, log: Logger) -> None:
        self._metrics, self._log = metrics, log
        self._batches: list[tuple[Batch, Sequence[float]]] = []
        self._shed = Tally[str]()
        self._drifts: dict[str, Drift] = {}  # by version, of those that have a baseline
        self._rows: defaultdict[str, list[Any]] = defaultdict(list)  # rows held for `_drifts`
        self._held = 0
        self._labels: defaultdict[str, Tally[str]] = defaultdict(Tally)  # labels predicted for these rows
        self._counting: asyncio.TimerHandle | None = None

    def know(self, artifact: Artifact) -> None:
        """Count rows of this version by the bins of its baseline, if any; raises ArtifactError."""
        version, baseline = artifact.manifest.version, artifact.files.get("baseline.json")
        if baseline is None or version in self._drifts:
            return
        names = [entry.name for entry in artifact.manifest.inputs]
        try:
            self._drifts[version] = Drift(version, baseline, names, self._metrics, self._log)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"cannot be used ({type(error).__name__})"
            raise ArtifactError(f"{version}/baseline.json: {reason}") from error

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """Take a call of the model, and the seconds that each of its requests waited."""
        self._batches.append((batch, waits))

    def shed(self, reason: str) -> None:
        """Count a request that was given up."""
        self._shed[reason] += 1

    def write(self, everything: bool, beside: bool = False) -> list[Batch]:
        """Write the collected calls and return them; with `beside` also their durations by version."""
        for reason, count in self._shed.items():
            self._metrics.shed.labels(reason).inc(count)
        self._shed.clear()
        batches, self._batches = self._batches, []
        if batches:
            self._write_calls(batches, beside)
            self._write_answers([batch for batch, _ in batches])
        if everything or self._held >= COUNT_ROWS:
            self._count_rows()
        elif self._held and self._counting is None:
            self._counting = asyncio.get_running_loop().call_later(COUNT_SECONDS, self._count_rows)
        return [batch for batch, _ in batches]

    def close(self) -> None:
        """Log the counts since the last line."""
        for drift in self._drifts.values():
            drift.write_line()

    def _write_calls(self, batches: list[tuple[Batch, Sequence[float]]], beside: bool) -> None:
        metrics = self._metrics
        observe_many(metrics.batch_rows, [(len(batch.answers), 1) for batch, _ in batches])
        observe_many(metrics.stage.labels("queue"), [(wait, 1) for _, waits in batches for wait in waits])
        for index, stage in enumerate(STAGES):  # each request spends the time of the whole call
            spent = [(batch.stages[index], len(waits)) for batch, waits in batches]
            observe_many(metrics.stage.labels(stage), spent)
        for batch, _ in batches if beside else ():
            if batch.version:
                metrics.call_duration.labels(batch.version).observe(sum(batch.stages))

    def _write_answers(self, batches: list[Batch]) -> None:
        metrics = self._metrics
        predictions = Tally[tuple[str, str, str]]()
        numbers: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        spread, number = (metrics.score, "score") if metrics.value is None else (metrics.value, "value")
        for batch in batches:
            for answer in batch.answers:
                if not isinstance(answer, Exception):
                    predictions[answer.model_version, self._label(answer), answer.action] += 1
                    if (found := getattr(answer, number, None)) is not None:
                        numbers[answer.model_version].append((found, 1))
            for feature, count in batch.out_of_range.items():
                metrics.out_of_range.labels(feature).inc(count)
            if batch.version in self._drifts:
                self._rows[batch.version].append(batch.matrix)
                self._held += len(batch.matrix)
        for (version, label, action), count in predictions.items():
            metrics.predictions.labels(version, label, action).inc(count)
            if version in self._rows:
                self._labels[version][label] += count
        for version, values in numbers.items():
            observe_many(spread.labels(version), values)

    def _label(self, answer: Any) -> str:
        """The label, or the bin of a regressor's value."""
        if hasattr(answer, "label"):
            return label_key(answer.label)
        drift = self._drifts.get(answer.model_version)
        return drift.bin_of(answer.value) if drift else "value"

    def _count_rows(self) -> None:
        """Count the held rows by bin, and release them."""
        for version, rows in self._rows.items():
            self._drifts[version].observe(rows, self._labels[version])
        self._rows.clear()
        self._labels.clear()
        self._held = 0
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None
