"""Back-pressure with a model of many milliseconds a row: nobody is lost, crossed, or left unanswered."""

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from app.core.runtimes import load_runtime
from app.core.store import read_artifact
from tests.service.conftest import (
    ARTIFACTS,
    EXAMPLE,
    INPUTS,
    LABELS,
    SERVED,
    Document,
    Service,
    assert_answers,
    copied_artifacts,
    spelled,
    until,
    varied,
)
from tests.service.gameday.trial import Trouble, make_trial
from tests.service.integration.test_http import assert_problem

WIDTH, STEPS = 4096, 500  # sines for each row, about six milliseconds of them
DISCONNECTS, IN_FLIGHT, ROWS = "client_disconnects_total", "inference_in_flight", "inference_batch_rows_sum"
QUEUE_FULL, DEADLINE = (f'requests_shed_total{{reason="{reason}"}}' for reason in ("queue_full", "deadline"))
Start = Callable[..., Service]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Artifacts whose v1 gives its answers after a lot of work for each row."""
    root = copied_artifacts(tmp_path)
    make_trial(root / "v1", Trouble(sines=STEPS, width=WIDTH))
    return root


def expected(instances: list[Document], artifacts: Path, version: str) -> list[Any]:
    """What the model gives to each by itself, without pipeline or server."""
    runtime = load_runtime(read_artifact(artifacts, version))
    rows = [[one[name] for name in INPUTS] for one in instances]
    return [runtime.infer(np.array([row], runtime.dtype))[0] for row in rows]


def numbers(answer: Document) -> list[float]:
    """The probabilities in the labels' order, or the value."""
    return [answer["probabilities"][spelled(label)] for label in LABELS] or [answer["value"]]


@contextmanager
def occupied(service: Service, rows: int) -> Iterator["Future[httpx2.Response]"]:
    """The model busy with that many rows of one request."""
    body = {"instances": [EXAMPLE] * rows}
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(service.client.post, "/v1/predict/batch", json=body)
        until(lambda: busy.done() or service.metrics()[IN_FLIGHT] == 1, "the model at work")
        yield busy
        assert busy.result().status_code in (200, 503)


def crowd(service: Service, size: int) -> list[http.client.HTTPConnection]:
    """That many clients who have sent a request and wait."""
    connections = [service.connection() for _ in range(size)]
    for connection in connections:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/predict", json.dumps(EXAMPLE), headers)
    return connections


def test_the_process_answers_while_the_model_works(start: Start, slow: Path) -> None:
    """A slow model runs in a thread: probes that come after a prediction are answered before it."""
    service = start(workers=1, artifacts_dir=slow)
    assert service.client.get("/version").json()["model"]["execution"] == "thread"
    with occupied(service, 256) as busy:
        for _ in range(20):
            asked = time.perf_counter()
            assert service.client.get("/health").status_code == 200
            assert time.perf_counter() - asked < 0.5  # generous: the promise is about people, not clocks
        assert service.client.get("/ready").status_code == 200
        assert not busy.done()
    predictions = busy.result().json()["predictions"]
    assert len(predictions) == 256
    for one in predictions:
        assert_answers(one, version="v1", artifacts=slow)


def test_at_overload_every_request_gets_an_answer(start: Start, slow: Path) -> None:
    """Those let in are answered rightly, the others are told at once to come back, and both are counted."""
    service = start(artifacts_dir=slow, max_concurrency=4, max_queue=4)
    until(lambda: [line["event"] for line in service.lines()].count("ready") == 2, "both workers")
    instances = varied(400)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(service.predict, instances))  # a reset connection would raise here
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 16 <= len(answers) - len(refused) < len(answers)
    for answer in refused:
        assert_problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    for answer, right in zip(answers, expected(instances, slow, "v1"), strict=True):
        if answer.status_code == 200:
            assert numbers(answer.json()) == pytest.approx(right, rel=1e-6, abs=1e-6)
    metrics = service.metrics()
    assert metrics[QUEUE_FULL] == len(refused)
    assert metrics[ROWS] == len(answers) - len(refused)
    assert metrics[IN_FLIGHT] == 0


def test_a_burst_is_no_overload(start: Start, slow: Path) -> None:
    """500 at once are all answered by one worker where that takes less than half of the deadline."""
    service = start(workers=1, artifacts_dir=slow, request_deadline_seconds=120, drain_seconds=130)
    connections = crowd(service, 500)
    assert {connection.getresponse().status for connection in connections} == {200}
    for connection in connections:
        connection.close()
    assert service.metrics()[QUEUE_FULL] == 0


def test_what_would_wait_too_long_is_refused_at_once(start: Start, slow: Path) -> None:
    """Beyond what half of the deadline can answer, requests are told when to come back: rows count."""
    service = start(workers=1, artifacts_dir=slow, request_deadline_seconds=8, max_batch_items=600)
    body = {"instances": [EXAMPLE] * 600}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: service.client.post("/v1/predict/batch", json=body), range(12)))
    refused = [
        answer for answer in answers if answer.status_code != 200 and answer.json()["code"] == "overloaded"
    ]
    assert refused  # twelve take tens of seconds
    for answer in refused:
        assert_problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    metrics = service.metrics()
    assert metrics[QUEUE_FULL] == len(refused)
    until(lambda: service.predict().status_code == 200, "a model at rest")


def test_what_is_too_late_is_not_run(start: Start, slow: Path) -> None:
    """At its deadline a request gets 503, running or waiting; what was waiting is never run."""
    service = start(workers=1, artifacts_dir=slow, request_deadline_seconds=0.5, max_batch_items=600)
    with occupied(service, 600) as busy, ThreadPoolExecutor(3) as pool:
        late = [*pool.map(lambda _: service.predict(), range(3)), busy.result()]
    for answer in late:
        assert_problem(answer, 503, "model_timeout")
        assert int(answer.headers["retry-after"]) >= 1
    until(lambda: service.metrics()[ROWS] == 600, "the model at rest")
    assert service.predict().status_code == 200
    metrics = service.metrics()
    assert (metrics[DEADLINE], metrics[ROWS], metrics[IN_FLIGHT]) == (4, 601, 0)


def test_clients_that_hang_up_take_no_slot_with_them(start: Start, slow: Path) -> None:
    """Of 200 who leave while waiting each is counted, none is run, and 200 others find the same room."""
    settings = {"max_concurrency": 8, "max_queue": 193, "request_deadline_seconds": 60, "drain_seconds": 70}
    service = start(workers=1, artifacts_dir=slow, max_batch_items=400, **settings)
    with occupied(service, 400) as busy:
        leavers = crowd(service, 200)
        until(lambda: service.metrics()[IN_FLIGHT] == 201, "a full house")
        assert_problem(service.predict(), 503, "overloaded")
        for connection in leavers:
            connection.close()
        until(lambda: service.metrics()[DISCONNECTS] == 200, DISCONNECTS)
        assert service.metrics()[IN_FLIGHT] == 1
        others = crowd(service, 200)
        until(lambda: service.metrics()[IN_FLIGHT] == 201, "a full house again")
        assert_problem(service.predict(), 503, "overloaded")
        assert not busy.done()
    for connection in others:
        answer = connection.getresponse()
        assert answer.status == 200
        assert_answers(json.loads(answer.read()), version="v1", artifacts=slow)
        connection.close()
    metrics = service.metrics()
    assert (metrics[ROWS], metrics[IN_FLIGHT], metrics[DISCONNECTS]) == (600, 0, 200)


def test_a_thousand_callers_get_a_thousand_answers(service: Service) -> None:
    """1,000 different instances sent at once to two workers: every answer is the one to its own question."""
    instances = varied(1000)

    async def ask() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=250)  # a shell's usual limit of open files is 1,024
        async with httpx2.AsyncClient(base_url=service.url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/predict", json=one) for one in instances))

    answers = [answer.json() for answer in asyncio.run(ask())]
    assert len({answer["prediction_id"] for answer in answers}) == 1000
    for answer, right in zip(answers, expected(instances, ARTIFACTS, SERVED), strict=True):
        assert numbers(answer) == pytest.approx(right, rel=1e-6, abs=1e-6)
