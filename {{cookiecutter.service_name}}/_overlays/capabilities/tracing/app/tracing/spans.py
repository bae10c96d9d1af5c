"""Spans of requests, and their export to the collector.

    request -> Spans (a span, its trace id in the scope) -> bounded queue -> thread -> collector

A slow or unreachable collector blocks the thread, never a request: spans are then dropped and counted.
"""

import asyncio
from collections.abc import Callable, Sequence
from threading import Thread
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import DEFAULT_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_SPANS = 2048  # waiting for the collector
EXPORT_SECONDS = 5.0  # for a batch of spans, including retries
CLOSE_SECONDS = 2.0  # for waiting spans at the end of the process
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

OnDrop = Callable[[int], None]


class Spans:
    """ASGI middleware: a server span for each request.

    Attributes come from closed sets: no path, query, host or header, which may hold anything. The caller's
    `traceparent` decides about sampling; without it every span is sampled.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app, self._provider, self._tracer = app, provider, provider.get_tracer(__name__)
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Trace a request; at the end of the lifespan send the waiting spans."""
        if scope["type"] != "http":
            await self._app(scope, receive, self._closing(send))
            return
        method = scope["method"] if scope["method"] in METHODS else "HTTP"
        # `tracestate` and `baggage` are not passed on: clients may write anything there.
        caller = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
        parent = self._propagator.extract({"traceparent": caller[0]} if caller else {})
        span = self._tracer.start_span(
            method,
            parent,
            trace.SpanKind.SERVER,
            {
                "http.request.method": "_OTHER" if method == "HTTP" else method,
                "network.protocol.version": scope["http_version"],
                "url.scheme": scope["scheme"],
            },
        )
        scope["trace_id"] = trace.format_trace_id(span.get_span_context().trace_id)

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_status(span, message["status"])
            await send(message)

        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                await self._app(scope, receive, send_noted)
        except BaseException as error:
            span.set_status(trace.StatusCode.ERROR)
            span.set_attribute("error.type", type(error).__qualname__)
            raise
        finally:
            if route := scope.get("route_path"):
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()

    def _closing(self, send: Send) -> Send:
        """A `send` for the lifespan that exports the waiting spans before the process ends."""

        async def send_last(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await asyncio.to_thread(close, self._provider)
            await send(message)

        return send_last


def _note_status(span: trace.Span, status: int) -> None:
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(trace.StatusCode.ERROR)


def provide(name: str, version: str, endpoint: str, on_drop: OnDrop) -> TracerProvider:
    """The provider of spans for this service, which exports to the collector at `endpoint`."""
    if urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    resource = Resource.create({"service.name": name, "service.version": version})
    provider = TracerProvider(DEFAULT_ON, resource, shutdown_on_exit=False)
    provider.add_span_processor(_Queue(_Exporter(endpoint, on_drop), on_drop))
    return provider


def close(provider: TracerProvider) -> None:
    """Send the waiting spans, for at most CLOSE_SECONDS: a collector must not delay the exit."""
    thread = Thread(target=provider.shutdown, name="traces", daemon=True)
    thread.start()
    thread.join(CLOSE_SECONDS)


class _Exporter(SpanExporter):
    """Sends spans to the collector; `done` counts spans that were sent or given up."""

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
    """A queue that drops the newest span and counts it; the library's drops the oldest without a count."""

    def __init__(self, exporter: _Exporter, on_drop: OnDrop) -> None:
        super().__init__(exporter, max_queue_size=MAX_SPANS + 1)
        self._exporter, self._on_drop, self._taken = exporter, on_drop, 0

    def on_end(self, span: ReadableSpan) -> None:
        if self._taken - self._exporter.done >= MAX_SPANS:
            self._on_drop(1)
        elif span.context and span.context.trace_flags.sampled:
            self._taken += 1
            super().on_end(span)
