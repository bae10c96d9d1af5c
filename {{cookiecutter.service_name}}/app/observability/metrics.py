"""Prometheus metrics: all names in one place, and the text of /metrics for all workers together.

    Recorder: count, observe -> dictionaries -> every FLUSH_SECONDS -> Prometheus children -> /metrics

Writing a child costs microseconds in multiprocess mode; adding up values for a few milliseconds first reduces
the cost per request. A scrape waits until all answers before it have been written.
"""

import asyncio
import os
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, multiprocess
from prometheus_client import values as samples
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

STAGES = ("preprocess", "inference", "postprocess")
SHED = ("queue_full", "deadline", "rate_limit", "not_ready", "draining")
FAILURES = ("model_error", "non_finite_output", "internal_error")
LOOKUP_MISSES = ("missing", "invalid", "timeout", "error")
AGREEMENTS = ("agree", "disagree", "error", "dropped")
SIGNS = ("proxy", "key")
LATENCY = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STAGE = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCORE = tuple(step / 10 for step in range(1, 11))
FLUSH_SECONDS = 0.02
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # set if there are several workers


def count_alone() -> None:
    """Count in this process only: a folder that the platform has set is left alone."""
    for name in (METRICS_FOLDER, METRICS_FOLDER.lower()):
        os.environ.pop(name, None)
    samples.ValueClass = samples.MutexValue


class Metrics:
    """The metric objects, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=own)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=own)

        def gauge(name: str, text: str, *labels: str, mode: Any = "livemax") -> Gauge:
            # Live modes only: the gauges of a dead worker must disappear.
            return Gauge(name, text, labels, registry=own, multiprocess_mode=mode)

        route = ("method", "handler")
        self.requests = counter("http_requests_total", "Requests answered.", *route, "status")
        self.duration = histogram("http_request_duration_seconds", "From headers to answer.", LATENCY, *route)
        self.stage = histogram("inference_stage_duration_seconds", "Time by stage.", STAGE, "stage")
        self.batch_rows = histogram("inference_batch_rows", "Rows in one call of the model.", ROWS)
        self.in_flight = gauge("inference_in_flight", "Requests accepted, not answered yet.", mode="livesum")
        self.queue_depth = gauge("inference_queue_depth", "Requests waiting for the model.", mode="livesum")
        self.admission_limit = gauge("inference_admission_limit", "Requests allowed inside.", mode="livesum")
        self.shed = counter("requests_shed_total", "Requests refused or given up.", "reason")
        self.failures = counter("inference_failures_total", "Requests answered 500, by problem.", "code")
        self.disconnects = counter("client_disconnects_total", "Clients gone before their answer.")
        self.lookup_misses = counter("lookup_misses_total", "Instances without their features.", "reason")
        self.predictions = counter("predictions_total", "Predictions.", "model_version", "label", "action")
        self.score = histogram("prediction_score", "Score of the predicted label.", SCORE, "model_version")
        self.value: Histogram | None = None  # for a regressor, once its range is known
        self.shadow_value: Histogram | None = None
        binned = ("model_version", "feature", "bin")
        self.observations = counter("feature_observations_total", "Values by bin of the baseline.", *binned)
        self.missing = counter("feature_missing_total", "Values that were null.", "feature")
        share = "Share of the training data."
        self.feature_baseline = gauge("feature_baseline_ratio", share, *binned)
        self.prediction_baseline = gauge("prediction_baseline_ratio", share, "model_version", "label")
        self.feedback = counter("feedback_total", "Labels that came back.", "model_version", "outcome")
        self.out_of_range = counter("feature_out_of_range_total", "Values not seen in training.", "feature")
        self.violations = counter("schema_violations_total", "Rules broken.", "field", "reason")
        self.model_info = gauge("model_info", "The served model, always 1.", "version", "sha256", "runtime")
        self.model_load = gauge("model_load_seconds", "Verify, load and warm up.")
        self.reload_failures = counter("model_reload_failures_total", "Released versions that were refused.")
        self.fallback = gauge("model_fallback", "1: APP_FALLBACK_VERSION serves.")
        beside, either = "Calls of a model beside another.", "Predictions while there is a canary."
        self.call_duration = histogram("model_call_duration_seconds", beside, STAGE, "model_version")
        rows = ("shadow_version", "agreement")
        self.shadow_predictions = counter("shadow_predictions_total", "Rows offered to a shadow.", *rows)
        self.shadow_score = histogram("shadow_score", "Score of a shadow's label.", SCORE, rows[0])
        self.canary_percent = gauge("canary_percent", "Percent of clients that get the canary.")
        self.canary_stopped = gauge("canary_stopped", "1: the released canary was stopped.")
        self.canary_requests = counter("canary_requests_total", either, "model_version")
        self.canary_failures = counter("canary_failures_total", "Answered with 5xx.", "model_version")
        self.canary_duration = histogram("canary_duration_seconds", either, LATENCY, "model_version")
        self.restarts = counter("worker_restarts_total", "Workers started in place of one that ended.")
        self.execution = gauge("inference_execution_info", "How the model is run.", "execution")
        self.dropped_lines = counter("log_lines_dropped_total", "Log lines that no reader took in time.")
        self.retried = counter("requests_retried_total", "Recognised retries.", "sign")
        self.fallbacks = counter("rate_limit_fallbacks_total", "Hits that a worker counted without Redis.")
        # Prometheus notices a first increment only after a 0.
        counters = (self.shed, self.failures, self.retried, self.lookup_misses)
        for children, values in zip(counters, (SHED, FAILURES, SIGNS, LOOKUP_MISSES), strict=True):
            for value in values:
                children.labels(value)

    def expect_values(self, edges: Sequence[float]) -> None:
        """Create the histograms of a regressor's values; the first baseline decides the buckets."""
        if self.value is None:
            options: dict[str, Any] = {"buckets": edges, "registry": self.registry}
            self.value = Histogram("prediction_value", "Value predicted.", ["model_version"], **options)
            self.shadow_value = Histogram("shadow_value", "Of a shadow.", ["shadow_version"], **options)


def observe_many(histogram: Histogram, values: Iterable[tuple[float, int]]) -> None:
    """Observe (value, times) pairs at the cost of one call, with the internals of `Histogram.observe`.

    prometheus_client has no public function for this; a unit test compares both.
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


class Recorder:
    """Counters and histograms of one event loop, written a few milliseconds later.

    `write` is called at every flush; its argument is True if all values must be written now.
    """

    def __init__(self, write: Callable[[bool], object]) -> None:
        self._write = write
        self._counts: defaultdict[tuple[Counter, tuple[str, ...]], float] = defaultdict(int)
        self._values: defaultdict[tuple[Histogram, tuple[str, ...]], list[tuple[float, int]]]
        self._values = defaultdict(list)
        self._scheduled = False

    def count(self, counter: Counter, *labels: str) -> None:
        """One more."""
        self._counts[counter, labels] += 1
        if not self._scheduled:
            self._schedule()

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """One value."""
        self._values[histogram, labels].append((value, 1))
        if not self._scheduled:
            self._schedule()

    async def settle(self) -> None:
        """Wait until every worker has written its earlier answers."""
        await asyncio.sleep(2 * FLUSH_SECONDS)
        self.flush(everything=True)

    def flush(self, everything: bool = False) -> None:
        """Write the collected counts and values, then call `write`."""
        self._scheduled = False
        for (counter, labels), times in self._counts.items():
            (counter.labels(*labels) if labels else counter).inc(times)
        self._counts.clear()
        for (histogram, labels), values in self._values.items():
            observe_many(histogram.labels(*labels) if labels else histogram, values)
        self._values.clear()
        self._write(everything)

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)


def readable(path: Path) -> bool:
    """Whether a worker's metric file is complete: a killed worker may leave it empty or truncated."""
    try:
        multiprocess.MultiProcessCollector.merge([path])  # type: ignore[no-untyped-call]
    except Exception:  # damaged bytes raise many types
        return False
    return True


class _Workers(multiprocess.MultiProcessCollector):
    """The files of all workers; unreadable files are skipped and counted."""

    def collect(self) -> Iterable[Metric]:
        found = list(Path(os.environ[METRICS_FOLDER]).glob("*.db"))
        sound = [path for path in found if readable(path)]
        broken = sum(path.exists() for path in found if path not in sound)  # not those just removed
        text = "Files of workers that cannot be read; what they counted is missing."
        yield GaugeMetricFamily("metrics_files_broken", text, value=broken)
        yield from self.merge(sound)  # type: ignore[no-untyped-call]


def scrape(own: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The metrics of all workers in the format that `accept` asks for, and its media type."""
    encode, media_type = choose_encoder(accept)
    several = Path(os.environ.get(METRICS_FOLDER, "none")).is_dir()  # a worker recreates a removed folder
    return encode(_Workers(None) if several else own), media_type  # type: ignore[no-untyped-call]
