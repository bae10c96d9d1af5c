"""Back-pressure with a model of many milliseconds a row: nobody is lost, crossed, or left unanswered."""

import asyncio
import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest

from app.core.runtimes import load_runtime
from app.core.store import read_artifact
from tests.conftest import ARTIFACTS, SETOSA, Service, until
from tests.integration.test_artifacts import rewrite
from tests.integration.test_http import assert_problem

WIDTH, STEPS = 4096, 500  # sines for each row, about six milliseconds of them
DISCONNECTS, IN_FLIGHT, ROWS = "client_disconnects_total", "inference_in_flight", "inference_batch_rows_sum"
QUEUE_FULL, DEADLINE = (f'requests_shed_total{{reason="{reason}"}}' for reason in ("queue_full", "deadline"))
Start = Callable[..., Service]
Features = dict[str, float]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Artifacts whose v1 gives the answers of the real one, after a lot of work for each row."""
    root = Path(shutil.copytree(ARTIFACTS, tmp_path / "artifacts"))
    model = onnx.load_from_string((root / "v1" / "model.onnx").read_bytes())
    graph, node, source = model.graph, onnx.helper.make_node, model.graph.input[0].name
    for own in graph.node:
        own.input[:] = ["worked" if name == source else name for name in own.input]
    names = [f"sine{step}" for step in range(STEPS)]
    work = [
        node("MatMul", [source, "widen"], [names[0]]),
        *(node("Sin", [before], [after]) for before, after in pairwise(names)),
        node("MatMul", [names[-1], "narrow"], ["nothing"]),
        node("Add", [source, "nothing"], ["worked"]),
    ]
    weights = {"widen": np.zeros((4, WIDTH), np.float32), "narrow": np.zeros((WIDTH, 4), np.float32)}
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    nodes = [*work, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    rewrite(root / "v1", "model.onnx", model.SerializeToString())
    return root


def flowers(count: int) -> list[Features]:
    """That many different instances, all in the range seen in training."""
    steps = np.linspace(0, 1, count).tolist()
    return [
        {"sepal_length": 4.3 + 3.6 * one, "sepal_width": 4.4 - 2.4 * one, "petal_length": 1.0 + 5.9 * one,
         "petal_width": 0.1 + 2.4 * one}
        for one in steps
    ]  # fmt: skip


def expected(instances: list[Features]) -> list[Any]:
    """The probabilities the model gives to each by itself, without pipeline or server."""
    runtime = load_runtime(read_artifact(ARTIFACTS, "v1"))
    return [runtime.infer(np.array([list(one.values())], np.float32))[0] for one in instances]


def probabilities(answer: dict[str, Any]) -> list[float]:
    """In the labels' order."""
    return [answer["probabilities"][label] for label in ("setosa", "versicolor", "virginica")]


@contextmanager
def occupied(service: Service, rows: int) -> Iterator["Future[httpx2.Response]"]:
    """The model busy with that many rows of one request."""
    body = {"instances": [SETOSA] * rows}
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
        connection.request("POST", "/v1/predict", json.dumps(SETOSA), headers)
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
    assert [one["label"] for one in busy.result().json()["predictions"]] == ["setosa"] * 256


def test_at_overload_every_request_gets_an_answer(start: Start, slow: Path) -> None:
    """Those let in are answered rightly, the others are told at once to come back, and both are counted."""
    service = start(artifacts_dir=slow, max_concurrency=4, max_queue=4)
    until(lambda: [line["event"] for line in service.lines()].count("ready") == 2, "both workers")
    instances = flowers(400)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(service.predict, instances))  # a reset connection would raise here
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 16 <= len(answers) - len(refused) < len(answers)
    for answer in refused:
        assert_problem(answer, 503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    for answer, right in zip(answers, expected(instances), strict=True):
        if answer.status_code == 200:
            assert probabilities(answer.json()) == pytest.approx(right, abs=1e-6)
    metrics = service.metrics()
    assert metrics[QUEUE_FULL] == len(refused)
    assert metrics[ROWS] == len(answers) - len(refused)
    assert metrics[IN_FLIGHT] == 0


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
        assert (answer.status, json.loads(answer.read())["label"]) == (200, "setosa")
        connection.close()
    metrics = service.metrics()
    assert (metrics[ROWS], metrics[IN_FLIGHT], metrics[DISCONNECTS]) == (600, 0, 200)


def test_a_thousand_callers_get_a_thousand_answers(service: Service) -> None:
    """1,000 different instances sent at once to two workers: every answer is the one to its own question."""
    instances = flowers(1000)

    async def ask() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=250)  # a shell's usual limit of open files is 1,024
        async with httpx2.AsyncClient(base_url=service.url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/predict", json=one) for one in instances))

    answers = [answer.json() for answer in asyncio.run(ask())]
    assert len({answer["prediction_id"] for answer in answers}) == 1000
    for answer, right in zip(answers, expected(instances), strict=True):
        assert probabilities(answer) == pytest.approx(right, abs=1e-6)
