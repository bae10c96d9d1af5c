"""The capability `tracing`: a span for each request, over OTLP/HTTP, when APP_TRACING_ENDPOINT is set."""

from fastapi import FastAPI
from prometheus_client import Counter

from app.api.call import Service
from app.tracing.settings import Settings


def install(app: FastAPI, service: Service) -> None:
    """Wrap the application in the outermost middleware, `Spans`; without an endpoint do nothing."""
    settings, inner = service.settings, app.middleware_stack
    if not isinstance(settings, Settings) or settings.tracing_endpoint is None or inner is None:
        return
    from app.tracing.spans import Spans, provide  # here: not needed without an endpoint

    dropped = Counter(
        "trace_spans_dropped_total",
        "Spans that the collector did not take.",
        registry=service.metrics.registry,
    )
    provider = provide(service.name, service.version, settings.tracing_endpoint, dropped.inc)
    app.middleware_stack = Spans(inner, provider)
