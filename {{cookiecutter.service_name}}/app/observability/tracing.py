"""Spans over OTLP/HTTP, when APP_TRACING_ENDPOINT is set; imported only then.

    FastAPI's telemetry -> sampler (drops what a client made up) -> bounded queue -> thread -> collector

A collector that is slow or away blocks the thread, never a request: spans are then dropped and counted.
"""

from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Sampler, SamplingResult

MAX_SPANS = 2048  # that wait for the collector
EXPORT_SECONDS = 5.0  # for one batch of them, retries included
# Not among them: path, query, host and method as sent, which may hold anything.
_KEPT = frozenset({"http.request.method", "network.protocol.version", "url.scheme"})

OnDrop = Callable[[int], None]


class _Discreet(Sampler):
    """Samples what the caller samples, and everything of callers that do not trace."""

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *rest: Any) -> SamplingResult:
        result = DEFAULT_ON.should_sample(parent_context, trace_id, name, *rest)
        kept = {name: value for name, value in (result.attributes or {}).items() if name in _KEPT}
        return SamplingResult(result.decision, kept)  # and without the caller's tracestate

    def get_description(self) -> str:
        return "Discreet"


class _Exporter(SpanExporter):
    """The collector, with a count of the spans that it was offered and did not get."""

    def __init__(self, endpoint: str, on_drop: OnDrop) -> None:
        self._inner, self._on_drop, self.done = OTLPSpanExporter(endpoint, timeout=EXPORT_SECONDS), on_drop, 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        self.done += len(spans)
        if result is not SpanExportResult.SUCCESS:
            self._on_drop(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call]


class _Queue(BatchSpanProcessor):
    """The library's queue, which drops the oldest in silence; this one counts, and drops the newest."""

    def __init__(self, exporter: _Exporter, on_drop: OnDrop) -> None:
        super().__init__(exporter, max_queue_size=MAX_SPANS + 1)
        self._exporter, self._on_drop, self._taken = exporter, on_drop, 0

    def on_end(self, span: ReadableSpan) -> None:
        if self._taken - self._exporter.done >= MAX_SPANS:
            self._on_drop(1)
        elif span.context and span.context.trace_flags.sampled:
            self._taken += 1
            super().on_end(span)


class Tracing:
    """The tracer provider for FastAPI, and its end."""

    def __init__(self, name: str, version: str, endpoint: str, on_drop: OnDrop) -> None:
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        resource = Resource.create({"service.name": name, "service.version": version})
        self.provider = TracerProvider(_Discreet(), resource, shutdown_on_exit=False)
        self.provider.add_span_processor(_Queue(_Exporter(endpoint, on_drop), on_drop))

    def trace_id(self) -> str | None:
        """The trace that the current request belongs to: the caller's or, where it sent none, a new one."""
        context = trace.get_current_span().get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    def name(self, method: str, route: str) -> None:
        """Name the current request's span, as FastAPI's router does for the routes that it dispatches."""
        span = trace.get_current_span()
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)

    def close(self, timeout: float = 2.0) -> None:
        """Send what waits, for at most `timeout` seconds: a collector must not hold up the exit."""
        thread = Thread(target=self.provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(timeout)
