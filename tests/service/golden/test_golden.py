"""Every version gives the answers recorded when it was made: in process, over HTTP, and without a server."""

import asyncio
import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from app.core.batcher import Observer
from app.core.pipeline import Execution, Pipeline, Policy
from app.core.store import read_artifact
from app.schemas.predict import Features, Prediction
from lifecycle.operations.programs import service
from tests.service.conftest import (
    ARTIFACTS,
    EXAMPLE,
    INPUTS,
    LABELS,
    SERVED,
    VERSIONS,
    answer_of,
    assert_golden,
    golden_set,
    spelled,
)


def pipeline_of(version: str, execution: Execution = "inline") -> Pipeline:
    """The version as the service loads it."""
    artifact = read_artifact(ARTIFACTS, version)
    return Pipeline.load(artifact, Observer(), Policy(execution=execution))


async def answers(pipeline: Pipeline, instances: list[Features]) -> list[Prediction]:
    """Predictions of one call."""
    names = [str(index) for index in range(len(instances))]
    return await pipeline.predict(instances, names, perf_counter() + 60)


@pytest.mark.parametrize("execution", ["inline", "batch", "thread"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_repeats_its_golden_answers(version: str, execution: Execution) -> None:
    """What is recorded of every golden row comes out again, however the rows are run."""
    golden = golden_set(version)
    instances = [Features.model_validate(row["features"]) for row in golden]
    got = asyncio.run(answers(pipeline_of(version, execution), instances))
    for row, prediction in zip(golden, got, strict=True):
        answer = asdict(prediction)
        assert_golden(row, answer)
        if LABELS:
            assert answer["score"] == answer["probabilities"][spelled(answer["label"])]
            assert math.isclose(sum(answer["probabilities"].values()), 1, abs_tol=1e-5)
        assert prediction.model_version == version


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_is_answered_alike_alone_and_in_company(version: str) -> None:
    """A golden row gets the same answer by itself as among all the others."""
    pipeline = pipeline_of(version)

    async def one_by_one() -> list[Prediction]:
        return [
            (await answers(pipeline, [Features.model_validate(row["features"])]))[0]
            for row in golden_set(version)
        ]

    for row, prediction in zip(golden_set(version), asyncio.run(one_by_one()), strict=True):
        assert_golden(row, asdict(prediction))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_set_covers_every_label(version: str) -> None:
    """A golden set that missed a label, or had one value only, could not notice that it went wrong."""
    answers = {spelled(answer_of(row)) for row in golden_set(version)}
    if read_artifact(ARTIFACTS, version).manifest.runtime == "rules":
        assert answers <= set(map(spelled, LABELS)) or len(answers) == 1
    else:
        assert answers == set(map(spelled, LABELS)) or (not LABELS and len(answers) > 1)


def test_the_golden_set_covers_what_is_missing_and_every_category() -> None:
    """Where a feature may be null the golden set has a row without it; of categories it has several."""
    rows = [row["features"] for row in golden_set(SERVED)]
    for name, one in INPUTS.items():
        if one["nullable"]:
            assert None in [row[name] for row in rows], name
        if one["categories"] and len(one["categories"]) > 1:
            assert len({row[name] for row in rows} - {None}) > 1, name


Server = tuple[str, str]  # version, address


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running service, pinned to each version in turn."""
    with service(APP_MODEL_VERSION=request.param, APP_WORKERS="1") as running:
        yield request.param, running.address


def post(url: str, body: Any) -> Any:
    """The parsed answer of a call that succeeds."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:  # our own http address
        return json.load(response)


def predict_without_server(version: str, folder: Path, body: Any) -> list[Any]:
    """What `python -m app predict` prints, one answer a line."""
    file = folder / "input.json"
    file.write_text(json.dumps(body), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "app", "predict", str(file)],
        cwd=ARTIFACTS.parent,
        env={**os.environ, "APP_MODEL_VERSION": version},
        capture_output=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_server_repeats_the_golden_answers(server: Server) -> None:
    """Every golden row sent to the running service, alone and in a batch, gets its recorded answer."""
    version, address = server
    golden = golden_set(version)
    batch = post(f"{address}/v1/predict/batch", {"instances": [row["features"] for row in golden]})
    assert batch["model_version"] == version
    for row, in_batch in zip(golden, batch["predictions"], strict=True):
        alone = post(f"{address}/v1/predict", row["features"])
        for answer in (alone, in_batch):
            assert_golden(row, answer)
            assert answer["model_version"] == version


def test_the_golden_path_answers_as_the_server_does(server: Server, tmp_path: Path) -> None:
    """`python -m app predict` gives the server's answers, review or accept included, without the server."""
    version, address = server
    body = {"instances": [row["features"] for row in golden_set(version)]}
    without = predict_without_server(version, tmp_path, body)
    for ours, theirs in zip(without, post(f"{address}/v1/predict/batch", body)["predictions"], strict=True):
        assert theirs.pop("prediction_id")
        for key in ("probabilities", "score") if LABELS else ("value",):
            assert ours.pop(key) == pytest.approx(theirs.pop(key), rel=1e-6, abs=1e-6)
        assert ours == theirs


def strange() -> dict[str, tuple[dict[str, Any], bool]]:
    """For each kind of feature a row without it, and one with a word training never had; and may it be."""
    found = {}
    for name, one in INPUTS.items():
        kind = ("open " if one["dtype"] == "string" and not one["categories"] else "") + one["dtype"]
        found[f"null for {kind}{' with nulls' * one['nullable']}"] = {**EXAMPLE, name: None}, one["nullable"]
        if one["dtype"] == "string":
            found[f"new word for {kind}"] = {**EXAMPLE, name: "never seen"}, not one["categories"]
    return found


@pytest.mark.parametrize(("features", "allowed"), strange().values(), ids=strange())
def test_what_training_never_saw_is_treated_alike_everywhere(
    server: Server, tmp_path: Path, features: dict[str, Any], allowed: bool
) -> None:
    """Nulls and new words: both calls and the golden path answer alike or, as the contract says, refuse."""
    version, address = server
    calls = {"predict": features, "predict/batch": {"instances": [features]}}
    if not allowed:
        for call, body in calls.items():
            with pytest.raises(urllib.error.HTTPError, match="422"):
                post(f"{address}/v1/{call}", body)
        with pytest.raises(subprocess.CalledProcessError):
            predict_without_server(version, tmp_path, features)
        return
    alone, batch = (post(f"{address}/v1/{call}", body) for call, body in calls.items())
    (without,) = predict_without_server(version, tmp_path, features)
    for answer in (*batch["predictions"], without):
        for key in ("probabilities", "score") if LABELS else ("value",):
            assert answer[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-6)
        for key in ("label", "action"):
            assert answer.get(key) == alone.get(key)


def test_the_golden_path_takes_one_instance(server: Server, tmp_path: Path) -> None:
    """A document with a single instance, as `/v1/predict` takes it, gets the recorded answer."""
    version, _ = server
    row = golden_set(version)[0]
    (answer,) = predict_without_server(version, tmp_path, row["features"])
    assert_golden(row, answer)
