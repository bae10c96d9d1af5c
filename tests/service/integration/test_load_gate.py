"""The load test's gate: what passes it, what fails it, and what it refuses to touch."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.where import ROOT

pytestmark = pytest.mark.integration


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module in the service's folder."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def load(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A load test of a few seconds against a real server."""
    files = ("--report", str(tmp_path / "report.html"), "--profile", str(tmp_path / "profile.md"))
    return run(
        "load.run", "--users=4", "--seconds=6", "--step-seconds=0.2", *files, *arguments, **environment
    )


def test_a_service_that_keeps_its_promises_passes(tmp_path: Path) -> None:
    """Within its limits the load test exits 0, prints percentiles, leaves an HTML report and a profile."""
    done = load(tmp_path, "--p95-ms=60000", APP_WORKERS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors; p50 " in done.stdout
    assert "load: passed" in done.stdout
    assert "/v1/predict" in (tmp_path / "report.html").read_text("utf-8")
    profile = (tmp_path / "profile.md").read_text("utf-8")
    assert re.findall(r"^\| (\d+) \| [\d,]+ \|", profile, re.MULTILINE) == ["1", "4", "16", "64"]
    assert "**First bottleneck:**" in profile
    assert "2 workers" in profile
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", profile)
    assert "<svg " in (tmp_path / picture).read_text("utf-8")


def test_a_service_slower_than_promised_fails(tmp_path: Path) -> None:
    """A p95 that is not below the limit makes the load test exit 1 and say so."""
    done = load(tmp_path, "--p95-ms=0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "load: FAILED, p95 " in done.stdout
    assert "error ratio" not in done.stdout


def test_a_service_with_more_errors_than_promised_fails(tmp_path: Path) -> None:
    """Answers other than the expected ones, here 401, make the load test exit 1 and say so."""
    key = hashlib.sha256(b"a key that the clients do not send").hexdigest()
    done = load(tmp_path, "--p95-ms=60000", APP_API_KEYS=key)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "load: FAILED, error ratio 1.0000 is above" in done.stdout
    assert "status 401, expected 200" in done.stderr
    # 429: after so many failures of one address.
    assert re.search(r"\d+ of (401|429)", (tmp_path / "profile.md").read_text("utf-8"))


def test_a_service_that_does_not_start_fails_the_load_test(tmp_path: Path) -> None:
    """Without a service there is nothing to measure: the load test shows why and exits 1."""
    done = load(tmp_path, APP_UNHEARD_OF="1")
    assert done.returncode == 1
    assert "APP_UNHEARD_OF" in done.stderr
    assert "did not become ready" in done.stderr


@pytest.mark.parametrize("host", ["http://192.0.2.1:8000", "http://localhost.example:8000"])
def test_another_machine_is_not_loaded_by_accident(host: str) -> None:
    """A host that is not this machine is refused before the first request unless --allow-remote is given."""
    done = run(
        "locust", "-f", "load/locustfile.py", "--headless", "--users=1", "--run-time=1s", "--host", host
    )
    assert done.returncode == 1
    assert "--allow-remote" in done.stderr
    assert "users spawned" not in done.stderr
