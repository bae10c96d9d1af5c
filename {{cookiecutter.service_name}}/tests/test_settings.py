"""The settings that keep a deployment safe, and the files that explain every setting.

slo.toml, .env.example, docs/ <-> app/settings.py
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

from app.settings import SettingsError, load_settings
from tests.conftest import KEY_SHA256, ROOT, Document, read, run


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
    """An APP_ variable that nothing reads is refused by its name."""
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
    """Each setting has its row in a table of docs/ and its line in `.env.example`, and nothing else has."""
    pages = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    rows = re.findall(r"^\| `(APP_\w+)` \|[^|]+\|[^|]+\|$", pages, re.MULTILINE)
    examples = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob(".env*.example")))
    lines = re.findall(r"^#?(APP_\w+)=", examples, re.MULTILINE)
    assert sorted(rows) == sorted(defaults), "docs/configuration.md lists every setting once"
    assert sorted(lines) == sorted(defaults), ".env.example lists every setting once"
