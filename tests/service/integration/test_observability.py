"""The log is one JSON line a request without what a client sent; the metrics add up over workers."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.settings import installed
from tests.service.capabilities.collector import Collector, collecting
from tests.service.conftest import (
    ANSWER,
    EXAMPLE,
    FIELD,
    GUNICORN,
    INPUTS,
    LABELS,
    MANIFEST,
    NUMBER,
    OTHER,
    OTHER_ANSWER,
    PATIENCE_SECONDS,
    SERVED,
    WITH_NUMBER,
    Service,
    begin,
    end,
    environment,
    number,
    pipelined,
    serving,
    spelled,
    until,
    wrong,
)

KEYS = {
    "timestamp", "level", "event", "request_id", "trace_id", "method", "route", "status", "duration_ms",
    "model_version", "prediction_id", "client",
}  # fmt: skip
CANARY = 7.123456 if not NUMBER or INPUTS[NUMBER]["dtype"] == "float64" else 7123456


def test_a_request_is_one_line(service: Service) -> None:
    """A prediction is logged once, with who, what, when, how long and by which model."""
    answer = service.predict()
    line = service.line(answer.headers["x-request-id"])
    assert line.keys() == KEYS | {"thresholds", "predictions"}
    assert line["event"] == "request"
    assert (line["level"], line["method"], line["route"], line["status"]) == (
        "info",
        "POST",
        "/v1/predict",
        200,
    )
    assert (line["model_version"], line["prediction_id"]) == (SERVED, answer.json()["prediction_id"])
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
    """The trace id of a `traceparent` that W3C's rules take stands in the line; of any other, none does."""
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    taken = [
        f"00-{trace_id}-{parent}-01", f"00-{trace_id}-{parent}-ff", f"01-{trace_id}-{parent}-01",
        f"01-{trace_id}-{parent}-01-what-the-future-brings", f"cc-{trace_id}-{parent}-00-",
    ]  # fmt: skip
    refused = [
        "", f"00-{trace_id}", f"00-{'0' * 32}-{parent}-01", f"00-{trace_id}-{'0' * 16}-01",
        f"ff-{trace_id}-{parent}-01", f"00-{trace_id}-{parent}-01-extra",
        f"00-{trace_id.upper()}-{parent}-01", f"00-{trace_id}-{parent}-1", f"0-{trace_id}-{parent}-01",
        f"01-{trace_id}-{parent}-01.extra",
        f"00-{trace_id[:-1]}-{parent}-01", f"00-{trace_id[:-1]}g-{parent}-01",
    ]  # fmt: skip
    for header in taken + refused:
        answer = service.predict(headers={"traceparent": header})
        logged = service.line(answer.headers["x-request-id"])["trace_id"]
        expected = trace_id if header in taken else None
        # A capability that makes spans begins a trace where the client has none.
        assert logged == expected or (not expected and "tracing" in installed() and logged != trace_id), (
            header
        )
    twice = service.predict(headers=[("traceparent", taken[0]), ("traceparent", taken[1])])
    if "tracing" not in installed():
        assert service.line(twice.headers["x-request-id"])["trace_id"] is None


def test_a_scrape_gets_the_format_it_asks_for(service: Service) -> None:
    """The text format 0.0.4 unless another is asked for, also by a Prometheus that lists several."""
    text, newer = "text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0"
    prometheus_2 = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,*/*;q=0.1"
    asked = {
        "": text, "*/*": text, "text/plain;version=0.0.4": text, "text/plain": text, "application/json": text,
        "application/openmetrics-text;version=1.0.0": newer, prometheus_2: newer, prometheus_3: newer,
        "text/plain;version=1.0.0": "text/plain; version=1.0.0",
    }  # fmt: skip
    service.predict()
    for accept, expected in asked.items():
        answer = service.client.get("/metrics", headers={"accept": accept})
        assert answer.headers["content-type"].startswith(expected), accept
        assert answer.text.endswith("# EOF\n") is (expected == newer)
        assert re.search(r"^predictions_total\{.* [0-9.]+$", answer.text, re.MULTILINE)


def test_what_a_client_sends_is_never_logged(service: Service) -> None:
    """Neither features nor invalid input, queries, names or header values come up in the log."""
    secrets = [str(CANARY), "canary-text", "canary_name", "canary-query", "canary-header"]
    answers = [
        service.predict({**EXAMPLE, FIELD: CANARY}),
        service.predict({**EXAMPLE, FIELD: "canary-text", "canary_name": CANARY}),
        service.predict(content=b'{"any feature": canary-text'),
        service.predict(params={"q": "canary-query"}, headers={"idempotency-key": "canary-header"}),
    ]
    for answer in answers:
        service.line(answer.headers["x-request-id"])
    text = service.log.read_text()
    assert not [secret for secret in secrets if secret in text]


def test_server_and_libraries_log_in_the_same_shape(service: Service) -> None:
    """Every line on stdout is a JSON object with time, level and event: ours, gunicorn's and uvicorn's."""
    service.predict()
    wanted = {None, "gunicorn.error", "uvicorn.error"}
    until(lambda: wanted <= {line.get("logger") for line in service.lines()}, "a line of each")
    assert all({"timestamp", "level", "event"} <= line.keys() for line in service.lines())


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
    bodies = [OTHER if index % 2 else EXAMPLE for index in range(900)] + [{}] * 100
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
        version = f'model_version="{SERVED}"'
        for label in (ANSWER, OTHER_ANSWER) if LABELS else ():
            assert total(metrics, "predictions_total", f'label="{spelled(label)}"', version) == 450
        assert (
            total(metrics, "prediction_score_count" if LABELS else "prediction_value_count", version) == 900
        )
        assert total(metrics, "inference_batch_rows_sum") == 900
        assert total(metrics, "inference_stage_duration_seconds_count", 'stage="postprocess"') == 900
        assert total(metrics, "schema_violations_total", 'reason="missing"') == 100 * len(INPUTS)
        assert total(metrics, "inference_in_flight") == 0


@WITH_NUMBER
def test_a_batch_counts_its_rows(start: Start) -> None:
    """A batch is one request and as many predictions as it has instances."""
    service = start(workers=1)
    instances = [EXAMPLE] * 30 + [{**EXAMPLE, NUMBER: number(2)}] * 3
    service.client.post("/v1/predict/batch", json={"instances": instances})
    metrics = service.metrics()
    assert total(metrics, "http_requests_total", 'handler="/v1/predict/batch"', 'status="200"') == 1
    assert total(metrics, "predictions_total") == 33
    assert total(metrics, "predictions_total", 'action="review"') == 3
    assert total(metrics, "feature_out_of_range_total", f'feature="{NUMBER}"') == 3


def test_unknown_paths_and_names_make_no_series(start: Start) -> None:
    """What a stranger invents, path, method, field or header, shows in no label."""
    service = start(workers=1)
    for index, path in enumerate(HOSTILE):
        service.client.request(("GET", "POST", "PROPFIND")[index % 3], path)
        service.predict({**EXAMPLE, f"field{index}": 1}, headers={"x-request-id": f"id{index}"})
    service.metrics()
    before = service.metrics().keys()
    for index in range(50):
        service.client.get(f"/unknown/{index}")
        service.predict({**EXAMPLE, f"other{index}": 1})
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
        "inference_queue_depth", "inference_admission_limit", "predictions_total",
        "prediction_score_bucket" if LABELS else "prediction_value_bucket",
        "model_info", "model_load_seconds", "log_lines_dropped_total",
    }  # fmt: skip
    (info,) = [name for name in service.metrics() if name.startswith("model_info{")]
    assert f'version="{SERVED}"' in info
    assert f'runtime="{MANIFEST["runtime"]}"' in info


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


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector | None]:
    """A collector of spans, if this service has the capability to send any."""
    with collecting(tmp_path) if "tracing" in installed() else nullcontext() as one:
        yield one


BROKEN = """
import asyncio, threading, warnings
from contextlib import asynccontextmanager
from app.api.call import CurrentCall
from app.main import create_app as create

class Quoting:
    def __init__(self, runtime):
        self._runtime, self.dtype = runtime, runtime.dtype

    def infer(self, matrix):
        numbers = [one for row in matrix.tolist() for one in row if isinstance(one, float | int)]
        if any(abs(one - CANARY) < 1e-3 for one in numbers):
            raise ValueError(f"cannot digest {matrix.tolist()}")
        return self._runtime.infer(matrix)

def create_app():
    app = create()

    @app.get("/break")
    async def break_model(call: CurrentCall) -> None:
        call.pipeline.model.runtime = Quoting(call.pipeline.model.runtime)

    @app.get("/crash/{secret}")
    async def crash(secret: str) -> None:
        def fail(text):
            raise RuntimeError(text)
        async def fail_later(text):
            fail(text)
        loop = asyncio.get_running_loop()
        threading.Thread(target=fail, args=(secret,)).start()
        loop.call_soon(fail, secret)
        tasks = [loop.create_task(fail_later(secret))]
        await asyncio.wait(tasks)
        del tasks
        try:
            fail(secret)
        except RuntimeError as cause:
            raise KeyError(secret) from cause

    return app
"""


def test_a_canary_appears_nowhere(tmp_path: Path, collector: Collector | None) -> None:
    """What a client sends, anywhere in a request, is in no log, error, metric or trace, however that fails.

    Names of unknown fields come back to their sender in `loc`, and nowhere else.
    """
    (tmp_path / "broken.py").write_text(BROKEN.replace("CANARY", str(CANARY)))
    key = "kestrel-key-that-is-right"
    settings: dict[str, Any] = {"workers": 1, "log_level": "DEBUG"}
    if collector is not None:
        settings["tracing_endpoint"] = collector.url
    digest = sha256(key.encode()).hexdigest()
    with serving(tmp_path, app="broken:create_app()", api_keys=digest, **settings) as service:
        right = {"x-api-key": key}
        marked = {
            **right, "user-agent": "kestrel", "cookie": "kestrel", "idempotency-key": "kestrel",
            "x-kestrel": "kestrel", "referer": "kestrel", "x-forwarded-for": "kestrel",
            "host": "kestrel.example", "tracestate": "kestrel=kestrel", "baggage": "kestrel=kestrel",
            "x-request-id": "kestrel kestrel", "traceparent": "00-" + "c" * 32 + "-00f067aa0ba902b7-01",
            "x-envoy-attempt-count": "kestrel",
        }  # fmt: skip
        assert service.client.get("/break").status_code == 200
        odd = {**EXAMPLE, FIELD: CANARY}
        answers = [
            service.predict(headers=marked, params={"q": "kestrel"}),
            service.predict(headers=marked | {"content-type": "kestrel/kestrel"}),
            service.predict(headers=marked | {"content-encoding": "kestrel"}),
            service.predict(headers={"x-api-key": "kestrel"}),
            service.predict(headers={"authorization": "Bearer kestrel"}),
            service.predict(headers=right, params={"api_key": "kestrel"}),
            service.predict({**EXAMPLE, FIELD: wrong("kestrel")}, headers=right),
            service.predict(content=b'{"any feature": kestrel', headers=right),
            service.predict(odd, headers=right),
            service.client.post("/v1/predict/batch", json={"instances": [odd, EXAMPLE]}, headers=right),
            service.client.get("/kestrel", headers=right, params={"kestrel": "kestrel"}),
            service.client.request("KESTREL", "/kestrel"),
            service.client.post(
                "/v1/feedback", json={"prediction_id": "0" * 32, "label": "kestrel"}, headers=right
            ),
            service.client.post(
                "/v1/feedback", json={"prediction_id": "kestrel", "label": "setosa"}, headers=right
            ),
            service.client.get("/crash/kestrel"),
        ]
        assert [answer.status_code for answer in answers].count(500) == (3 if NUMBER else 1)
        service.predict({**EXAMPLE, "kestrel": 1}, headers=right)
        service.predict({**EXAMPLE, "kestrel": 1}, headers=marked)
        address = httpx2.URL(service.url)
        for broken in (
            b"GET /kestrel kestrel\r\n\r\n",
            b"POST /v1/predict HTTP/1.1\r\nkestrel kestrel\r\n\r\n",
        ):
            with socket.create_connection((address.host, address.port), PATIENCE_SECONDS) as connection:
                connection.sendall(broken)
                assert b"kestrel" not in connection.recv(4096)
        metrics = httpx2.get(f"{service.url}/metrics").text
        service.stop()
        lines = service.lines()
    sources = {
        "log": service.log.read_text(),
        "metrics": metrics,
        "traces": collector.text if collector is not None else "",
        "answers": "".join(answer.text + str(answer.headers) for answer in answers),
    }
    for name, text in sources.items():
        assert "kestrel" not in text.lower(), name
        assert str(CANARY) not in text, name
    # It was not for want of failures: each left its type and its frames.
    exceptions = " ".join(line.get("exception", "") for line in lines)
    assert {*(["ValueError"] if NUMBER else []), "KeyError", "RuntimeError"} <= set(
        re.findall(r"\w+Error", exceptions)
    )
    assert len([line for line in lines if line["event"] == "an error on the event loop"]) == 2
    assert len([line for line in lines if line["event"] == "a thread failed"]) == 1
    assert collector is None or "c" * 32 in {span["trace_id"] for span in collector.spans()}


def test_a_reader_of_the_log_that_stops_holds_up_nobody(tmp_path: Path) -> None:
    """With the pipe full, predictions and the end of the service go on, and dropped lines are counted."""
    source, sink = os.pipe()
    variables = environment(host="127.0.0.1", port=0, workers=1)
    process = begin(tmp_path, *GUNICORN, env=variables, stdout=sink, stderr=subprocess.STDOUT)
    try:
        with os.fdopen(os.dup(source), "rb") as log:
            text = b""
            while b'"ready"' not in text:
                text += log.readline()
        url = re.search(rb"http://[0-9.:]+", text)[0].decode()  # type: ignore[index]
        os.set_blocking(sink, False)
        with suppress(BlockingIOError):
            while True:
                os.write(sink, b"x" * 512)
        os.set_blocking(sink, True)
        requests = 10_500
        pipelined(url, requests)
        with httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS) as client:
            service = Service(process, Path(os.devnull), url, client)
            assert service.predict().status_code == 200
            assert 0 < service.metrics()["log_lines_dropped_total"] <= requests
            assert service.stop() == 0
    finally:
        end(process)
        os.close(source)
        os.close(sink)


def test_a_broken_metric_file_does_not_fail_the_scrape(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed worker left empty, cut short or garbled is told; what the others counted is there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = start()
    assert {service.predict().status_code for _ in range(10)} == {200}
    before = total(service.metrics(), "predictions_total")
    assert (before, service.metrics()["metrics_files_broken"]) == (10, 0)
    (folder,) = tmp_path.glob("metrics-*")
    whole = max(folder.glob("histogram_*.db"), key=lambda path: path.stat().st_size).read_bytes()
    (folder / "counter_4000001.db").write_bytes(b"")
    (folder / "histogram_4000002.db").write_bytes(whole[:100])
    (folder / "counter_4000003.db").write_bytes(whole[:8] + b"\xff" * 4096)
    (folder / "gauge_livesum_4000004.db").write_bytes(b"\x01")
    metrics = service.metrics()
    assert metrics["metrics_files_broken"] == 4
    assert total(metrics, "predictions_total") == before
    assert "inference_in_flight" in metrics


def test_a_retry_is_recognised_in_answer_log_and_metrics(start: Start, tmp_path: Path) -> None:
    """On another replica it has the same id in answer and log, and is counted where a proxy tells."""
    (tmp_path / "other").mkdir()
    key = {"idempotency-key": "order 4711"}
    again = {**key, "x-envoy-attempt-count": "2"}  # as Envoy sends it when it retries
    with serving(tmp_path / "other", workers=1) as other:
        first = start(workers=1)
        answers = [first.predict(headers=key), other.predict(headers=again), other.predict(headers=key)]
        (identity,) = {answer.json()["prediction_id"] for answer in answers}
        lines = [
            one.line(answer.headers["x-request-id"])
            for one, answer in zip((first, other, other), answers, strict=True)
        ]
        assert {line["prediction_id"] for line in lines} == {identity}
        assert {line["idempotency_key"] for line in lines} == {sha256(b"order 4711").hexdigest()[:12]}
        assert [line.get("attempt") for line in lines] == [None, 2, None]
        assert total(first.metrics(), "requests_retried_total") == 0
        assert other.metrics()['requests_retried_total{sign="proxy"}'] == 1
        assert other.metrics()['requests_retried_total{sign="key"}'] == 1


def test_a_key_that_is_no_key_is_refused(service: Service) -> None:
    """An Idempotency-Key is 1 to 255 printable characters; anything else is 422 and names the header."""
    for key in ("", "x" * 256, "caf\u00e9".encode(), b"tab\there"):
        answer = service.predict(headers={"idempotency-key": key})
        (error,) = answer.json()["errors"]
        assert (answer.status_code, error["loc"]) == (422, ["header", "Idempotency-Key"])
    assert service.predict(headers={"idempotency-key": "x" * 255}).status_code == 200
