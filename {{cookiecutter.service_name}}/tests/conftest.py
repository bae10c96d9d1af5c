"""Shared by all tests: the facts of the contract, one running service, commands in their own processes.

    artifacts/release.json -> served version -> manifest, golden rows -> cases that hold for any model
    gunicorn, started as in production, with a key -> `service`, one for the whole run

Nothing here knows a column by name: after `make import-model` the tests are about the new model.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.schemas.contract import served_contract_sha256

Document = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "artifacts"
WAIT_SECONDS = 60.0
KEY = "a key of the tests"
KEY_SHA256 = sha256(KEY.encode()).hexdigest()


def read(path: str | Path) -> str:
    """The text of a file; in the unrendered template, the questions' names take the place of answers."""
    text = re.sub(r"\{\% (end)?raw \%\}", "", (ROOT / path).read_text("utf-8"))
    text = re.sub(r"\{\{ cookiecutter\W(\w+_url) \}\}", r"https://git.example.com/\1", text)
    return re.sub(r"\{\{ cookiecutter\W(\w+) \}\}", r"\1", text)


def manifest_of(version: str) -> Document:
    """The manifest of a version."""
    document: Document = json.loads((ARTIFACTS / version / "manifest.json").read_bytes())
    return document


def golden_rows(version: str) -> list[Document]:
    """Rows with `features`, `tolerance`, and `label` and `probabilities`, or a regressor's `value`."""
    lines = (ARTIFACTS / version / "golden.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines]


SERVED: str = json.loads((ARTIFACTS / "release.json").read_bytes())["serving"]
INPUTS: dict[str, Document] = {one["name"]: one for one in manifest_of(SERVED)["inputs"]}
LABELS: list[Any] = manifest_of(SERVED)["outputs"]["labels"]  # empty for a regressor
GOLDEN = golden_rows(SERVED)
EXAMPLE: Document = GOLDEN[0]["features"]
VERSIONS = sorted(  # of this contract; versions of an earlier contract stay in the folder, but cannot serve
    path.parent.name
    for path in ARTIFACTS.glob("v*/golden.jsonl")
    if manifest_of(path.parent.name)["contract_sha256"] == served_contract_sha256()
)


def expected(row: Document) -> Document:
    """The part of an answer that a golden row records, numbers within the row's tolerance."""
    near = {key: row[key] for key in ("probabilities", "value") if key in row}
    exact = {key: row[key] for key in ("label",) if key in row}
    return exact | {key: pytest.approx(value, abs=row["tolerance"], rel=0) for key, value in near.items()}


def recorded(answer: Document) -> Document:
    """The part of an answer that golden rows record."""
    return {key: answer[key] for key in ("label", "probabilities", "value") if key in answer}


def environment(**settings: object) -> dict[str, str]:
    """The environment of this process with only these `APP_` settings: `port=1` is APP_PORT=1."""
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("APP_")}
    given = {f"APP_{name.upper()}": str(value) for name, value in settings.items()}
    return {**inherited, "PYTHONPATH": str(ROOT), "APP_ARTIFACTS_DIR": str(ARTIFACTS), **given}


def run(folder: Path, *command: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """`python -m command…` in `folder`, so that no `.env` counts, with these settings."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def program(name: str) -> str:
    """The path of a program that is not a Python package; without it the test is skipped, but not in CI."""
    found = shutil.which(name)
    if not found and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed")
    return found or name


@dataclass(frozen=True)
class Service:
    """A running service."""

    client: httpx2.Client  # sends the key
    url: str
    log: Path

    def predict(self, features: Document = EXAMPLE, **options: Any) -> httpx2.Response:
        """The answer to POST /v1/predict."""
        return self.client.post("/v1/predict", json=features, **options)

    def log_line(self, request_id: str) -> Document:
        """The log line of a request, which is written after its answer."""
        give_up = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < give_up:
            for line in self.log.read_text("utf-8").splitlines():
                if f'"{request_id}"' in line:
                    document: Document = json.loads(line)
                    return document
            time.sleep(0.01)
        raise AssertionError(f"no log line has the request_id {request_id}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests of the running service to one process, so that it is started once."""
    for item in items:
        if "service" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("service"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with a key and one worker, ready; shared by all tests."""
    folder = tmp_path_factory.mktemp("service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "service.log"
    settings = {"host": "127.0.0.1", "port": port, "workers": 1, "api_keys": KEY_SHA256}
    config = str(ROOT / "gunicorn.conf.py")
    command = [sys.executable, "-m", "gunicorn", "--config", config, "app.main:create_app()"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**settings), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with httpx2.Client(base_url=url, headers={"X-API-Key": KEY}, timeout=WAIT_SECONDS) as client:
            wait_until_ready(client, process, log)
            yield Service(client, url, log)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def wait_until_ready(client: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when GET /ready is 200; fail with the log when the service ends or does not become ready."""
    give_up = time.monotonic() + WAIT_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx2.TransportError:
            pass  # it does not listen yet
        time.sleep(0.05)
    pytest.fail(f"the service did not become ready; its log says:\n{log.read_text('utf-8')}", pytrace=False)
