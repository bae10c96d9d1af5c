"""Promises and settings: readable, met by the served version, safe in production, explained in documents.

slo.toml, evaluation/, load/locustfile.py -> the promises
slo.toml, .env.example, docs/ <-> app/settings.py
"""

import json
import re
import tomllib
from hashlib import sha256
from pathlib import Path

import pytest

from app.core.store import read_artifact
from app.settings import SettingsError, load_settings
from lifecycle.release.evaluation import read_thresholds
from tests.conftest import ARTIFACTS, KEY_SHA256, ROOT, SERVED, VERSIONS, Document, read, run

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


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """The effective configuration when nothing is set, as `python -m app config` prints it."""
    return configuration(tmp_path_factory.mktemp("empty"))


def configuration(folder: Path) -> Document:
    """The effective configuration in a folder, which may hold an `.env`."""
    done = run(folder, "app", "config")
    assert done.returncode == 0, done.stderr
    document: Document = json.loads(done.stdout)
    return document


def test_production_refuses_to_start_without_keys(tmp_path: Path) -> None:
    """APP_ENV=production needs APP_API_KEYS, and names it when it is missing."""
    done = run(tmp_path, "app", "config", env="production")
    assert done.returncode != 0
    assert "APP_API_KEYS" in done.stderr


def test_production_shows_no_documentation() -> None:
    """In production /docs and /openapi.json are off unless they are asked for."""
    assert not load_settings(env="production", api_keys=KEY_SHA256).docs


def test_a_misspelt_setting_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown APP_ variable is refused by name."""
    monkeypatch.setenv("APP_WROKERS", "2")
    with pytest.raises(SettingsError, match="APP_WROKERS"):
        load_settings()


def test_the_promises_reach_the_settings(defaults: Document) -> None:
    """The deadline that the service keeps is the one that slo.toml promises, and draining outlasts it."""
    promised = tomllib.loads(read("slo.toml"))["request_deadline_seconds"]
    assert float(defaults["APP_REQUEST_DEADLINE_SECONDS"]) == promised
    assert defaults["APP_DRAIN_SECONDS"] > promised


def test_the_example_changes_nothing(defaults: Document, tmp_path: Path) -> None:
    """`.env.example` without its comment marks holds known names and the defaults."""
    text = re.sub(r"^#(APP_\w+=)", r"\1", read(".env.example"), flags=re.MULTILINE)
    (tmp_path / ".env").write_text(text, "utf-8")
    assert configuration(tmp_path) == defaults


def test_every_setting_is_documented(defaults: Document) -> None:
    """All settings, and only these, have a row in a table of docs/ and a line in `.env.example`."""
    pages = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    rows = re.findall(r"^\| `(APP_\w+)` \|[^|]+\|[^|]+\|$", pages, re.MULTILINE)
    examples = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob(".env*.example")))
    lines = re.findall(r"^#?(APP_\w+)=", examples, re.MULTILINE)
    assert sorted(rows) == sorted(defaults), "docs/configuration.md lists every setting once"
    assert sorted(lines) == sorted(defaults), ".env.example lists every setting once"
