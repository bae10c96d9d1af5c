"""Documents, dashboard and deployment files name only what exists. Nothing is started here."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from app.core.errors import _STATUS as STATUS_BY_CODE
from app.observability.metrics import Metrics
from app.schemas.predict import Features
from app.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
RUNBOOKS = [path for path in DOCS if path.parent.name == "runbooks" and path.name != "README.md"]
PEOPLE_READ = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
DASHBOARD = ROOT / "ops" / "grafana" / "dashboards" / "overview.json"
SETTINGS = {PREFIX + name.upper() for name in Settings.model_fields}
SECTIONS = [
    "TL;DR", "Is it real?", "Impact", "First three actions", "Causes, likeliest first",
    "Roll back", "Escalate", "Afterwards",
]  # fmt: skip
SYMPTOMS = {
    "elevated_5xx", "high_latency", "not_ready_after_deploy",
    "high_422_rate", "saturation", "wrong_predictions",
}  # fmt: skip


def name(path: Path) -> str:
    """A path as people say it, for the names of tests."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language in a document, also those inside a list."""
    text = path.read_text("utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def metrics_in(expression: str) -> set[str]:
    """The metric names in a PromQL expression."""
    for noise in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^\]]*\]", r"\b(by|without|on|ignoring)\s*\([^)]*\)"):
        expression = re.sub(noise, " ", expression)
    words = set(re.findall(r"(?<![\w.])[a-z_]\w*\b(?!\s*\()", expression))
    return words - {"or", "and", "unless", "offset", "group_left", "group_right"}


def declared() -> set[str]:
    """Every series name that the service's metrics can produce."""
    families: list[Metric] = list(Metrics().registry.collect())
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


@pytest.mark.parametrize("path", [DASHBOARD, *RUNBOOKS], ids=name)
def test_queries_use_metrics_that_the_service_declares(path: Path) -> None:
    """No panel and no runbook asks for a metric that the service does not have."""
    queries = (
        [target["expr"] for panel in panels() for target in panel["targets"]]
        if path == DASHBOARD
        else blocks(path, "promql")
    )
    assert all(metrics_in(query) for query in queries)
    assert set().union(*map(metrics_in, queries)) <= declared()


def test_every_panel_finds_its_data_source() -> None:
    """The dashboard asks the data source that Grafana is given, and Prometheus scrapes the service's port."""
    provisioning = ROOT / "ops" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(provisioning.read_text("utf-8"))["datasources"]
    assert {target["datasource"]["uid"] for panel in panels() for target in panel["targets"]} == {
        source["uid"]
    }
    (job,) = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    compose = (ROOT / "compose.yaml").read_text("utf-8")
    assert job["static_configs"] == [{"targets": ["api:8000"]}]
    assert re.search(
        r"^  api:\n(    .*\n)*?    ports:\n      - \"127\.0\.0\.1:.*:8000\"$", compose, re.MULTILINE
    )


def test_there_is_a_runbook_for_every_symptom() -> None:
    """5xx, latency, readiness, 422, saturation, wrong predictions: each has a page, linked from the index."""
    assert {path.stem for path in RUNBOOKS} == SYMPTOMS
    index = (ROOT / "docs" / "runbooks" / "README.md").read_text("utf-8")
    assert {symptom for symptom in SYMPTOMS if f"/{symptom}.md)" in index} == SYMPTOMS


@pytest.mark.parametrize("path", RUNBOOKS, ids=name)
def test_runbooks_have_the_same_sections(path: Path) -> None:
    """Whoever knows one runbook finds their way in all of them."""
    text = path.read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    actions = text.partition("## First three actions")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. ", actions, re.MULTILINE) == ["1", "2", "3"]


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every link to a document ends at one that exists, also after a paste into a wiki."""
    names = {document.name for document in PEOPLE_READ}
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8")):
        if "://" in target or "{{" in target:  # absolute: the folder is only known once there is a repository
            assert target.rpartition("/")[2] in names, target
        else:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_commands_name_what_exists(path: Path) -> None:
    """A command or a path in a document is one that this project has."""
    text = path.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    code = "\n".join([*blocks(path, "sh"), *re.findall(r"`([^`\n]+)`", text)])
    assert set(re.findall(r"\bmake ([a-z]+)\b", code)) <= targets
    services = set(re.findall(r"^  ([a-z]+):$", (ROOT / "compose.yaml").read_text("utf-8"), re.MULTILINE))
    asked = r"docker compose (?:up|logs|exec|run|ps)(?: --[a-z-]+(?: [0-9]+[mh]?)?)* ([a-z]+)\b"
    assert set(re.findall(asked, code)) <= services
    assert set(re.findall(r"python -m app ([a-z]+)", code)) <= {"config", "predict"}
    assert set(re.findall(r"127\.0\.0\.1:8000(/[a-z0-9/]+)", code)) <= {
        "/v1/predict", "/v1/predict/batch", "/health", "/ready", "/version", "/metrics", "/docs"
    }  # fmt: skip
    folders = r"(?:^|(?<=[\s@=`]))((?:app|artifacts|docs|lifecycle|load|ops|requirements|tests)/[\w./-]*\w/?)"
    missing = [found for found in re.findall(folders, code, re.MULTILINE) if not (ROOT / found).exists()]
    assert missing == []


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_settings_in_documents_exist(path: Path) -> None:
    """No document speaks of a variable that the service would refuse."""
    assert set(re.findall(r"\bAPP_[A-Z_]+[A-Z]\b", path.read_text("utf-8"))) <= SETTINGS


def test_every_setting_is_documented_once() -> None:
    """`docs/configuration.md` and `.env.example` list every `APP_` variable, in the same order, each once."""
    table = re.findall(r"^\| `(APP_\w+)`", (ROOT / "docs/configuration.md").read_text("utf-8"), re.MULTILINE)
    example = re.findall(r"^#(APP_\w+)=", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE)
    assert table == example
    assert sorted(table) == sorted(SETTINGS)


def test_the_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the comment marks out of `.env.example` changes nothing."""
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    defaults = Settings(_env_file=None)
    lines = re.findall(r"^#(APP_\w+)=(.+)$", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE)
    for variable, value in lines:
        monkeypatch.setenv(variable, value)
    assert Settings(_env_file=None) == defaults


def test_the_contract_lists_every_error() -> None:
    """A client finds each `code` that the service can answer, with its status, in `docs/contract.md`."""
    rows = re.findall(
        r"^\| (\d{3}[\d, ]*) \| (`.*?`) \|", (ROOT / "docs/contract.md").read_text("utf-8"), re.MULTILINE
    )
    listed = {
        code: {int(status) for status in statuses.split(", ")}
        for statuses, codes in rows
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert {code: STATUS_BY_CODE[code] in statuses for code, statuses in listed.items()} == dict.fromkeys(
        STATUS_BY_CODE, True
    )


def test_the_example_request_is_valid() -> None:
    """`docs/example.json` can be sent as it is."""
    Features.model_validate_json((ROOT / "docs" / "example.json").read_bytes())


def test_every_file_is_explained() -> None:
    """`docs/files.md` names everything in the service's folder, and nothing that is not there."""
    named = set(re.findall(r"^\| `([^`]+)` ", (ROOT / "docs/files.md").read_text("utf-8"), re.MULTILINE))
    ignored = {
        "_overlays",
        *re.findall(r"^([\w.]+)/?$", (ROOT / ".gitignore").read_text("utf-8"), re.MULTILINE),
    }
    present = {
        path.name + ("/" if path.is_dir() else "") for path in ROOT.iterdir() if path.name not in ignored
    }
    assert {one for one in present if not one.startswith(".")} - named == set()
    assert {one for one in named if not (ROOT / one).exists()} == set()


def test_the_image_gets_what_was_tested() -> None:
    """The image and training install the very releases, by hash, that the tests ran with."""
    locks = {}
    for lock in ("dev", "train", "runtime"):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text("utf-8").replace("\\\n", "")
        locks[lock] = set(text.splitlines())
    assert locks["runtime"] < locks["train"] < locks["dev"]
    assert all(re.match(r"\S+==\S+ .*--hash=sha256:", line) for line in locks["dev"])
    assert not any("://" in line for line in locks["dev"])


def test_the_engine_is_sent_what_the_image_copies() -> None:
    """`.dockerignore` lets through every file that the Dockerfile copies, and no other."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert sorted(sent) == sorted(one for names in copied for one in names.split())
