"""Prometheus metrics, every name in one place, and the recorder that feeds them off the hot path.

    request -> Recorder (a list append) -> every FLUSH_SECONDS -> Prometheus children -> /metrics

Writing a child costs microseconds in multiprocess mode; adding up for a few milliseconds first makes the
cost per request a fraction of that. A scrape waits until what was answered before it has been written.
"""

import asyncio
import os
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess

FLUSH_SECONDS = 0.01
STAGES = ("queue", "preprocess", "inference", "postprocess")
LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STAGE = (
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.05,
    0.25,
    1.0,
    5.0,
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The metric objects, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # In the files of several workers a gauge of a worker that died must not linger: live modes only.
        live: dict[str, Any] = {"registry": registry, "multiprocess_mode": "livesum"}
        same: dict[str, Any] = {"registry": registry, "multiprocess_mode": "livemax"}
        own: dict[str, Any] = {"registry": registry}
        self.requests = Counter(
            "http_requests_total", "Requests answered.", ["method", "handler", "status"], **own)  # fmt: skip
        self.duration = Histogram(
            "http_request_duration_seconds", "From the first byte seen to the answer.",
            ["method", "handler"], buckets=LATENCY, **own)  # fmt: skip
        self.stage = Histogram(
            "inference_stage_duration_seconds", "What a request spent in each stage.", ["stage"],
            buckets=STAGE, **own)  # fmt: skip
        self.batch_rows = Histogram(
            "inference_batch_rows", "Rows in one call of the model.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **own)  # fmt: skip
        self.in_flight = Gauge("inference_in_flight", "Requests inside: read, queued or running.", **live)
        self.queue_depth = Gauge("inference_queue_depth", "Requests waiting for the model.", **live)
        self.admission_limit = Gauge("inference_admission_limit", "Requests that may be inside.", **live)
        self.shed = Counter("requests_shed_total", "Requests refused or given up.", ["reason"], **own)
        self.disconnects = Counter("client_disconnects_total", "Clients gone before their answer.", **own)
        self.predictions = Counter(
            "predictions_total", "Predictions made.", ["model_version", "label", "action"], **own)  # fmt: skip
        self.score = Histogram(
            "prediction_score", "Score of the predicted label.", ["model_version"],
            buckets=tuple(step / 10 for step in range(1, 11)), **own)  # fmt: skip
        self.out_of_range = Counter(
            "feature_out_of_range_total", "Values outside the range seen in training.", ["feature"], **own)  # fmt: skip
        self.violations = Counter(
            "schema_violations_total", "Violations of the contract.", ["field", "reason"], **own)  # fmt: skip
        self.model_info = Gauge(
            "model_info", "The served model, always 1.", ["version", "sha256", "runtime"], **same
        )
        self.model_load = Gauge("model_load_seconds", "Verify, load and warm up.", **same)
        self.execution = Gauge(
            "inference_execution_info", "How the model is run, always 1.", ["execution"], **same)  # fmt: skip
        self.dropped_lines = Counter(
            "log_lines_dropped_total", "Log lines dropped, the reader was too slow.", **own
        )


class Answered(Protocol):
    """The part of a prediction that is counted."""

    model_version: str
    label: Any
    score: float
    action: Any


class BatchLike(Protocol):
    """The part of a call of the model that is counted."""

    answers: list[Any]
    stages: tuple[float, float, float]
    out_of_range: dict[str, int]


class Recorder:
    """Collects what happened and writes it to `Metrics` a few milliseconds later; for one event loop."""

    def __init__(self, metrics: Metrics, levels: Callable[[], tuple[int, int, int]]) -> None:
        """`levels` gives requests inside, requests queued, and the admission limit at the time of the flush."""
        self._metrics, self._levels = metrics, levels
        self._scheduled = False
        self._requests: Tally[tuple[str, str, int]] = Tally()
        self._durations: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._batches: list[tuple[BatchLike, Sequence[float]]] = []
        self._shed: Tally[str] = Tally()
        self._children: dict[tuple[Any, ...], Any] = {}

    def request(self, method: str, handler: str, status: int, seconds: float) -> None:
        """One answered request."""
        method = method if method in METHODS else "OTHER"
        self._requests[method, handler, status] += 1
        self._durations[method, handler].append(seconds)
        if not self._scheduled:
            self.touch()

    def batch(self, batch: BatchLike, waits: Sequence[float]) -> None:
        """One call of the model, and the seconds each request in it waited."""
        self._batches.append((batch, waits))
        if not self._scheduled:
            self.touch()

    def shed(self, reason: str) -> None:
        """A request refused or given up."""
        self._shed[reason] += 1
        self.touch()

    def violation(self, field: str, reason: str) -> None:
        """A broken rule of the contract; `field` comes from the contract, never from the request."""
        self._metrics.violations.labels(field, reason).inc()

    def disconnect(self) -> None:
        """A client that went away before its answer."""
        self._metrics.disconnects.inc()

    def touch(self) -> None:
        """Something changed: flush soon."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    async def settle(self) -> None:
        """Wait until every worker has written what it answered before now."""
        await asyncio.sleep(2 * FLUSH_SECONDS)
        self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        self._scheduled = False
        metrics = self._metrics
        requests, self._requests = self._requests, Tally()
        durations, self._durations = self._durations, defaultdict(list)
        batches, self._batches = self._batches, []
        shed, self._shed = self._shed, Tally()
        for (method, handler, status), count in requests.items():
            self._child(metrics.requests, method, handler, str(status)).inc(count)
        for labels, seconds in durations.items():
            observe_many(self._child(metrics.duration, *labels), ((one, 1) for one in seconds))
        for reason, count in shed.items():
            self._child(metrics.shed, reason).inc(count)
        if batches:
            self._flush_batches(batches)
        inside, queued, limit = self._levels()
        metrics.in_flight.set(inside)
        metrics.queue_depth.set(queued)
        metrics.admission_limit.set(limit)

    def _flush_batches(self, batches: list[tuple[BatchLike, Sequence[float]]]) -> None:
        metrics = self._metrics
        observe_many(metrics.batch_rows, ((len(batch.answers), 1) for batch, _ in batches))
        observe_many(
            self._child(metrics.stage, "queue"), ((wait, 1) for _, waits in batches for wait in waits)
        )
        for index, stage in enumerate(STAGES[1:]):
            seconds = ((batch.stages[index], len(waits)) for batch, waits in batches)
            observe_many(self._child(metrics.stage, stage), seconds)
        predictions: Tally[tuple[str, str, str]] = Tally()
        scores: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        for batch, _ in batches:
            for answer in batch.answers:
                if not isinstance(answer, Exception):
                    predictions[answer.model_version, answer.label, answer.action] += 1
                    scores[answer.model_version].append((answer.score, 1))
            for feature, count in batch.out_of_range.items():
                self._child(metrics.out_of_range, feature).inc(count)
        for (version, label, action), count in predictions.items():
            self._child(metrics.predictions, version, str(label), action).inc(count)
        for version, values in scores.items():
            observe_many(self._child(metrics.score, version), values)

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child


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


def forget_worker(pid: int) -> None:
    """Drop the live gauges of a worker that has ended (gunicorn's `child_exit`)."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
