"""Every version still answers as it did when it was made.

artifacts/<version>/golden.jsonl -> python -m app predict, POST /v1/predict, POST /v1/predict/batch

Rows are asked alone and in a batch; every way has to give the recorded answer.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.schemas.predict import Features
from tests.conftest import (
    EXAMPLE,
    GOLDEN,
    INPUTS,
    LABELS,
    SERVED,
    VERSIONS,
    Document,
    Service,
    expected,
    golden_rows,
    manifest_of,
    recorded,
    run,
)

RENEW = (
    "a model that answers differently is a new version, with a golden.jsonl of its own (make import-model)"
)


def predict(folder: Path, body: Any, version: str = SERVED) -> list[Document]:
    """What `python -m app predict` prints for a document, an answer per instance."""
    file = folder / "input.json"
    file.write_text(json.dumps(body), "utf-8")
    done = run(folder, "app", "predict", file, model_version=version)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def batch(rows: list[Document]) -> Document:
    """The body of a batch request."""
    return {"instances": [row["features"] for row in rows]}


def test_the_served_version_is_one_of_this_contract() -> None:
    """`artifacts/release.json` names a version that was made for the contract in app/schemas/predict.py."""
    assert SERVED in VERSIONS, (
        f"{SERVED} was made for another contract: undo the change in app/schemas/predict.py, "
        "or make a version for the new one (make import-model)"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_repeats_its_golden_answers(version: str, tmp_path: Path) -> None:
    """Each golden row gets its recorded answer again from `python -m app predict`."""
    rows = golden_rows(version)
    answers = predict(tmp_path, batch(rows), version)
    assert list(map(recorded, answers)) == list(map(expected, rows)), RENEW
    assert {answer["model_version"] for answer in answers} == {version}


def test_the_server_repeats_the_golden_answers(service: Service) -> None:
    """Each golden row gets its recorded answer over HTTP, alone and in a batch."""
    answers = service.client.post("/v1/predict/batch", json=batch(GOLDEN)).json()["predictions"]
    alone = [service.predict(row["features"]).json() for row in GOLDEN]
    assert list(map(recorded, answers)) == list(map(expected, GOLDEN)), RENEW
    assert list(map(recorded, alone)) == list(map(expected, GOLDEN)), RENEW
    assert [one["action"] for one in answers] == [one["action"] for one in alone]


def test_predict_without_a_server_equals_the_server(service: Service, tmp_path: Path) -> None:
    """`make predict` and the server give the same label and the same action, review included."""
    served = service.client.post("/v1/predict/batch", json=batch(GOLDEN)).json()["predictions"]
    for ours, theirs in zip(predict(tmp_path, batch(GOLDEN)), served, strict=True):
        assert ours == {key: near(value) for key, value in theirs.items() if key != "prediction_id"}


def near(value: Any) -> Any:
    """The same value; numbers may differ in the last digits of a float32."""
    return pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float | dict) else value


def test_scores_are_probabilities(service: Service) -> None:
    """A classifier's probabilities sum to 1, and the score is that of the label."""
    if not LABELS:
        pytest.skip("a regressor has no probabilities")
    for answer in service.client.post("/v1/predict/batch", json=batch(GOLDEN)).json()["predictions"]:
        label = answer["label"] if isinstance(answer["label"], str) else json.dumps(answer["label"])
        assert answer["score"] == answer["probabilities"][label]
        assert math.isclose(sum(answer["probabilities"].values()), 1, abs_tol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_set_can_notice_a_change(version: str) -> None:
    """A model's golden set has every label, or different values; rules may have a single answer."""
    rows = golden_rows(version)
    assert all(Features.model_validate(row["features"]) for row in rows)
    if manifest_of(version)["runtime"] == "rules":
        return
    answers = {json.dumps(row["label"] if LABELS else row["value"]) for row in rows}
    assert answers == set(map(json.dumps, LABELS)) or (not LABELS and len(answers) > 1)


@pytest.mark.parametrize("name", INPUTS)
def test_the_golden_set_covers_nulls_and_categories(name: str) -> None:
    """The golden set has a null for each nullable feature, and more than one category of each feature."""
    values = [row["features"][name] for row in GOLDEN]
    assert None in values or not INPUTS[name]["nullable"]
    assert len({*values} - {None}) > 1 or len(INPUTS[name]["categories"] or []) < 2


@pytest.mark.parametrize("name", INPUTS)
def test_null_is_taken_where_the_contract_says_so(name: str, service: Service) -> None:
    """A feature without a value is predicted or refused as its manifest says, and the error names it."""
    response = service.predict(EXAMPLE | {name: None})
    if INPUTS[name]["nullable"]:
        assert response.status_code == 200
    else:
        assert response.status_code == 422
        assert [error["loc"][-1] for error in response.json()["errors"]] == [name]
