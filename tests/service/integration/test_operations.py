"""Life of the service: loading, overload, deadlines, draining."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.conftest import (
    EXAMPLE,
    FIELD,
    LABELS,
    NUMBER,
    Service,
    assert_answers,
    copied_artifacts,
    until,
)
from tests.service.integration.test_artifacts import rewrite
from tests.service.integration.test_http import KEYS, assert_problem

RULES = 10_000
PREDICTION = json.dumps(EXAMPLE).encode()
Start = Callable[..., Service]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Artifacts whose v0 is slow to load and takes milliseconds a row: ten thousand rules that never hold."""
    root = copied_artifacts(tmp_path)
    rules = json.loads((root / "v0" / "rules.json").read_bytes())
    never = {**rules["otherwise"], "when": {NUMBER: {">=": 1e30}} if NUMBER else {FIELD: {"==": "never"}}}
    rules["rules"] = [never] * RULES + rules["rules"]
    rewrite(root / "v0", "rules.json", json.dumps(rules).encode())
    return root


def test_ready_never_lies(start: Start, slow: Path) -> None:
    """While the model loads the process is alive but not ready; once /ready says so, a prediction works."""
    service = start(ready=False, workers=1, artifacts_dir=slow, model_version="v0")
    until(lambda: service.answers("/health"), "/health")
    refused = 0
    while (answer := service.client.get("/ready")).status_code != 200:
        assert_problem(answer, 503, "model_not_ready")
        assert "model" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) > 0
        assert service.client.get("/health").status_code == 200
        refused += 1
    assert refused
    assert service.predict().status_code == 200


def test_a_prediction_while_loading_is_told_to_come_back(start: Start, slow: Path) -> None:
    """Until the model is there a prediction gets 503 with Retry-After, and is counted as shed."""
    service = start(ready=False, workers=1, artifacts_dir=slow, model_version="v0")
    until(lambda: service.answers("/health"), "/health")
    answer = service.predict()
    assert_problem(answer, 503, "model_not_ready")
    assert int(answer.headers["retry-after"]) > 0
    assert service.metrics()['requests_shed_total{reason="not_ready"}'] == 1
    assert service.client.get("/version").json()["model"] is None


def test_the_rules_answer_under_the_same_contract(start: Start) -> None:
    """With APP_MODEL_VERSION=v0 the stub serves, and a client notices only the version."""
    service = start(workers=1, model_version="v0")
    assert service.client.get("/ready").json()["model_version"] == "v0"
    body = service.predict().json()
    assert body["model_version"] == "v0"
    assert_answers(body, version="v0")
    assert body.keys() == KEYS
    if LABELS:
        assert sum(body["probabilities"].values()) == pytest.approx(1)
    assert_problem(service.predict({}), 422, "invalid_input")
    assert service.client.get("/version").json()["model"]["runtime"] == "rules"


def test_too_many_requests_at_once_are_shed(start: Start, slow: Path) -> None:
    """With the queue full the rest get 503 and Retry-After at once; those inside are answered, probes too."""
    service = start(workers=1, artifacts_dir=slow, model_version="v0", max_concurrency=1, max_queue=2)
    burst = {"instances": [EXAMPLE] * 64}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: service.client.post("/v1/predict/batch", json=burst), range(20)))
        assert service.answers("/health")
    shed = [answer for answer in answers if answer.status_code != 200]
    assert shed
    assert len(shed) < 20
    for answer in shed:
        assert_problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) > 0
    assert service.metrics()['requests_shed_total{reason="queue_full"}'] == len(shed)
    assert service.predict().status_code == 200


def test_a_deadline_is_kept(start: Start, slow: Path) -> None:
    """A prediction that takes too long is answered 503 with Retry-After, and the service goes on."""
    service = start(workers=1, artifacts_dir=slow, model_version="v0", request_deadline_seconds=0.2)
    answer = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 256})
    assert_problem(answer, 503, "model_timeout")
    assert int(answer.headers["retry-after"]) > 0
    assert service.metrics()['requests_shed_total{reason="deadline"}'] == 1
    until(lambda: service.predict().status_code == 200, "a prediction after the timeout")


def test_a_sender_that_stalls_meets_the_deadline(start: Start) -> None:
    """The deadline is for the whole request, so a body that never comes is answered, too."""
    service = start(workers=1, request_deadline_seconds=0.3)
    connection = service.half_sent(PREDICTION)
    answer = connection.getresponse()
    code = json.loads(answer.read())["code"]
    connection.close()
    assert (answer.status, code) == (503, "model_timeout")


def test_stopping_answers_what_was_accepted(start: Start) -> None:
    """On SIGTERM nothing new is taken, a request that is inside gets its answer, and the exit code is 0."""
    service = start(workers=1)
    connection = service.half_sent(PREDICTION)
    service.process.terminate()
    until(lambda: not service.listening(), "the closed door")
    connection.send(PREDICTION)
    answer = connection.getresponse()
    assert answer.status == 200
    assert_answers(json.loads(answer.read()))
    assert service.stop() == 0
    assert any(line.get("status") == 200 for line in service.lines())


def test_an_idle_service_stops_at_once(start: Start) -> None:
    """SIGTERM ends an idle service with exit code 0."""
    assert start().stop() == 0
