"""A version released while the service runs takes over without a client noticing; a bad one never does."""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
import pytest

from tests.service.conftest import ARTIFACTS, EXAMPLE, Service, copied_artifacts, serving, until
from tests.service.integration.test_artifacts import edit, rewrite

Start = Callable[..., Service]
FAILURES = "model_reload_failures_total"


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Artifacts of one's own, in which v1 serves."""
    return copied_artifacts(tmp_path)


def add(root: Path, version: str) -> Path:
    """A version that answers as v1 does, under another name."""
    folder = Path(shutil.copytree(root / "v1", root / version))
    edit(folder / "manifest.json", lambda manifest: manifest.update(version=version))
    return folder


def misremember(version: Path) -> None:
    """Other answers in the golden set than the model gives."""
    lines = []
    for line in (version / "golden.jsonl").read_bytes().splitlines():
        row = json.loads(line)
        if "value" in row:
            row["value"] += 1 + 10 * row["tolerance"]
        else:
            row["probabilities"] = {label: 1 - one for label, one in row["probabilities"].items()}
        lines.append(json.dumps(row).encode())
    rewrite(version, "golden.jsonl", b"\n".join(lines))


def release(root: Path, serving: str) -> None:
    """What a promotion does: the whole file at once."""
    document = json.loads((ARTIFACTS / "release.json").read_bytes()) | {"serving": serving}
    (root / "release.new").write_text(json.dumps(document))
    (root / "release.new").replace(root / "release.json")


def events(service: Service, event: str, version: str | None) -> int:
    """How often a worker said so of a version."""
    return [(line["event"], line.get("model_version")) for line in service.lines()].count((event, version))


@contextmanager
def traffic(service: Service, clients: int = 8) -> Iterator[Counter[tuple[int, str]]]:
    """Clients who ask one prediction after another meanwhile; what they got, by status and version."""
    got: Counter[tuple[int, str]] = Counter()
    ending = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            while not ending.is_set():
                answer = client.post("/v1/predict", json=EXAMPLE)
                got[answer.status_code, answer.json().get("model_version", "")] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield got
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def test_a_release_takes_over_without_a_failed_request(start: Start, artifacts: Path) -> None:
    """On 64 connections every request is answered, first by the old version, then everywhere by the new."""
    service = start(artifacts_dir=artifacts)
    until(lambda: events(service, "ready", "v1") == 2, "both workers")
    add(artifacts, "v2")
    with traffic(service, clients=64) as got:
        until(lambda: got[200, "v1"] > 64, "traffic")
        release(artifacts, "v2")
        until(lambda: events(service, "ready", "v2") == 2, "v2 in both workers")
        after = got[200, "v1"]
        until(lambda: got[200, "v2"] > 64, "answers of v2")
    assert set(got) == {(200, "v1"), (200, "v2")}
    assert got[200, "v1"] - after <= 64  # those that were inside
    assert service.client.get("/version").json()["model"]["version"] == "v2"
    assert service.client.get("/ready").json()["model_version"] == "v2"
    metrics = service.metrics()
    assert metrics[FAILURES] == 0
    served = {name: value for name, value in metrics.items() if name.startswith("model_info{")}
    assert [value for name, value in served.items() if 'version="v2"' in name] == [1]
    assert [value for name, value in served.items() if 'version="v1"' in name] == [0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda v2: (v2 / "model.onnx").write_bytes(b"other bytes"), "v2/model.onnx: size differs"),
        (lambda v2: shutil.rmtree(v2), "v2: there is no such version"),
        (lambda v2: rewrite(v2, "model.onnx", b"no model"), "v2/model.onnx: cannot be loaded"),
        (misremember, "v2/golden.jsonl: line 1 has another answer"),
        (lambda v2: (v2.parent / "release.json").write_bytes(b"{"), "release.json: "),
    ],
    ids=["altered", "absent", "no model", "wrong answers", "no release"],
)  # fmt: skip
def test_a_bad_version_never_replaces_a_good_one(
    start: Start, artifacts: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    """Whatever is wrong with it, the old version answers and /ready stays true; log and counter tell."""
    service = start(workers=1, artifacts_dir=artifacts)
    v2 = add(artifacts, "v2")
    spoil(v2)
    broken = (artifacts / "release.json").read_bytes() == b"{"
    if not broken:
        release(artifacts, "v2")
    until(lambda: events(service, "release refused", "v1"), "the refusal")
    line = next(line for line in service.lines() if line["event"] == "release refused")
    assert reason in line["reason"]
    assert service.metrics()[FAILURES] >= 1
    assert service.client.get("/ready").json()["model_version"] == "v1"
    assert service.predict().json()["model_version"] == "v1"
    # Once it is mended, it serves without another release.
    shutil.rmtree(v2, ignore_errors=True)
    add(artifacts, "v2")
    if broken:
        release(artifacts, "v2")
    until(lambda: events(service, "ready", "v2") == 1, "v2, mended")


def test_a_new_worker_starts_with_what_is_released(start: Start, artifacts: Path) -> None:
    """A worker that replaces a killed one serves what is released, though the master began with another."""
    service = start(artifacts_dir=artifacts)
    add(artifacts, "v2")
    release(artifacts, "v2")
    until(lambda: events(service, "ready", "v2") == 2, "v2 in both workers")
    workers = subprocess.run(
        ["pgrep", "-P", str(service.process.pid)], capture_output=True, check=True, text=True
    )
    os.kill(int(workers.stdout.split()[0]), signal.SIGKILL)
    until(lambda: events(service, "ready", "v2") == 3, "the new worker")
    answers = {
        httpx2.post(f"{service.url}/v1/predict", json=EXAMPLE).json()["model_version"] for _ in range(50)
    }
    assert answers == {"v2"}


def test_a_pinned_version_stays(start: Start, artifacts: Path) -> None:
    """APP_MODEL_VERSION wins over release.json, also over one that changes."""
    service = start(workers=1, artifacts_dir=artifacts, model_version="v1")
    add(artifacts, "v2")
    folder = artifacts.parent / "other"
    folder.mkdir()
    with serving(folder, workers=1, artifacts_dir=artifacts) as other:
        release(artifacts, "v2")
        until(lambda: events(other, "ready", "v2") == 1, "v2 where nothing is pinned")
    assert service.predict().json()["model_version"] == "v1"
    assert not events(service, "ready", "v2")


def test_twenty_releases_leave_nothing_behind(start: Start, artifacts: Path) -> None:
    """What a worker holds after twenty releases is what it held after five, within 2%: old models go."""
    service = start(workers=1, artifacts_dir=artifacts)
    add(artifacts, "v2")
    sizes = []
    for count in range(20):
        version = ("v2", "v1")[count % 2]
        release(artifacts, version)
        until(partial(serves, service, version), version)
        assert {service.predict().json()["model_version"] for _ in range(20)} == {version}
        sizes.append(memory_of(service.workers()[-1]))
    assert sizes[-1] <= 1.02 * sizes[4], sizes


def serves(service: Service, version: str) -> bool:
    """Whether it is this version that answers."""
    return bool(service.client.get("/ready").json()["model_version"] == version)


def memory_of(pid: int) -> int:
    """Kilobytes of this process that no file backs.

    Not PSS: a process's share of the mapped libraries grows whenever another process that maps them ends.
    """
    rollup = Path("/proc", str(pid), "smaps_rollup").read_text()
    return int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Anonymous:")))
