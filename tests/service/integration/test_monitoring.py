"""Drift in a real Prometheus that scrapes the real service; feedback over HTTP, over workers and restarts."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
from typer.testing import CliRunner

from lifecycle.__main__ import commands
from lifecycle.operations.monitor import DRIFTED, STABLE
from tests.service.conftest import (
    ANSWER,
    ARTIFACTS,
    EXAMPLE,
    INPUTS,
    LABELS,
    MANIFEST,
    NUMBER,
    OTHER,
    OTHER_ANSWER,
    SERVED,
    WITH_NUMBER,
    Document,
    Service,
    answer_of,
    number,
    run,
    serving,
    spelled,
    until,
)
from tests.service.gameday.programs import Watch
from tests.service.gameday.trial import usual
from tests.service.integration.test_observability import total
from tests.service.watching import watching

Start = Callable[..., Service]
# What feedback says when the answer to `EXAMPLE` was wrong.
WRONG = (
    OTHER_ANSWER
    if LABELS
    else ANSWER + 10 * (abs(ANSWER) + MANIFEST["outputs"].get("feedback_tolerance", 0) + 1)
)
SPEED = 240  # an hour of the rules is 15 seconds


def psi(watch: Watch) -> dict[str, float]:
    """What the rules say of the served version: PSI by feature, and of predictions."""
    found = watch.query("feature:psi:1h") + watch.query("prediction:psi:1h")
    return {
        one["metric"].get("feature", "prediction"): float(one["value"][1])
        for one in found
        if one["metric"]["model_version"] == SERVED
    }


def send(service: Service, rows: list[Document]) -> None:
    """A batch of these rows."""
    answer = service.client.post("/v1/predict/batch", json={"instances": rows})
    assert answer.status_code == 200, answer.text


@WITH_NUMBER
def test_drift_is_seen_by_prometheus(start: Start, tmp_path: Path) -> None:
    """Traffic as in training stays below 0.1; a feature that grows shows above 0.2, others stay stable."""
    service, rows, chance = start(), usual(ARTIFACTS, SERVED), random.Random(0)

    def found(rows: list[Document]) -> dict[str, float]:
        """PSI after another 200 of these rows, once there is one of everything."""
        send(service, chance.choices(rows, k=200))
        seen = psi(watch)
        return seen if len(seen) == len(INPUTS) + 1 else {}

    with watching(tmp_path, service.url, SPEED) as watch:
        until(lambda: watch.query("feature_baseline_ratio"), "the first scrape")
        assert psi(watch) == {}
        stable = until(lambda: found(rows), "PSI of all features")
        assert max(stable.values()) < STABLE, stable
        grown = [row | {NUMBER: number(1)} for row in rows]
        moved = until(lambda: one if (one := found(grown)).get(NUMBER, 0) > DRIFTED else None, "drift")
        assert max((moved[name] for name in INPUTS if name != NUMBER), default=0) < STABLE, moved
        command = ("drift", "--prometheus", watch.prometheus, "--window", "15s", "--pictures", str(tmp_path))

        def told() -> bool:
            """Whether the command names what moved, and only that, while such traffic comes."""
            send(service, chance.choices(grown, k=200))
            done = CliRunner().invoke(commands, command)
            assert done.exit_code == 0, done.output
            cells = [
                [cell.strip() for cell in line.strip("|").split(" | ")] for line in done.stdout.splitlines()
            ]
            verdicts = {row[1]: row[3] for row in cells if row[0] == SERVED and row[1] in INPUTS}
            return verdicts.pop(NUMBER) == "drifted" and {*verdicts.values()} <= {"stable"}

        until(told, "the same from `make drift`")
        assert len([*tmp_path.glob(f"drift-{SERVED}-*.svg")]) >= 1


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
        for index in range(times):  # a connection each, so that both workers get their share
            features = OTHER if index % 2 else EXAMPLE
            answer = httpx2.post(f"{service.url}/v1/predict", json=features).json()
            other = ANSWER if features is OTHER and LABELS else WRONG
            true = answer_of(answer) if index % 4 < 2 else other
            assert given(service, answer["prediction_id"], true) == 202
            if index % 20 == 0:
                scrapes.append(counters(service))
        scrapes.append(counters(service))

    def observed(times: int) -> bool:
        last = counters(service)
        return all(total(last, "feature_observations_total", f'feature="{one}"') == times for one in INPUTS)

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
    assert total(last, "predictions_total") == 200
    if LABELS:
        assert total(last, "predictions_total", f'label="{spelled(ANSWER)}"') == 100
    assert total(last, "feature_missing_total") == 0
    assert total(last, "feedback_total", 'outcome="correct"') == 100
    assert total(last, "feedback_total", 'outcome="incorrect"') == 100


def given(service: Service, prediction_id: str, label: Any, **headers: str) -> int:
    """The status of a label that comes back, on a connection of its own: either worker may get it."""
    body = {"prediction_id": prediction_id, "label": label}
    return httpx2.post(f"{service.url}/v1/feedback", json=body, headers=headers).status_code


def feedback(service: Service, outcome: str) -> float:
    """How many predictions proved so."""
    return service.metrics()[f'feedback_total{{model_version="{SERVED}",outcome="{outcome}"}}']


def test_a_label_is_judged_by_any_worker_after_any_restart(tmp_path: Path) -> None:
    """An id of yesterday's process is judged by today's; whichever worker it reaches, it counts once."""
    with serving(tmp_path) as yesterday:
        ids = [httpx2.post(f"{yesterday.url}/v1/predict", json=EXAMPLE).json()["prediction_id"] for _ in "ab"]
        instances = {"instances": [EXAMPLE, OTHER]}
        batch = yesterday.client.post("/v1/predict/batch", json=instances).json()["predictions"]
    with serving(tmp_path) as today:
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (0, 0)
        for _ in range(8):
            assert given(today, ids[0], answer_of(batch[0])) == 202
            assert given(today, ids[1], WRONG) == 202
        assert [given(today, one["prediction_id"], answer_of(one)) for one in batch] == [202, 202]
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (3, 1)
        assert {given(today, ids[0], WRONG) for _ in range(8)} == {409}
        assert (feedback(today, "correct"), feedback(today, "incorrect")) == (3, 1)


def test_feedback_that_cannot_be_is_refused(start: Start) -> None:
    """An id nobody gave out is 404, a label or an id of another kind 422, a stranger 401."""
    service = start(workers=1, api_keys=sha256(b"a key").hexdigest())
    key = {"x-api-key": "a key"}
    predicted = service.predict(headers=key).json()
    good, right = predicted["prediction_id"], answer_of(predicted)
    assert given(service, good, right) == 401
    assert given(service, "0" * 32, right, **key) == 404
    assert given(service, good[::-1], right, **key) == 404
    assert given(service, "short", right, **key) == 422
    assert given(service, good, ["a list"], **key) == 422
    assert given(service, good, right, **key) == 202
    assert feedback(service, "correct") == 1


def test_decisions_are_on_record_without_their_inputs(tmp_path: Path) -> None:
    """The log says what was decided by which thresholds, never from which input; quality joins it."""
    with serving(tmp_path, review_threshold=0.99) as service:
        single = service.predict()
        rows = [EXAMPLE] * 120 + [OTHER] * 30
        batch = service.client.post("/v1/predict/batch", json={"instances": rows})
        told = service.client.post(
            "/v1/feedback", json={"prediction_id": single.json()["prediction_id"], "label": WRONG}
        )
        line = service.line(single.headers["x-request-id"])
        feedback_line = service.line(told.headers["x-request-id"])
        service.line(batch.headers["x-request-id"])
    keys = ("prediction_id", *(("label", "score") if LABELS else ("value",)), "action")
    decided = [{key: one[key] for key in keys} for one in (single.json(), *batch.json()["predictions"])]
    audit = [one for one in service.lines() if one["event"] == "audit"]
    assert [len(one["predictions"]) for one in audit] == [100, 50]
    assert [one for written in (line, *audit) for one in written["predictions"]] == decided
    for written in (line, *audit):
        assert written["thresholds"] == {"review": 0.99, "out_of_range": "review"}
        assert written["model_version"] == SERVED
    assert {one["request_id"] for one in audit} == {batch.headers["x-request-id"]}
    assert (feedback_line["prediction_id"], feedback_line["model_version"]) == (line["prediction_id"], SERVED)
    assert (feedback_line["feedback"], feedback_line["correct"]) == (WRONG, False)
    (drift_line,) = [
        one for one in service.lines() if one["event"] == "drift"
    ]  # the last words of the worker
    assert drift_line["rows"] >= 150
    assert not {"features", "instances"} & {
        key for written in (line, *audit, feedback_line) for key in written
    }
    done = run(tmp_path, "lifecycle", "quality", "--logs", str(service.log), "--pictures", ".")
    assert f"{SERVED}: 1 predictions with a {'label' if LABELS else 'true value'}" in done.stdout
    done = run(tmp_path, "lifecycle", "drift", "--logs", str(service.log), "--pictures", ".")
    assert "too few rows" in done.stdout
