"""Drift in a real Prometheus that scrapes the real service; feedback over HTTP, over workers and restarts."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import httpx2
from typer.testing import CliRunner

from app.schemas.predict import Features
from lifecycle.__main__ import commands
from lifecycle.monitor import DRIFTED, STABLE
from lifecycle.train import load
from lifecycle.watching import Watch
from tests.conftest import SETOSA, VIRGINICA, Service, run, serving, until
from tests.integration.test_observability import total
from tests.watching import watching

Start = Callable[..., Service]
NAMES = list(Features.model_fields)
SPEED = 240  # an hour of the rules is 15 seconds


def psi(watch: Watch) -> dict[str, float]:
    """What the rules say of v1: PSI by feature, and of predictions."""
    found = watch.query("feature:psi:1h") + watch.query("prediction:psi:1h")
    return {
        one["metric"].get("feature", "prediction"): float(one["value"][1])
        for one in found
        if one["metric"]["model_version"] == "v1"
    }


def send(service: Service, rows: list[list[float]]) -> None:
    """A batch of these rows."""
    instances = [dict(zip(NAMES, row, strict=True)) for row in rows]
    assert service.client.post("/v1/predict/batch", json={"instances": instances}).status_code == 200


def test_drift_is_seen_by_prometheus(start: Start, tmp_path: Path) -> None:
    """Traffic as in training stays below 0.1; petals that grow show above 0.2, and sepals stay stable."""
    service, rows, chance = start(), load().training.tolist(), random.Random(0)

    def found(rows: list[list[float]]) -> dict[str, float]:
        """PSI after another 200 of these rows, once there is one of everything."""
        send(service, chance.choices(rows, k=200))
        seen = psi(watch)
        return seen if len(seen) == len(NAMES) + 1 else {}

    with watching(tmp_path, service.url, SPEED) as watch:
        until(lambda: watch.query("feature_baseline_ratio"), "the first scrape")
        assert psi(watch) == {}
        stable = until(lambda: found(rows), "PSI of all features")
        assert max(stable.values()) < STABLE, stable
        grown = [[*row[:2], row[2] + 1.5, row[3]] for row in rows]
        moved = until(
            lambda: one if (one := found(grown)).get("petal_length", 0) > DRIFTED else None, "drift"
        )
        assert max(moved["sepal_length"], moved["sepal_width"], moved["petal_width"]) < STABLE, moved
        command = ("drift", "--prometheus", watch.prometheus, "--window", "15s", "--pictures", str(tmp_path))

        def told() -> bool:
            """Whether the command names what moved, and only that, while such traffic comes."""
            send(service, chance.choices(grown, k=200))
            done = CliRunner().invoke(commands, command)
            assert done.exit_code == 0, done.output
            lines = [line.split() for line in done.stdout.splitlines() if line.startswith("v1")]
            verdicts = {words[1]: words[3] for words in lines}
            return verdicts["petal_length"] == "drifted" and verdicts["sepal_width"] == "stable"

        until(told, "the same from `make drift`")
        assert (tmp_path / "drift-v1-petal_length.svg").exists()


def counters(service: Service) -> dict[str, float]:
    """Every sample of a scrape that may never fall."""
    return {
        name: value
        for name, value in service.metrics().items()
        if name.partition("{")[0].endswith(("_total", "_bucket", "_count"))
    }


def test_counters_survive_a_killed_worker(start: Start) -> None:
    """Of two workers one is killed: no counter falls in any scrape, and every request counts."""
    service, scrapes = start(), []

    def ask(times: int) -> None:
        for number in range(times):  # a connection each, so that both workers get their share
            features = VIRGINICA if number % 2 else SETOSA
            answer = httpx2.post(f"{service.url}/v1/predict", json=features).json()
            label = "setosa" if number % 4 else answer["label"]
            assert given(service, answer["prediction_id"], label) == 202
            if number % 20 == 0:
                scrapes.append(counters(service))
        scrapes.append(counters(service))

    def observed(times: int) -> bool:
        last = counters(service)
        return all(total(last, "feature_observations_total", f'feature="{one}"') == times for one in NAMES)

    ask(100)
    until(lambda: observed(100), "what the workers held back")
    os.kill(service.workers()[0], signal.SIGKILL)
    until(lambda: len(service.workers()) == 3, "another worker")
    scrapes.append(counters(service))
    ask(100)
    until(lambda: observed(200), "what the workers held back")
    for before, after in itertools.pairwise(scrapes):
        assert not [name for name, value in before.items() if after.get(name, 0) < value]
    last = scrapes[-1]
    assert total(last, "http_requests_total", 'handler="/v1/predict"', 'status="200"') == 200
    assert total(last, "predictions_total", 'label="setosa"') == 100
    assert total(last, "feature_missing_total") == 0
    assert total(last, "feedback_total", 'outcome="correct"') == 100
    assert total(last, "feedback_total", 'outcome="incorrect"') == 100


def given(service: Service, prediction_id: str, label: str, **headers: str) -> int:
    """The status of a label that comes back, on a connection of its own: either worker may get it."""
    body = {"prediction_id": prediction_id, "label": label}
    return httpx2.post(f"{service.url}/v1/feedback", json=body, headers=headers).status_code


def feedback(service: Service, outcome: str) -> float:
    """How many predictions of v1 proved so."""
    return service.metrics()[f'feedback_total{{model_version="v1",outcome="{outcome}"}}']


def test_a_label_is_judged_by_any_worker_after_any_restart(tmp_path: Path) -> None:
    """An id of yesterday's process is judged by today's; whichever worker it reaches, it counts once."""
    with serving(tmp_path) as yesterday:
        ids = [httpx2.post(f"{yesterday.url}/v1/predict", json=SETOSA).json()["prediction_id"] for _ in "ab"]
        instances = {"instances": [SETOSA, VIRGINICA]}
        batch = yesterday.client.post("/v1/predict/batch", json=instances).json()["predictions"]
    with serving(tmp_path) as today:
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (0, 0)
        for _ in range(8):
            assert given(today, ids[0], "setosa") == 202
            assert given(today, ids[1], "virginica") == 202
        assert [given(today, one["prediction_id"], one["label"]) for one in batch] == [202, 202]
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (3, 1)
        assert {given(today, ids[0], "virginica") for _ in range(8)} == {409}
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (3, 1)


def test_feedback_that_cannot_be_is_refused(start: Start) -> None:
    """An id nobody gave out is 404, a label or an id of another kind 422, a stranger 401."""
    service = start(workers=1, api_keys=sha256(b"a key").hexdigest())
    key = {"x-api-key": "a key"}
    good = service.predict(headers=key).json()["prediction_id"]
    assert given(service, good, "setosa") == 401
    assert given(service, "0" * 32, "setosa", **key) == 404
    assert given(service, good[::-1], "setosa", **key) == 404
    assert given(service, "short", "setosa", **key) == 422
    assert given(service, good, "rose", **key) == 422
    assert given(service, good, "setosa", **key) == 202
    assert feedback(service, "correct") == 1


def test_decisions_are_on_record_without_their_inputs(tmp_path: Path) -> None:
    """The log says what was decided by which thresholds, never from which input; quality joins it."""
    with serving(tmp_path, review_threshold=0.99) as service:
        single = service.predict()
        rows = [SETOSA] * 120 + [VIRGINICA] * 30
        batch = service.client.post("/v1/predict/batch", json={"instances": rows})
        told = service.client.post(
            "/v1/feedback", json={"prediction_id": single.json()["prediction_id"], "label": "virginica"}
        )
        line = service.line(single.headers["x-request-id"])
        feedback_line = service.line(told.headers["x-request-id"])
        service.line(batch.headers["x-request-id"])
    keys = ("prediction_id", "label", "score", "action")
    decided = [{key: one[key] for key in keys} for one in (single.json(), *batch.json()["predictions"])]
    audit = [one for one in service.lines() if one["event"] == "audit"]
    assert [len(one["predictions"]) for one in audit] == [100, 50]
    assert [one for written in (line, *audit) for one in written["predictions"]] == decided
    for written in (line, *audit):
        assert written["thresholds"] == {"review": 0.99, "out_of_range": "review"}
        assert written["model_version"] == "v1"
    assert {one["request_id"] for one in audit} == {batch.headers["x-request-id"]}
    assert (feedback_line["prediction_id"], feedback_line["model_version"]) == (line["prediction_id"], "v1")
    assert (feedback_line["feedback"], feedback_line["correct"]) == ("virginica", False)
    (drift_line,) = [
        one for one in service.lines() if one["event"] == "drift"
    ]  # the last words of the worker
    assert drift_line["rows"] >= 150
    assert not {"features", "instances"} & {
        key for written in (line, *audit, feedback_line) for key in written
    }
    done = run(tmp_path, "lifecycle", "quality", "--logs", str(service.log), "--pictures", ".")
    assert "v1: 1 predictions with a label, accuracy 0.000" in done.stdout
    done = run(tmp_path, "lifecycle", "drift", "--logs", str(service.log), "--pictures", ".")
    assert "too few rows" in done.stdout
