"""The promises can be kept: they are readable, the served version meets them, load tests can measure them.

slo.toml, evaluation/thresholds.toml, evaluation/<version>.json, load/locustfile.py
"""

import json
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from app.core.store import read_artifact
from lifecycle.release.evaluation import read_thresholds
from tests.conftest import ARTIFACTS, ROOT, SERVED, VERSIONS, read, run

THRESHOLDS = ROOT / "evaluation" / "thresholds.toml"


def test_the_service_level_is_within_reason() -> None:
    """`slo.toml` promises shares between 0 and 1, and a latency that is shorter than the deadline."""
    promises = tomllib.loads(read("slo.toml"))
    assert 0 < promises["availability"] < 1
    assert 0 <= promises["error_ratio"] < 1
    assert 0 < promises["latency_p95_ms"] < promises["request_deadline_seconds"] * 1000


def test_the_thresholds_are_readable() -> None:
    """`evaluation/thresholds.toml` has no misspelt name and no value of a wrong type."""
    assert read_thresholds(THRESHOLDS).data.minimum_rows > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_whole(version: str) -> None:
    """Every file of a version has the checksum in its manifest, and the version is for this contract."""
    assert read_artifact(ARTIFACTS, version).manifest.version == version


def test_verdicts_are_about_the_versions_that_are_there() -> None:
    """A verdict names the manifest it judged; that of the served version says that it passed."""
    for path in (ROOT / "evaluation").glob("v*.json"):
        verdict, manifest = json.loads(path.read_bytes()), ARTIFACTS / path.stem / "manifest.json"
        again = f"make evaluate VERSION={path.stem} writes evaluation/{path.name} again"
        assert verdict["manifest_sha256"] == sha256(manifest.read_bytes()).hexdigest(), again
        assert path.stem != SERVED or verdict["passed"], f"{SERVED} serves, but failed: {verdict['failed']}"


def test_the_load_test_can_start(tmp_path: Path) -> None:
    """Locust reads `load/locustfile.py` and finds its clients."""
    done = run(tmp_path, "locust", "--locustfile", ROOT / "load" / "locustfile.py", "--list")
    assert done.returncode == 0, done.stdout + done.stderr
