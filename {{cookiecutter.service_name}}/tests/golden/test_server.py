"""The golden set over HTTP, and the golden path without a server: one answer."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from load.run import service
from tests.golden.answers import ARTIFACTS, VERSIONS, assert_golden, golden_set

pytestmark = pytest.mark.integration

Server = tuple[str, str]  # version, address


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running service, pinned to each version in turn."""
    with service(APP_MODEL_VERSION=request.param, APP_WORKERS="1") as running:
        yield request.param, running.address


def post(url: str, body: Any) -> Any:
    """The parsed answer of a call that succeeds."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310  # our own http address
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
            assert_golden(row, answer["label"], answer["probabilities"])
            assert answer["model_version"] == version


def test_the_golden_path_answers_as_the_server_does(server: Server, tmp_path: Path) -> None:
    """`python -m app predict` gives the server's answers, review or accept included, without the server."""
    version, address = server
    body = {"instances": [row["features"] for row in golden_set(version)]}
    without = predict_without_server(version, tmp_path, body)
    for ours, theirs in zip(without, post(f"{address}/v1/predict/batch", body)["predictions"], strict=True):
        assert theirs.pop("prediction_id")
        assert ours.pop("probabilities") == pytest.approx(theirs.pop("probabilities"), abs=1e-6)
        assert ours.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-6)
        assert ours == theirs


def test_the_golden_path_takes_one_instance(server: Server, tmp_path: Path) -> None:
    """A document with a single instance, as `/v1/predict` takes it, gets the recorded answer."""
    version, _ = server
    row = golden_set(version)[0]
    (answer,) = predict_without_server(version, tmp_path, row["features"])
    assert_golden(row, answer["label"], answer["probabilities"])
