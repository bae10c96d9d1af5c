"""The metrics add up, with several workers, and their labels come from closed sets."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import SETOSA, VIRGINICA, Service, until

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
