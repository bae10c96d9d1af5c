"""The log is one JSON line a request without what a client sent; the metrics add up over workers."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import SETOSA, VIRGINICA, Service, until

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


Start = Callable[..., Service]
HOSTILE = (
    "/v1/predict/extra",
    "/wp-login.php",
    "/health/",
    "/a%00b",
    "/%E2%82%AC",
    "//health",
    "/" + "x" * 2000,
)


def total(metrics: dict[str, float], name: str, *labels: str) -> float:
    """The sum of the samples of this name that carry all these labels."""
    return sum(
        value
        for sample, value in metrics.items()
        if re.split(r"[{ ]", sample)[0] == name and all(label in sample for label in labels)
    )


def test_a_thousand_requests_are_a_thousand(start: Start) -> None:
    """However two workers shared the requests, every scrape says exactly what was sent and answered."""
    service = start()
    bodies = [VIRGINICA if index % 2 else SETOSA for index in range(900)] + [{"sepal_length": 1.0}] * 100
    with ThreadPoolExecutor(16) as pool:
        statuses = [answer.status_code for answer in pool.map(service.predict, bodies)]
    assert (statuses.count(200), statuses.count(422)) == (900, 100)
    for _ in range(6):  # fresh connections: whichever worker answers, it speaks for both
        metrics = service.metrics()
        here = 'handler="/v1/predict"', 'method="POST"'
        assert total(metrics, "http_requests_total", *here) == 1000
        assert total(metrics, "http_requests_total", *here, 'status="200"') == 900
        assert total(metrics, "http_requests_total", *here, 'status="422"') == 100
        assert total(metrics, "http_request_duration_seconds_count", *here) == 1000
        assert total(metrics, "http_request_duration_seconds_bucket", *here, 'le="+Inf"') == 1000
        assert total(metrics, "predictions_total") == 900
        for label in ("setosa", "virginica"):
            assert total(metrics, "predictions_total", f'label="{label}"', 'model_version="v1"') == 450
        assert total(metrics, "prediction_score_count", 'model_version="v1"') == 900
        assert total(metrics, "inference_batch_rows_sum") == 900
        assert total(metrics, "inference_stage_duration_seconds_count", 'stage="postprocess"') == 900
        assert total(metrics, "schema_violations_total", 'reason="missing"') == 300
        assert total(metrics, "inference_in_flight") == 0


def test_a_batch_counts_its_rows(start: Start) -> None:
    """A batch is one request and as many predictions as it has instances."""
    service = start(workers=1)
    service.client.post(
        "/v1/predict/batch", json={"instances": [SETOSA] * 30 + [{**SETOSA, "sepal_length": 50}] * 3}
    )
    metrics = service.metrics()
    assert total(metrics, "http_requests_total", 'handler="/v1/predict/batch"', 'status="200"') == 1
    assert total(metrics, "predictions_total") == 33
    assert total(metrics, "predictions_total", 'action="review"') == 3
    assert metrics['feature_out_of_range_total{feature="sepal_length"}'] == 3


def test_unknown_paths_and_names_make_no_series(start: Start) -> None:
    """What a stranger invents, path, method, field or header, shows in no label."""
    service = start(workers=1)
    for index, path in enumerate(HOSTILE):
        service.client.request(("GET", "POST", "PROPFIND")[index % 3], path)
        service.predict({**SETOSA, f"field{index}": 1}, headers={"x-request-id": f"id{index}"})
    service.metrics()
    before = service.metrics().keys()
    for index in range(50):
        service.client.get(f"/unknown/{index}")
        service.predict({**SETOSA, f"other{index}": 1})
        service.client.request("REPORT", "/v1/predict")
    after = service.metrics().keys()
    assert {re.sub(r"_created|le=.*", "", name) for name in after ^ before} <= {
        re.sub(r"_created|le=.*", "", name)
        for name in after
        if 'status="405"' in name or 'method="OTHER"' in name
    }
    assert not [name for name in after if re.search(r"unknown|field\d|other\d|php|xxx|PROPFIND|REPORT", name)]
    assert total(service.metrics(), "http_requests_total", 'status="404"') == 50 + len(HOSTILE)


def test_the_promised_names_are_there(service: Service) -> None:
    """Dashboards and alerts find the series they ask for after the first prediction."""
    service.predict()
    names = {re.split(r"[{ ]", name)[0] for name in service.metrics()}
    assert names >= {
        "http_requests_total", "http_request_duration_seconds_bucket", "client_disconnects_total",
        "inference_stage_duration_seconds_bucket", "inference_batch_rows_bucket", "inference_in_flight",
        "inference_queue_depth", "inference_admission_limit", "predictions_total", "prediction_score_bucket",
        "model_info", "model_load_seconds", "log_lines_dropped_total",
    }  # fmt: skip
    (info,) = [name for name in service.metrics() if name.startswith("model_info{")]
    assert 'version="v1"' in info
    assert 'runtime="onnx"' in info


def test_a_client_that_leaves_is_counted(start: Start) -> None:
    """A request whose client hung up before its answer is a disconnect, not an error."""
    service = start(workers=1)
    service.half_sent(b"{}").close()
    gone = "client_disconnects_total"
    until(lambda: service.metrics()[gone] == 1, gone)
    assert not [name for name in service.metrics() if 'status="5' in name]


def test_metrics_can_be_off(start: Start) -> None:
    """With APP_METRICS_ENABLED=false there is no /metrics, and predictions go on."""
    service = start(workers=2, metrics_enabled="false")
    assert service.client.get("/metrics").status_code == 404
    assert service.predict().status_code == 200
