"""The capability `tracing`: where spans go is checked at the start, and each request has one span.

docs/tracing.md <-> app/tracing/
"""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Message, Receive, Scope, Send

from app.settings import SettingsError, load_settings
from app.tracing.spans import Spans

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_endpoint_is_an_address_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """APP_TRACING_ENDPOINT takes an address; one with a password is refused by name and not shown."""
    monkeypatch.setenv("APP_TRACING_ENDPOINT", "http://collector:4318")
    load_settings()
    monkeypatch.setenv("APP_TRACING_ENDPOINT", "http://user:secret@collector:4318")
    with pytest.raises(SettingsError, match="APP_TRACING_ENDPOINT") as refused:
        load_settings()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("status", "failed"), [(200, False), (422, False), (503, True)])
def test_a_request_is_one_span_of_its_caller_s_trace(status: int, failed: bool) -> None:
    """The span has the caller's trace, route and status, and nothing that the client made up."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        assert scope["trace_id"] == TRACE
        scope["route_path"] = "/v1/predict"
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(_message: Message) -> None:
        return None

    headers = [(b"traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode()), (b"x-made-up", b"kestrel")]
    scope = {
        "type": "http", "method": "POST", "path": "/kestrel", "query_string": b"kestrel",
        "scheme": "http", "http_version": "1.1", "headers": headers,
    }  # fmt: skip
    call = Spans(app, provider)(scope, receive, send)
    with pytest.raises(StopIteration):  # nothing in it waits
        call.send(None)
    (span,) = kept.get_finished_spans()
    assert span.name == "POST /v1/predict"
    assert (span.attributes or {})["http.response.status_code"] == status
    assert span.status.is_ok is not failed
    assert "kestrel" not in span.to_json()
