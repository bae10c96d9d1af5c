"""Calls of the models, counted: stages, answers, and rows by bin of the baseline.

Batcher -> batch, shed (a list append) -> write, with the recorder's flush -> Prometheus children
-> rows held for a second at most -> Drift
"""

import asyncio
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from app.core.batcher import Batch
from app.core.errors import ArtifactError
from app.core.store import Artifact
from app.monitoring.drift import Drift
from app.observability.logging import Logger
from app.observability.metrics import STAGES, Metrics, observe_many
from app.schemas.contract import label_key

# Rows are counted by bin more rarely: it costs as much for hundreds as for one, and drift takes its time.
COUNT_SECONDS, COUNT_ROWS = 1.0, 512


class Calls:
    """The observer of every pipeline of this process."""

    def __init__(self, metrics: Metrics, log: Logger) -> None:
        self._metrics, self._log = metrics, log
        self._batches: list[tuple[Batch, Sequence[float]]] = []
        self._shed = Tally[str]()
        self._drifts: dict[str, Drift] = {}  # by version, of those that have a baseline
        self._rows: defaultdict[str, list[Any]] = defaultdict(list)  # held for them, and how many
        self._held = 0
        self._labels: defaultdict[str, Tally[str]] = defaultdict(Tally)  # predicted for these rows
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
            raise ArtifactError(
                f"{version}/baseline.json: cannot be used ({type(error).__name__})"
            ) from error

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """One call of the model, and the seconds each request in it waited."""
        self._batches.append((batch, waits))

    def shed(self, reason: str) -> None:
        """A request whose deadline passed before its answer."""
        self._shed[reason] += 1

    def write(self, everything: bool, beside: bool = False) -> list[Batch]:
        """Write the collected calls and return them; `beside` another version, also each call's duration."""
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
        """Log the rows counted since the last line."""
        for drift in self._drifts.values():
            drift.write_line()

    def _write_calls(self, batches: list[tuple[Batch, Sequence[float]]], beside: bool) -> None:
        metrics = self._metrics
        observe_many(metrics.batch_rows, [(len(batch.answers), 1) for batch, _ in batches])
        observe_many(metrics.stage.labels("queue"), [(wait, 1) for _, waits in batches for wait in waits])
        for index, stage in enumerate(STAGES):  # a request spends the whole call's time in each
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
        """The label, or the bin that a regressor's value had in training."""
        if hasattr(answer, "label"):
            return label_key(answer.label)
        drift = self._drifts.get(answer.model_version)
        return drift.bin_of(answer.value) if drift else "value"

    def _count_rows(self) -> None:
        """Count the rows that are held by bin, and let go of them."""
        for version, rows in self._rows.items():
            self._drifts[version].observe(rows, self._labels[version])
        self._rows.clear()
        self._labels.clear()
        self._held = 0
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None
