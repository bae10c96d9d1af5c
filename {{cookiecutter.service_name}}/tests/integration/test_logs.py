"""The log: one JSON line a request, in one shape, without what a client sent."""

import json
import re
from collections.abc import Callable

from tests.conftest import SETOSA, Service

KEYS = {
    "timestamp", "level", "event", "request_id", "trace_id", "method", "route", "status", "duration_ms",
    "model_version", "prediction_id", "client",
}  # fmt: skip
CANARY = 7.123456


def test_a_request_is_one_line(service: Service) -> None:
    """A prediction is logged once, with who, what, when, how long and by which model."""
    answer = service.predict()
    line = service.line(answer.headers["x-request-id"])
    assert line.keys() == KEYS
    assert line["event"] == "request"
    assert (line["level"], line["method"], line["route"], line["status"]) == (
        "info",
        "POST",
        "/v1/predict",
        200,
    )
    assert (line["model_version"], line["prediction_id"]) == ("v1", answer.json()["prediction_id"])
    assert line["duration_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00)", line["timestamp"])
    assert "127.0.0.1" not in line["client"]


def test_a_refused_request_is_one_line_too(service: Service) -> None:
    """Errors are logged in the same shape; a path that does not exist is not repeated."""
    refused = service.predict({}), service.client.get("/secret-path"), service.client.get("/v1/predict")
    lines = [service.line(answer.headers["x-request-id"]) for answer in refused]
    assert all(line.keys() == KEYS for line in lines)
    assert [line["status"] for line in lines] == [422, 404, 405]
    assert "secret-path" not in json.dumps(lines)


def test_a_trace_is_carried_into_the_line(service: Service) -> None:
    """The trace id of `traceparent` stands in the line; a malformed one does not."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    traced = service.predict(headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
    assert service.line(traced.headers["x-request-id"])["trace_id"] == trace_id
    untraced = service.predict(headers={"traceparent": f"00-{trace_id}"})
    assert service.line(untraced.headers["x-request-id"])["trace_id"] is None


def test_what_a_client_sends_is_never_logged(service: Service) -> None:
    """Neither features nor invalid input, queries, names or header values come up in the log."""
    secrets = [str(CANARY), "canary-text", "canary_name", "canary-query", "canary-header"]
    answers = [
        service.predict({**SETOSA, "sepal_length": CANARY}),
        service.predict({**SETOSA, "sepal_length": "canary-text", "canary_name": CANARY}),
        service.predict(content=b'{"sepal_length": canary-text'),
        service.predict(params={"q": "canary-query"}, headers={"idempotency-key": "canary-header"}),
    ]
    for answer in answers:
        service.line(answer.headers["x-request-id"])
    text = service.log.read_text()
    assert not [secret for secret in secrets if secret in text]


def test_server_and_libraries_log_in_the_same_shape(service: Service) -> None:
    """Every line on stdout is a JSON object with time, level and event, whoever wrote it."""
    lines = service.lines()
    assert len({line["logger"] for line in lines if "logger" in line}) > 1
    assert all({"timestamp", "level", "event"} <= line.keys() for line in lines)


def test_a_person_may_ask_for_readable_lines(start: Callable[..., Service]) -> None:
    """APP_LOG_FORMAT=console writes for eyes, and APP_LOG_LEVEL is heeded."""
    service = start(workers=1, log_format="console")
    service.predict(headers={"x-request-id": "seen"})
    service.stop()
    (line,) = [line for line in service.log.read_text().splitlines() if "seen" in line]
    assert "/v1/predict" in line
    assert not line.startswith("{")
