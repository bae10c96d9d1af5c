"""The capability `tracing`: a span for each request, and no harm from a collector that takes none."""

import base64
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.tracing.spans import MAX_SPANS
from tests.service.capabilities.collector import Collector, collecting
from tests.service.conftest import Service, pipelined, until

Start = Callable[..., Service]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    """A collector of one's own."""
    with collecting(tmp_path) as one:
        yield one


def test_a_request_is_a_span_of_its_caller_s_trace(
    start: Start, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction's span has the trace of `traceparent` and of the log line, the route, and no payload."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    service = start(workers=1, tracing_endpoint=collector.url)
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    traced = service.predict(headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
    assert service.line(traced.headers["x-request-id"])["trace_id"] == trace_id
    span = collector.span(trace_id)
    assert span["name"] == "POST /v1/predict"
    assert base64.b64decode(span["parentSpanId"]).hex() == "00f067aa0ba902b7"
    assert span["attributes"].keys() == {
        "http.request.method", "http.response.status_code", "http.route", "network.protocol.version",
        "url.scheme",
    }  # fmt: skip
    # Without a caller's trace the line has the span's own; what is refused and what fails is traced too.
    for answer, name in (
        (service.predict(), "POST /v1/predict"),
        (service.predict({}), "POST /v1/predict"),
        (service.client.get("/version"), "GET /version"),
        (service.client.get("/nowhere"), "GET"),
    ):
        line = service.line(answer.headers["x-request-id"])
        span = collector.span(line["trace_id"])
        assert span["name"] == name
        assert span["attributes"]["http.response.status_code"] == {"intValue": str(answer.status_code)}
    unsampled = "f" * 32
    quiet = service.predict(headers={"traceparent": f"00-{unsampled}-00f067aa0ba902b7-00"})
    assert service.line(quiet.headers["x-request-id"])["trace_id"] == unsampled
    last = service.line(service.predict().headers["x-request-id"])["trace_id"]
    assert service.stop() == 0
    assert collector.span(last), "what waits is sent at the end"
    assert unsampled not in {one["trace_id"] for one in collector.spans()}


@pytest.mark.parametrize("kind", ["silent", "absent"])
def test_a_collector_that_takes_nothing_holds_up_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Absent or silent, it costs spans, which are counted, but no answer and no orderly end."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with socket.socket() as collector:
        collector.bind(("127.0.0.1", 0))  # a port that nobody else takes, and that refuses connections
        if kind == "silent":
            collector.listen()  # connections are made, and nobody reads what is sent
        service = start(workers=1, tracing_endpoint=f"http://127.0.0.1:{collector.getsockname()[1]}")
        pipelined(service.url, MAX_SPANS + 500)
        assert service.metrics()["trace_spans_dropped_total"] >= 500, "no more than MAX_SPANS wait"
        until(lambda: service.metrics()["trace_spans_dropped_total"] >= 1000, "a batch to be given up")
        assert service.predict().status_code == 200
        assert service.stop() == 0
