"""Metrics that add up and logs that are JSON, without a server; a pipe stands for whoever reads the log."""

import asyncio
import json
import logging
import os
from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from structlog.testing import CapturingLogger

from app.api.call import Service
from app.core.batcher import Batch
from app.core.errors import ServiceError
from app.monitoring.drift import Calls
from app.monitoring.feedback import Feedback
from app.observability.logging import ForeignHandler, LineWriter
from app.observability.metrics import LATENCY, Metrics, Recorder, observe_many
from app.rollout.fleet import Fleet
from app.rollout.models import Models
from app.schemas.predict import Prediction
from app.settings import Settings
from tests.service.conftest import ANSWER, LABELS, OTHER_ANSWER, answer_of, prediction, spelled

SECRET = "4111 1111 1111 1111"  # noqa: S105  # stands for what a message quotes


def samples(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Every sample that is not zero, by name and label values."""
    return {
        (one.name, *one.labels.values()): one.value
        for family in registry.collect()
        for one in family.samples
        if one.value and not one.name.endswith("_created")
    }


@given(values=st.lists(st.tuples(st.floats(0, 1e6) | st.sampled_from(LATENCY), st.integers(1, 5))))
def test_observing_many_is_observing_each(values: list[tuple[float, int]]) -> None:
    """Values added up at once leave a histogram as observing them one by one does."""
    one, many = CollectorRegistry(), CollectorRegistry()
    each = Histogram("h", "text", buckets=LATENCY, registry=one)
    for value, times in values:
        for _ in range(times):
            each.observe(value)
    observe_many(Histogram("h", "text", buckets=LATENCY, registry=many), values)
    assert samples(many) == pytest.approx(samples(one))


ANSWERS = [(ANSWER, 0.95, "accept"), (OTHER_ANSWER, 0.5, "review"), ServiceError("model_error")]


def named(one: Prediction) -> str:
    """What metrics call an answer: a label, or `value` where there is no baseline with bins for it."""
    return spelled(answer_of(asdict(one))) if LABELS else "value"


REQUEST = st.tuples(
    st.sampled_from(["GET", "POST", "BREW"]),
    st.sampled_from(["/health", "/v1/predict"]),
    st.sampled_from([200, 422, 499, 503]),
    st.floats(0, 100),
    st.lists(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=4), max_size=3),
)


@settings(deadline=None, max_examples=40)
@given(requests=st.lists(REQUEST, max_size=30))
def test_the_counts_are_what_happened(requests: list[tuple[str, str, int, float, list[list[Any]]]]) -> None:
    """After a scrape's wait every request, batch, stage and prediction has been counted once."""
    metrics = Metrics()
    calls = Calls(metrics, CapturingLogger())
    recorder = Recorder(calls.write)
    service: Any = SimpleNamespace(recorder=recorder, metrics=metrics)
    expected: Tally[tuple[str, ...]] = Tally()

    async def happen() -> None:
        for method, handler, status, seconds, batches in requests:
            for batch in batches:
                rows = [prediction(*one) if isinstance(one, tuple) else one for one in batch]
                calls.batch(Batch(rows, (0.1, 0.2, 0.3), {"petal_width": 2}), [0.5, 0.6])
                expected["inference_batch_rows_count",] += 1
                expected["inference_batch_rows_sum",] += len(rows)
                for stage in ("queue", "preprocess", "inference", "postprocess"):
                    expected["inference_stage_duration_seconds_count", stage] += 2
                expected["feature_out_of_range_total", "petal_width"] += 2
                for one in rows:
                    if isinstance(one, Prediction):
                        expected["predictions_total", "v1", named(one), one.action] += 1
                        if LABELS:
                            expected["prediction_score_count", "v1"] += 1
            Service.count_answer(service, method, handler, status, seconds)
            recorder.count(metrics.disconnects)
            known = method if method != "BREW" else "OTHER"
            expected["http_requests_total", known, handler, str(status)] += 1
            expected["http_request_duration_seconds_count", known, handler] += 1
            expected["client_disconnects_total",] += 1
        await recorder.settle()
        recorder.flush()  # what was written is not written again

    asyncio.run(happen())
    seen = samples(metrics.registry)
    assert {name: value for name, value in seen.items() if name in expected} == expected
    sums = {name for name in seen if name[0].endswith(("_bucket", "_sum"))}
    assert seen.keys() - sums == {name for name in expected if not name[0].endswith("_sum")}


def test_levels_are_read_when_metrics_are_written() -> None:
    """The gauges say how many requests are inside and waiting now, and how many may be."""
    metrics, log = Metrics(), CapturingLogger()
    settings = Settings(max_concurrency=64, max_queue=256)
    models = Models(Fleet(settings), metrics, log, Feedback(["yes"], {}, "c" * 64))
    batcher: Any = SimpleNamespace(waiting=3, abandoned=0, requests_per_second=1e6)
    models.serving = SimpleNamespace(batcher=batcher)  # type: ignore[assignment]
    for _ in range(5):
        models.admission.enter(0.0, 100)
    Recorder(models.write).flush()
    gauges = ("inference_in_flight", "inference_queue_depth", "inference_admission_limit")
    assert [samples(metrics.registry)[name,] for name in gauges] == [5, 3, 320]
    batcher.requests_per_second = 20.0  # of which half of the deadline, 5 s, has a hundred
    Recorder(models.write).flush()
    assert [samples(metrics.registry)[name,] for name in gauges] == [5, 3, 100]


class Log:
    """A writer, the pipe it writes to, and what it says it dropped."""

    def __init__(self, max_lines: int = 10_000) -> None:
        self.source, self.sink = os.pipe()
        self.dropped = 0
        self.writer = LineWriter(self._drop, self.sink, max_lines)

    def _drop(self, lines: int = 1) -> None:
        self.dropped += lines

    def fill(self) -> int:
        """Leave no room in the pipe; how many bytes that took."""
        os.set_blocking(self.sink, False)
        size = 0
        with suppress(BlockingIOError):
            while True:
                size += os.write(self.sink, b"x")
        os.set_blocking(self.sink, True)
        return size

    def lines(self) -> list[bytes]:
        """What came through, once the writer is closed."""
        self.writer.close()
        os.close(self.sink)
        with os.fdopen(os.dup(self.source), "rb") as file:
            return file.read().splitlines()

    def end(self) -> None:
        """Close what is still open."""
        for descriptor in (self.source, self.sink):
            with suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def log() -> Iterator[Log]:
    """A log of which at most ten lines wait."""
    log = Log(max_lines=10)
    yield log
    log.end()


def numbered(count: int) -> list[bytes]:
    """That many different lines."""
    return [b"line %d" % number for number in range(count)]


def test_every_line_comes_out_whole_before_the_writer_is_closed() -> None:
    """Lines of several threads come out one by one, each thread's in order, and none is lost at the end."""
    log = Log()

    def write(thread: int) -> None:
        for number in range(500):
            log.writer.write(b"%c %d" % (thread, number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, b"abcd"))
    lines = log.lines()
    for thread in b"abcd":
        assert [line for line in lines if line[0] == thread] == [b"%c %d" % (thread, n) for n in range(500)]
    assert (len(lines), log.dropped) == (2000, 0)
    log.end()


def test_a_reader_that_stops_reading_blocks_nobody(log: Log) -> None:
    """With the pipe full, writing goes on; what has no room is dropped, and every dropped line counted."""
    filling = log.fill()
    for line in numbered(1000):
        log.writer.write(line)
    assert log.dropped >= 1000 - 2 * 10  # as many wait, and as many are in the hand of the thread
    assert set(os.read(log.source, filling)) == set(b"x")
    lines = log.lines()
    assert len(lines) + log.dropped == 1000
    assert lines == sorted(set(lines) & set(numbered(1000)), key=numbered(1000).index)


def test_a_blocked_reader_does_not_hold_up_the_end(log: Log) -> None:
    """Closing gives up on a reader that takes nothing."""
    log.fill()
    log.writer.write(b"line")
    log.writer.close(timeout=0.01)


def test_a_reader_that_has_gone_is_counted_too(log: Log) -> None:
    """Lines for which there is nobody any more are dropped and counted, one by one."""
    os.close(log.source)
    for line in numbered(10):
        log.writer.write(line)
    log.writer.close()
    assert log.dropped == 10


def foreign(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, Any]:
    """The line for a library's record, which must be one JSON object."""
    written: list[bytes] = []
    trouble = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("library", logging.WARNING, __file__, 1, message, arguments, trouble)
    ForeignHandler("json", written.append).emit(record)
    (line,) = written
    assert b"\n" not in line
    document = json.loads(line, parse_constant=pytest.fail)
    assert isinstance(document, dict)
    return document


@given(text=st.text(st.characters()))
def test_whatever_is_logged_is_one_line_of_json(text: str) -> None:
    """Newlines, quotes, control characters and lone surrogates stay inside their string."""
    line = foreign("%s", text)
    assert (line["event"], line["level"], line["logger"]) == (text, "warning", "library")


def test_a_record_that_does_not_fit_its_arguments_is_still_a_line() -> None:
    """A library's mistake in a log call does not become an error of the request it was made in."""
    assert "%d items" in foreign("%d items", "many")["event"]


def test_exceptions_are_logged_without_their_messages() -> None:
    """Types, frames and causes are there to find the fault; messages, which quote data, are not."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as cause:
            raise ValueError(SECRET) from cause
    except ValueError as error:
        line = foreign("failed", error=error)
    assert line["exception"].index("KeyError") < line["exception"].index("ValueError")
    assert "test_exceptions_are_logged" in line["exception"]
    assert SECRET not in json.dumps(line)
