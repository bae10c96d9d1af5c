"""Prometheus metrics, every name in one place, and the recorder that feeds them off the hot path.

    request -> Recorder (a list append) -> every FLUSH_SECONDS -> Prometheus children -> /metrics

Writing a child costs microseconds in multiprocess mode; adding up for a few milliseconds first makes that a
fraction for each request. A scrape waits until what was answered before it has been written.
"""

import asyncio
import os
from bisect import bisect_left
from collections import Counter as Tally
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily

FLUSH_SECONDS = 0.02
# Rows are counted by bin more rarely: it costs as much for hundreds as for one, and drift takes its time.
COUNT_SECONDS, COUNT_ROWS = 1.0, 512
MAX_KEYED = 10_000  # predictions with an Idempotency-Key that one worker remembers
STAGES = ("preprocess", "inference", "postprocess")
SHED = ("queue_full", "deadline", "rate_limit", "not_ready", "draining")
FAILURES = ("model_error", "non_finite_output", "internal_error")
AGREEMENTS = ("agree", "disagree", "error", "dropped")
SIGNS = ("proxy", "key")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STAGE = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCORE = tuple(step / 10 for step in range(1, 11))


class Metrics:
    """The metric objects, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=own)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=own)

        def gauge(name: str, text: str, *labels: str, mode: Any = "livesum") -> Gauge:
            # Live modes only: the gauge of a worker that died must not linger.
            return Gauge(name, text, labels, registry=own, multiprocess_mode=mode)

        route = ("method", "handler")
        self.requests = counter("http_requests_total", "Requests answered.", *route, "status")
        self.duration = histogram("http_request_duration_seconds", "From door to answer.", LATENCY, *route)
        self.stage = histogram(
            "inference_stage_duration_seconds", "A request's time by stage.", STAGE, "stage"
        )
        self.batch_rows = histogram("inference_batch_rows", "Rows in one call of the model.", ROWS)
        self.in_flight = gauge("inference_in_flight", "Requests inside: read, queued or running.")
        self.queue_depth = gauge("inference_queue_depth", "Requests waiting for the model.")
        self.admission_limit = gauge("inference_admission_limit", "Requests that may be inside.")
        self.shed = counter("requests_shed_total", "Requests refused or given up.", "reason")
        self.failures = counter("inference_failures_total", "Requests answered 500, by problem.", "code")
        self.disconnects = counter("client_disconnects_total", "Clients gone before their answer.")
        self.predictions = counter("predictions_total", "Predictions.", "model_version", "label", "action")
        self.score = histogram("prediction_score", "Score of the predicted label.", SCORE, "model_version")
        self.value: Histogram | None = None  # of a regressor, once its range is known
        self.shadow_value: Histogram | None = None
        binned = ("model_version", "feature", "bin")
        self.observations = counter("feature_observations_total", "Values by bin of the baseline.", *binned)
        self.missing = counter("feature_missing_total", "Values that were null.", "feature")
        self.feature_baseline = gauge(
            "feature_baseline_ratio", "Share of training in a bin.", *binned, mode="livemax"
        )
        text, labels = "Share of training predicted so.", ("model_version", "label")
        self.prediction_baseline = gauge("prediction_baseline_ratio", text, *labels, mode="livemax")
        self.feedback = counter("feedback_total", "Labels that came back.", "model_version", "outcome")
        self.out_of_range = counter("feature_out_of_range_total", "Values not seen in training.", "feature")
        self.violations = counter(
            "schema_violations_total", "Broken rules of the contract.", "field", "reason"
        )
        info = ("version", "sha256", "runtime")
        self.model_info = gauge("model_info", "The served model, always 1.", *info, mode="livemax")
        self.model_load = gauge("model_load_seconds", "Verify, load and warm up.", mode="livemax")
        self.reload_failures = counter("model_reload_failures_total", "Released versions that were refused.")
        self.fallback = gauge("model_fallback", "1: APP_FALLBACK_VERSION stands in.", mode="livemax")
        beside, either = "Calls of the model beside another.", "Predictions while there is a canary."
        self.call_duration = histogram("model_call_duration_seconds", beside, STAGE, "model_version")
        rows = ("shadow_version", "agreement")
        self.shadow_predictions = counter("shadow_predictions_total", "Rows offered to a shadow.", *rows)
        self.shadow_score = histogram("shadow_score", "Score of a shadow's label.", SCORE, rows[0])
        self.canary_percent = gauge("canary_percent", "Of clients that get the canary.", mode="livemax")
        self.canary_stopped = gauge("canary_stopped", "1: the released canary was.", mode="livemax")
        self.canary_requests = counter("canary_requests_total", either, "model_version")
        self.canary_failures = counter("canary_failures_total", "Those answered 5xx.", "model_version")
        self.canary_duration = histogram("canary_duration_seconds", either, LATENCY, "model_version")
        self.restarts = counter("worker_restarts_total", "Workers started in place of one that ended.")
        self.execution = gauge("inference_execution_info", "How it is run.", "execution", mode="livemax")
        self.dropped_lines = counter("log_lines_dropped_total", "Log lines that no reader took in time.")
        self.dropped_spans = counter("trace_spans_dropped_total", "Spans that the collector did not take.")
        self.retried = counter("requests_retried_total", "Requests seen to be sent again.", "sign")
        self.fallbacks = counter("rate_limit_fallbacks_total", "Hits that a worker counted without Redis.")
        # Prometheus sees a first increment only where there was a 0 before it.
        for children, values in ((self.shed, SHED), (self.failures, FAILURES), (self.retried, SIGNS)):
            for value in values:
                children.labels(value)

    def expect_values(self, edges: Sequence[float]) -> None:
        """A regressor's values lie about these; the first baseline that says so decides on the buckets."""
        if self.value is None:
            text, labels = "Value predicted.", ("model_version",)
            self.value = Histogram("prediction_value", text, labels, buckets=edges, registry=self.registry)
            text, labels = "Value of a shadow.", ("shadow_version",)
            self.shadow_value = Histogram("shadow_value", text, labels, buckets=edges, registry=self.registry)


class BatchLike(Protocol):
    """The part of a call of the model that is counted."""

    answers: list[Any]  # predictions, or exceptions
    stages: tuple[float, float, float]
    out_of_range: dict[str, int]
    matrix: Any  # rows as the model saw them, [rows, features]
    version: str  # of the model; none if it saw nothing


class DriftLike(Protocol):
    """Whoever counts rows by bin: `observability.drift`."""

    def bin_of(self, value: float) -> str:
        """The bin of a regressor's value."""
        ...

    def observe(self, matrices: Sequence[Any], labels: Tally[str]) -> None:
        """Count rows, and the labels predicted."""

    def write_line(self) -> None:
        """Log what was counted since the last line."""


class Recorder:
    """Collects what happened on one event loop, and writes it to `Metrics` a few milliseconds later."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._scheduled = False
        self._requests: Tally[tuple[str, str, str]] = Tally()
        self._seconds: defaultdict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
        self._shed: Tally[str] = Tally()
        self._violations: Tally[tuple[str, str]] = Tally()
        self._retried: Tally[str] = Tally()
        self._keyed: OrderedDict[str, None] = OrderedDict()
        self._batches: list[tuple[BatchLike, Sequence[float]]] = []
        # Requests inside, requests queued, admission limit: read at each flush, set by whoever knows.
        self.levels: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        # What `predictions_total` calls an answer; set by whoever knows the contract.
        self.label: Callable[[Any], str] = lambda answer: str(answer.label)
        self.shadow: Callable[[Sequence[Any]], None] | None = None  # is offered what was answered
        self.compares = False  # whether there is another version beside the served one
        self._tried: list[tuple[str, bool, float]] = []
        self.drifts: dict[str, DriftLike] = {}  # by version, of those that have a baseline
        self._held: defaultdict[str, list[Any]] = defaultdict(list)  # rows for them, and how many
        self._held_rows = 0
        self._chosen: defaultdict[str, Tally[str]] = defaultdict(Tally)
        self._counting: asyncio.TimerHandle | None = None

    def request(self, method: str, handler: str, status: int, seconds: float) -> None:
        """One answered request."""
        method = method if method in METHODS else "OTHER"
        self._requests[method, handler, str(status)] += 1
        self._seconds[method, handler].append((seconds, 1))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def batch(self, batch: BatchLike, waits: Sequence[float]) -> None:
        """One call of the model, and the seconds each request in it waited."""
        self._batches.append((batch, waits))

    def tried(self, version: str, failed: bool, seconds: float) -> None:
        """A prediction that was asked of `version` while there is a canary."""
        self._tried.append((version, failed, seconds))

    def shed(self, reason: str) -> None:
        """A request refused or given up."""
        self._shed[reason] += 1

    def retried(self, sign: str) -> None:
        """A request sent again: `proxy` says so, or the same Idempotency `key` and body came here before."""
        self._retried[sign] += 1

    def keyed(self, prediction_id: str) -> None:
        """A prediction with an Idempotency-Key; one seen lately in this worker is a retry."""
        if prediction_id in self._keyed:
            self.retried("key")
        self._keyed[prediction_id] = None
        if len(self._keyed) > MAX_KEYED:
            self._keyed.popitem(last=False)

    def failure(self, code: str) -> None:
        """A request answered 500."""
        self._metrics.failures.labels(code).inc()

    def violation(self, field: str, reason: str) -> None:
        """A broken rule of the contract; both labels come from closed sets."""
        self._violations[field, reason] += 1

    def disconnect(self) -> None:
        """A client that went away before its answer."""
        self._metrics.disconnects.inc()

    def feedback(self, version: str, correct: bool) -> None:
        """A label that came back."""
        self._metrics.feedback.labels(version, "correct" if correct else "incorrect").inc()

    async def settle(self) -> None:
        """Wait until every worker has written what it answered before now."""
        await asyncio.sleep(2 * FLUSH_SECONDS)
        self.flush()
        self.count()

    def flush(self) -> None:
        """Write what was collected."""
        self._scheduled, metrics = False, self._metrics
        for labels, count in self._requests.items():
            metrics.requests.labels(*labels).inc(count)
        for route, seconds in self._seconds.items():
            observe_many(metrics.duration.labels(*route), seconds)
        for reason, count in self._shed.items():
            metrics.shed.labels(reason).inc(count)
        for (field, reason), count in self._violations.items():
            metrics.violations.labels(field, reason).inc(count)
        for sign, count in self._retried.items():
            metrics.retried.labels(sign).inc(count)
        self._retried.clear()
        self._shed.clear()
        self._violations.clear()
        self._requests.clear()
        self._seconds.clear()
        for version, failed, taken in self._tried:
            metrics.canary_requests.labels(version).inc()
            metrics.canary_failures.labels(version).inc(failed)
            metrics.canary_duration.labels(version).observe(taken)
        self._tried.clear()
        batches, self._batches = self._batches, []
        if batches:
            self._flush_batches(batches)
            if self.shadow is not None:
                self.shadow([batch for batch, _ in batches])
        inside, queued, limit = self.levels()
        metrics.in_flight.set(inside)
        metrics.queue_depth.set(queued)
        metrics.admission_limit.set(limit)

    def _flush_batches(self, batches: list[tuple[BatchLike, Sequence[float]]]) -> None:
        metrics = self._metrics
        observe_many(metrics.batch_rows, [(len(batch.answers), 1) for batch, _ in batches])
        observe_many(metrics.stage.labels("queue"), [(wait, 1) for _, waits in batches for wait in waits])
        for index, stage in enumerate(STAGES):  # a request spends the whole call's time in each
            observe_many(
                metrics.stage.labels(stage), [(one.stages[index], len(waits)) for one, waits in batches]
            )
        if self.compares:
            for batch, _ in batches:
                if batch.version:
                    metrics.call_duration.labels(batch.version).observe(sum(batch.stages))
        predictions: Tally[tuple[str, str, str]] = Tally()
        scores: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        spread, number = (metrics.score, "score") if metrics.value is None else (metrics.value, "value")
        for batch, _ in batches:
            for answer in batch.answers:
                if not isinstance(answer, Exception):
                    predictions[answer.model_version, self.label(answer), answer.action] += 1
                    if (found := getattr(answer, number, None)) is not None:
                        scores[answer.model_version].append((found, 1))
            for feature, count in batch.out_of_range.items():
                metrics.out_of_range.labels(feature).inc(count)
        for labels, count in predictions.items():
            metrics.predictions.labels(*labels).inc(count)
        for version, values in scores.items():
            observe_many(spread.labels(version), values)
        self._hold(
            [(one.version, one.matrix) for one, _ in batches if one.version in self.drifts], predictions
        )

    def _hold(self, matrices: list[tuple[str, Any]], predictions: Tally[tuple[str, str, str]]) -> None:
        """Keep rows and what was predicted for them until they are counted by bin."""
        for version, matrix in matrices:
            self._held[version].append(matrix)
            self._held_rows += len(matrix)
        for (version, label, _), count in predictions.items():
            if version in self._held:
                self._chosen[version][label] += count
        if self._held_rows >= COUNT_ROWS:
            self.count()
        elif self._held_rows and self._counting is None:
            self._counting = asyncio.get_running_loop().call_later(COUNT_SECONDS, self.count)

    def count(self) -> None:
        """Count the rows that are held by bin, and let go of them."""
        for version, rows in self._held.items():
            self.drifts[version].observe(rows, self._chosen[version])
        self._held.clear()
        self._chosen.clear()
        self._held_rows = 0
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None


def observe_many(histogram: Histogram, values: Iterable[tuple[float, int]]) -> None:
    """Observe (value, times) pairs at the price of one, with what `Histogram.observe` itself uses.

    prometheus_client has no public call for it; a unit test holds the two equal.
    """
    bounds: list[float] = histogram._upper_bounds
    total, counts = 0.0, Tally[int]()
    for value, times in values:
        counts[bisect_left(bounds, value)] += times
        total += value * times
    if counts:
        histogram._sum.inc(total)
        for bucket, times in counts.items():
            histogram._buckets[bucket].inc(times)


class _Workers(multiprocess.MultiProcessCollector):
    """All workers' files; one that a killed worker left empty or cut short does not fail the others."""

    def collect(self) -> Iterable[Metric]:
        sound, broken = [], 0
        for path in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("*.db"):
            try:
                self.merge([path])  # type: ignore[no-untyped-call]
                sound.append(path)
            except FileNotFoundError:  # a worker has ended since, and its gauges with it
                continue
            except Exception:
                broken += 1
        text = "Files of workers that cannot be read; what they counted is missing."
        yield GaugeMetricFamily("metrics_files_broken", text, value=broken)
        yield from self.merge(sound)  # type: ignore[no-untyped-call]


def scrape(own: CollectorRegistry) -> bytes:
    """Prometheus text: of all workers, or of this process where it is the only one."""
    several = "PROMETHEUS_MULTIPROC_DIR" in os.environ
    return generate_latest(_Workers(None) if several else own)  # type: ignore[no-untyped-call]


def forget_worker(pid: int) -> None:
    """Drop the live gauges of a worker that has ended (gunicorn's `child_exit`)."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
