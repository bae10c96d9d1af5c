"""Documents, dashboard and deployment files name only what exists, and the runbooks' commands work."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from app.core.errors import _STATUS as STATUS_BY_CODE
from app.core.store import Outputs, read_artifact
from app.observability.metrics import Metrics
from app.schemas.predict import Features
from app.settings import installed, load_settings, redacted
from lifecycle.operations import documents
from lifecycle.operations.documents import anchor, api, broken, headings, prose
from tests.service.conftest import (
    EXAMPLE,
    SERVED,
    Service,
    assert_answers,
    copied_artifacts,
    run,
    serving,
    until,
)
from tests.service.gameday.programs import alertmanager_flags, running
from tests.service.integration.test_rollout import ODD, erring, ruled
from tests.service.watching import prepare, program
from tests.service.where import ROOT, TEMPLATE

DOCS = sorted((ROOT / "docs").rglob("*.md"))
INDEX = ROOT / "docs" / "runbooks" / "README.md"
PAGES = [path for path in DOCS if path.parent == INDEX.parent]
RUNBOOKS = [path for path in PAGES if path != INDEX]
PEOPLE_READ = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
DASHBOARD = ROOT / "ops" / "grafana" / "dashboards" / "overview.json"
SETTINGS = set(redacted(load_settings()))
SECTIONS = [
    "TL;DR", "Is it real", "Impact", "First three actions", "Ranked causes",
    "Roll back the model / the image", "Escalate", "Silence", "After",
]  # fmt: skip
BASE_ALERTS = {
    "AvailabilityBudgetBurn", "LatencyBudgetBurn", "ServiceNotReady", "NoTraffic", "WorkerRestarts",
    "Saturation", "HighInvalidInputRate", "NonFiniteOutput", "ModelReloadFailed", "FeatureDrift",
    "PredictionShift", "LowConfidence", "AccuracyDrop", "ServingFallback", "CanaryStopped", "LookupMisses",
}  # fmt: skip
# Alerts and metrics of capabilities.
ALERTS = BASE_ALERTS | ({"TraceSpansDropped"} if "tracing" in installed() else set())
ADDED_METRICS = {"trace_spans_dropped_total"} if "tracing" in installed() else set()
SYMPTOMS = {
    "elevated 5xx": "AvailabilityBudgetBurn",
    "high latency": "LatencyBudgetBurn",
    "not ready after a deploy": "ServiceNotReady",
    "high 422 rate": "HighInvalidInputRate",
    "saturation": "Saturation",
    "wrong predictions": "AccuracyDrop",
}
OF_PROMETHEUS = {"up", "ALERTS"}  # what Prometheus itself knows


def name(path: Path) -> str:
    """A path as people say it, for the names of tests."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of one language in a document, also those inside a list."""
    return blocks_in(path.read_text("utf-8"), language)


def blocks_in(text: str, language: str = "sh") -> list[str]:
    """The code blocks of one language in a text, without the indentation of a list."""
    found = re.findall(rf"^( *```{language}\n.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [dedent(block).partition("\n")[2] for block in found]


def sections(path: Path) -> dict[str, str]:
    """The parts of a runbook by their headings."""
    parts = re.split(r"^## (.*)\n", path.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def copied(folder: Path) -> Path:
    """A copy of the service's folder, as a checkout has it, in `folder`."""
    left = shutil.ignore_patterns(".*_cache", "__pycache__", ".venv", ".git", ".env", "build", "_overlays")
    return Path(shutil.copytree(ROOT, folder, ignore=left, dirs_exist_ok=True))


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def metrics_in(expression: str) -> set[str]:
    """The metric names in a PromQL expression."""
    for noise in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^\]]*\]", r"\b(by|without|on|ignoring)\s*\([^)]*\)"):
        expression = re.sub(noise, " ", expression)
    words = set(re.findall(r"(?<![\w.:])[A-Za-z_][\w:]*+(?!\s*\()", expression))
    return words - {"or", "and", "unless", "offset", "group_left", "group_right", "bool"}


def declared() -> set[str]:
    """Every series name that the service's metrics can produce."""
    metrics = Metrics()
    metrics.expect_values([0.0])  # as for a regressor
    families: list[Metric] = list(metrics.registry.collect())
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    return ADDED_METRICS | {family.name + suffix for family in families for suffix in suffixes[family.type]}


def rules() -> list[dict[str, Any]]:
    """Every recording and alert rule."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / "ops/prometheus").glob("*rules.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("path", [DASHBOARD, *PAGES], ids=name)
def test_queries_use_metrics_that_the_service_declares(path: Path) -> None:
    """No panel and no runbook asks for a metric that the service does not have."""
    queries = (
        [target["expr"] for panel in panels() for target in panel["targets"]]
        if path == DASHBOARD
        else blocks(path, "promql")
    )
    assert all(metrics_in(query) for query in queries)
    assert set().union(*map(metrics_in, queries)) <= declared() | OF_PROMETHEUS | {
        rule["record"] for rule in rules() if "record" in rule
    }


def test_dashboards_ask_for_their_data_source() -> None:
    """No dashboard names one by its id, which differs in every Grafana: a variable offers those there are."""
    for path in DASHBOARD.parent.glob("*.json"):
        board = json.loads(path.read_text("utf-8"))
        (choice,) = [one for one in board["templating"]["list"] if one["type"] == "datasource"]
        assert (choice["name"], choice["query"]) == ("datasource", "prometheus")
        assert board["templating"]["list"][0] is choice  # before the variables that ask it
        sources = re.findall(
            r'"datasource": \{\s*"type": "prometheus",\s*"uid": "([^"]*)"', path.read_text("utf-8")
        )
        assert set(sources) == {"${datasource}"}
        assert len(sources) == path.read_text("utf-8").count('"type": "prometheus"')


def services() -> dict[str, Any]:
    """What Compose starts."""
    text = re.sub(r"\{\{ *([\w.]+) *\}\}", r"\1", (ROOT / "compose.yaml").read_text("utf-8"))
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def test_services_find_each_other() -> None:
    """Who asks or tells another in Compose names a service at the port it listens on; mounted files exist."""
    listening = {
        f"{name}:{port.rpartition(':')[2]}"
        for name, one in services().items()
        for port in one.get("ports", [])
    } | {f"receiver:{services()['receiver']['command'][-1]}"}
    asked: set[str] = set()
    for path in ("prometheus/prometheus.yml", "alertmanager/alertmanager.yml"):
        text = re.sub(r"#.*", "", (ROOT / "ops" / path).read_text("utf-8"))
        asked |= set(re.findall(r"[a-z.\d]+:\d{4,5}\b", text))
    source = (ROOT / "ops/grafana/provisioning/datasources/prometheus.yaml").read_text("utf-8")
    asked |= set(re.findall(r"url: http://(.*)", source))
    assert asked == {"api:8000", "alertmanager:9093", "receiver:9095", "prometheus:9090"}
    assert asked <= listening
    for one in services().values():
        mounts = dict(volume.split(":")[:2] for volume in one.get("volumes", []) if volume.startswith("."))
        assert all((ROOT / host).exists() for host in mounts)
        inside = {container: ROOT / host for host, container in mounts.items()}
        for file in re.findall(
            r"/[\w./]+\.(?:yml|json|py)", json.dumps([one.get("command"), one.get("environment")])
        ):
            mount = max((at for at in inside if file.startswith(at)), key=len)
            assert Path(f"{inside[mount]}{file.removeprefix(mount)}").is_file(), file


def test_every_alert_has_its_runbook() -> None:
    """An alert and its runbook have the same name, and neither is without the other."""
    assert {path.stem for path in RUNBOOKS} == ALERTS
    assert {rule["alert"] for rule in rules() if "alert" in rule} == ALERTS


def test_runbooks_are_found_by_symptom() -> None:
    """The index leads from 5xx, latency, readiness, 422, saturation and wrong predictions to the page."""
    rows = re.findall(r"^\| ([^|]*) \| \[(\w+)\]", sections(INDEX)["Find the runbook"], re.MULTILINE)
    assert sorted(page for _, page in rows) == sorted(BASE_ALERTS)
    for symptom, page in SYMPTOMS.items():
        assert [found for words, found in rows if words.startswith(symptom)] == [page]


@pytest.mark.parametrize("path", RUNBOOKS, ids=name)
def test_runbooks_have_the_same_sections(path: Path) -> None:
    """Whoever knows one runbook finds their way in all of them, and reads each in a minute."""
    text, parts = path.read_text("utf-8"), sections(path)
    assert text.startswith(f"# {path.stem}\n")
    assert list(parts) == SECTIONS
    assert [heading for heading, part in parts.items() if len(part.strip()) < 40] == []
    assert re.findall(r"^(\d)\. ", parts["First three actions"], re.MULTILINE) == ["1", "2", "3"]
    assert "```promql" in parts["Is it real"]
    assert "Normal: " in parts["Is it real"]
    assert 40 <= len(text.splitlines()) <= 80


@pytest.mark.parametrize("path", RUNBOOKS, ids=name)
def test_every_cause_has_a_command_and_a_mitigation(path: Path) -> None:
    """No cause is only a thought: each says how to see it and what to do."""
    part = sections(path)["Ranked causes"]
    rows = re.findall(r"^\| (?!the line says|---)(.*) \|$", part, re.MULTILINE)
    assert all(row.count(" | ") == 2 for row in rows)
    causes = re.split(r"^\d\. ", part, flags=re.MULTILINE)[1:]
    assert rows or len(causes) > 2
    for cause in causes:
        assert "Mitigation: " in cause, cause
        assert re.search(r"```(sh|promql)\n|\(?(action|query|cause) \d|`docker |\]\(", cause), cause


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_runbooks_survive_a_paste(path: Path) -> None:
    """A wiki takes a page as it is: no HTML, diagram or relative link, no code but shell and queries."""
    text = path.read_text("utf-8")
    assert set(re.findall(r"^ *```(.+)$", text, re.MULTILINE)) <= {"sh", "promql"}
    for _, line in prose(text):
        plain = re.sub(r"`[^`]*`", "", line)
        assert not re.search(r"</?[a-z][^>]*>|<!--|!\[|\]\[|\[\^", plain), line
    assert [line for line in broken([path]) if "relative" in line] == []


@pytest.mark.parametrize("path", RUNBOOKS, ids=name)
def test_silences_name_their_alert(path: Path) -> None:
    """The command that silences has the alert's own name, an end and a reason."""
    (command,) = blocks(path, "sh")[-1:]
    assert command in dedent(sections(path)["Silence"])
    assert f"amtool --alertmanager.url=http://127.0.0.1:9093 silence add alertname={path.stem} " in command
    assert re.search(r" --duration=\d+[mh] .*--comment=\"[^\"]+\"$", command)


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every link to a document ends at one that exists, heading included, also after a paste into a wiki."""
    assert broken([path]) == []


def test_the_wiki_file_has_a_table_of_contents(tmp_path: Path) -> None:
    """`make runbooks` writes one file whose contents list every page, each at an anchor of its own."""
    done = run(ROOT, "lifecycle", "runbooks", "--output", str(tmp_path / "wiki.md"))
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "wiki.md") in done.stdout
    document = (tmp_path / "wiki.md").read_text("utf-8")
    contents = dict(re.findall(r"^- \[(.*)\]\(#(.*)\)$", document, re.MULTILINE))
    anchors = list(map(anchor, headings(document)))
    assert contents.keys() > ALERTS
    assert all(anchors.count(one) == 1 for one in contents.values())
    assert [heading for heading in headings(document, level=3) if heading in SECTIONS] == SECTIONS * len(
        ALERTS
    )
    assert re.findall(r"^# (.*)$", document, re.MULTILINE) == headings(INDEX.read_text("utf-8"), level=1)
    blocks_in = [len(re.findall(r"^ *```sh$", path.read_text("utf-8"), re.MULTILINE)) for path in PAGES]
    assert len(re.findall(r"^ *```sh$", document, re.MULTILINE)) == sum(blocks_in)


def test_a_broken_link_is_one_line(tmp_path: Path) -> None:
    """Where a link leads nowhere, `make runbooks` says page, line and link, fails, and writes no file."""
    copied(tmp_path)
    page = tmp_path / "docs" / "runbooks" / "Saturation.md"
    (_, own), *_ = re.findall(r"(\[NoTraffic\])\((.*)/NoTraffic.md\)", INDEX.read_text("utf-8"))
    bad = [f"{own}/Nothing.md", f"{own}/README.md#nothing", "NoTraffic.md", "https://elsewhere.example/"]
    text = page.read_text("utf-8")
    page.write_text(text + "".join(f"[a link]({link})\n" for link in bad), "utf-8")
    done = run(tmp_path, "lifecycle", "runbooks")
    last = len(text.splitlines())
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"docs/runbooks/Saturation.md:{last + 1}: {bad[0]}: there is no such file",
        f"docs/runbooks/Saturation.md:{last + 2}: {bad[1]}: there is no such heading",
        f"docs/runbooks/Saturation.md:{last + 3}: {bad[2]}: is relative, so a paste into a wiki breaks it",
    ]
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_commands_name_what_exists(path: Path) -> None:
    """A command or a path in a document is one that this project has."""
    text = path.read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    code = "\n".join([*blocks(path, "sh"), *re.findall(r"`([^`\n]+)`", text)])
    assert set(re.findall(r"\bmake ([a-z-]+)\b", code)) <= targets
    services = set(re.findall(r"^  ([a-z]+):$", (ROOT / "compose.yaml").read_text("utf-8"), re.MULTILINE))
    asked = r"docker compose (?:up|logs|exec|run|ps|top)(?: --[a-z-]+(?: [0-9]+[mh]?)?)* ([a-z]+)\b"
    assert set(re.findall(asked, code)) <= services
    assert set(re.findall(r"python -m app ([a-z]+)", code)) <= {"config", "predict"}
    assert set(re.findall(r"127\.0\.0\.1:8000(/[a-z0-9/]+)", code)) <= {
        "/v1/predict", "/v1/predict/batch", "/v1/feedback",
        "/health", "/ready", "/version", "/metrics", "/docs"
    }  # fmt: skip
    folders = r"(?:^|(?<=[\s@=`]))((?:app|artifacts|docs|lifecycle|load|ops|requirements|tests)/[\w./-]*\w/?)"
    # The tests of the machinery are the template's.
    places = {found: TEMPLATE if found.startswith("tests/service/") else ROOT
              for found in re.findall(folders, code, re.MULTILINE)}  # fmt: skip
    assert [found for found, place in places.items() if not (place / found).exists()] == []


@pytest.mark.parametrize("path", PEOPLE_READ, ids=name)
def test_settings_in_documents_exist(path: Path) -> None:
    """No document speaks of a variable that the service would refuse."""
    assert set(re.findall(r"\bAPP_[A-Z_]+[A-Z]\b", path.read_text("utf-8"))) <= SETTINGS


def test_queries_are_promql(tmp_path: Path) -> None:
    """Prometheus' own tool reads every query of the runbooks, so that none fails when it is pasted."""
    queries = {f"runbook:{index}": query for index, query in enumerate(
        query for path in PAGES for query in blocks(path, "promql")
    )}  # fmt: skip
    assert len(queries) > 2 * len(ALERTS)
    rules = [{"record": record, "expr": query} for record, query in queries.items()]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}), "utf-8")
    done = subprocess.run([program("promtool"), "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What the runbooks ask of Docker, answered for a service that runs without an engine; nothing else is.
DOCKER = r"""#!/bin/sh
case "$*" in
"compose logs --no-log-prefix"*" api") cat "$SERVICE_LOG" ;;
"compose exec api "* | "compose run --rm api "*) while [ "$1" != api ]; do shift; done; shift; exec "$@" ;;
"compose exec alertmanager "*) shift 3; exec "$@" ;;
"compose ps" | "compose ps --all --quiet api" | "compose top api" | "stats --no-stream") echo "$2" ;;
"compose up --detach api" | "compose up --detach --wait api" | "compose up --build --detach") echo up ;;
"inspect "*) printf '"OOMKilled": false,\n"ExitCode": 0,\n' ;;
*) echo "docker was asked: $*" >&2; exit 64 ;;
esac
"""
DID_NOT_HAPPEN = ("cannot start", '"status":500', "SIGSEGV")
SAY_NOTHING = ("echo ", "sed -i", "git checkout ", "git status ")
ROLES = ("AUTHOR", "COMMITTER")
KEY = "the key of whoever is on call"


@dataclass
class Desk:
    """Where somebody on call sits: a copy of the service's folder, a shell, a running service."""

    folder: Path
    variables: dict[str, str]
    addresses: dict[str, str]  # where the runbooks say, and where it is here

    def paste(self, text: str) -> tuple[int, str, str]:
        """What a shell answers to a block: status, output, complaints."""
        for written, real in self.addresses.items():
            text = text.replace(written, real)
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with keys to which much happened: a bad start and canary, refusals, a killed worker."""
    folder, own = tmp_path_factory.mktemp("eventful"), sha256(KEY.encode()).hexdigest()
    release = copied_artifacts(folder) / "release.json"
    good = release.read_text("utf-8")
    tried = good.replace('"canary": null, "canary_percent": 0', '"canary": "v2", "canary_percent": 100')
    release.write_text(good.replace('"serving": "v1"', '"serving": "v99"'), "utf-8")
    ruled(release.parent, "v2", erring)
    settings: dict[str, Any] = {"api_keys": own, "request_deadline_seconds": 2, "fallback_version": "v0"}
    with serving(folder, artifacts_dir=release.parent, **settings) as service:
        until(lambda: "release refused" in service.log.read_text(), "a worker's word on the bad release")
        release.write_text(tried, "utf-8")

        def stopped() -> bool:
            service.predict(ODD, headers={"x-api-key": KEY})
            return "canary stopped" in service.log.read_text()

        until(stopped, "the end of the canary")
        for key, body in ((KEY, {}), ("another", EXAMPLE), (KEY, EXAMPLE)):
            service.predict(body, headers={"x-api-key": key})
        late = service.connection()
        late.putrequest("POST", "/v1/predict")
        late.putheader("X-API-Key", KEY)
        late.putheader("Content-Length", "2")
        late.endheaders()
        assert late.getresponse().status == 503
        release.write_text(good, "utf-8")
        os.kill(service.workers()[0], signal.SIGKILL)
        until(lambda: "SIGKILL" in service.log.read_text(), "the master's word on the killed worker")
        yield service


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Alertmanager; `amtool` comes with it."""
    folder = tmp_path_factory.mktemp("alertmanager")
    program("alertmanager")
    with running(folder, "alertmanager", *alertmanager_flags(prepare(folder))) as url:
        yield url


@pytest.fixture
def desk(tmp_path: Path, eventful: Service, alertmanager: str) -> Desk:
    """A desk of one's own."""
    folder, programs = copied(tmp_path / "service"), tmp_path / "programs"
    tools, python = folder / ".venv" / "bin", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    programs.mkdir()
    tools.mkdir(parents=True)
    for file, text in (
        (programs / "docker", DOCKER),
        (programs / "python", python),
        (tools / "python", python),
    ):
        file.write_text(text, "utf-8")
        file.chmod(0o755)
    for made in ("made.stamp", "runtime.stamp", "dev.stamp"):
        (folder / ".venv" / made).touch()
    git = ("git", "-c", "user.name=on call", "-c", "user.email=on-call@example.com")
    for arguments in (
        ("init", "--quiet"),
        ("add", "."),
        ("commit", "--quiet", "--message=good"),
        ("commit", "--quiet", "--allow-empty", "--message=bad"),
    ):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("APP_", "MAKE", "MFLAGS", "ARGS"))
    }
    path = f"{programs}{os.pathsep}{own['PATH']}"
    somebody = {f"GIT_{who}_{what}": "on-call@example.com" for who in ROLES for what in ("NAME", "EMAIL")}
    variables = {**own, **somebody, "PATH": path, "SERVICE_LOG": str(eventful.log), "API_KEY": KEY}
    addresses = {"http://127.0.0.1:8000": eventful.url, "http://127.0.0.1:9093": alertmanager}
    if not json.loads((folder / "artifacts" / "v0" / "rules.json").read_bytes())["rules"]:
        addresses["make rollback"] = "make rollback CONFIRM=yes"  # as the page says of the stub of an import
    return Desk(folder, variables, addresses)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_work_when_pasted(path: Path, desk: Desk, eventful: Service) -> None:
    """Each command of a runbook, pasted into a shell beside a running service, does what the page says."""
    for line in "".join(blocks(path, "sh")).splitlines():
        status, output, complaints = desk.paste(line)
        nothing_found = "grep" in line and any(words in line for words in DID_NOT_HAPPEN)
        assert (status, complaints) == (0, "") or (nothing_found and status == 1), (line, output, complaints)
        assert output.strip() or nothing_found or line.startswith(SAY_NOTHING), line
        if "/v1/predict " in line:
            answer = json.loads(output)
            assert_answers(answer, artifacts=eventful.log.parent / "artifacts", version="v1")
        if "/ready" in line:
            assert re.search(r'"status":"ready"|^200$', output)
        if "silence add" in line:
            query = f"amtool --alertmanager.url=http://127.0.0.1:9093 silence query alertname={path.stem}"
            assert path.stem in desk.paste(query)[1]


def test_rolling_back_as_the_runbook_says(desk: Desk) -> None:
    """The commands that roll back make the version before serve, and those that undo it the one after."""
    there, back = (blocks_in(sections(INDEX)[title]) for title in ("Roll back the model", "Rules only"))
    for pasted, version in (
        (there[0], "v0"),
        (there[1] + there[0], "v0"),  # pinned, so the release that follows changes nothing
        (back[1], SERVED),
        (back[0], "v0"),
    ):
        assert desk.paste(pasted)[0] == 0
        with serving(desk.folder, workers=1, artifacts_dir=desk.folder / "artifacts") as service:
            assert service.predict().json()["model_version"] == version


def test_every_setting_is_documented_once() -> None:
    """`configuration.md`, `.env.example` and those of capabilities list every variable once, in one order."""
    added = [ROOT / "docs" / f"{name}.md" for name in installed()]
    examples = [ROOT / ".env.example", *(ROOT / f".env.{name}.example" for name in installed())]
    tables = "".join(path.read_text("utf-8") for path in [ROOT / "docs/configuration.md", *added])
    table = re.findall(r"^\| `(APP_\w+)`", tables, re.MULTILINE)
    lines = "".join(path.read_text("utf-8") for path in examples)
    example = re.findall(r"^#(APP_\w+)=", lines, re.MULTILINE)
    assert table == example
    assert sorted(table) == sorted(SETTINGS)


def test_the_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the comment marks out of `.env.example` changes nothing."""
    for variable in SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    defaults = load_settings()
    lines = re.findall(r"^#(APP_\w+)=(.+)$", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE)
    for variable, value in lines:
        monkeypatch.setenv(variable, value)
    assert load_settings() == defaults


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


def test_documents_say_what_the_contract_says(tmp_path: Path) -> None:
    """Features, answers, examples and the served version's facts stand in the documents as they are."""
    done = run(ROOT, "lifecycle", "docs", "--check", "--openapi", timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    copied(tmp_path)
    stale = ["README.md", "docs/contract.md", "docs/model_card.md", "docs/example.json"]
    for page in stale:
        text = (tmp_path / page).read_text("utf-8")
        (tmp_path / page).write_text(text.replace(SERVED, "v99").replace(": ", ":  "), "utf-8")
    done = run(tmp_path, "lifecycle", "docs", "--check", timeout=300)
    assert (done.returncode, [line.partition(":")[0] for line in done.stderr.splitlines()]) == (1, stale)
    done = run(tmp_path, "lifecycle", "docs", timeout=300)
    assert (done.returncode, [line.partition(":")[0] for line in done.stdout.splitlines()]) == (0, stale)
    assert (tmp_path / "docs/example.json").read_bytes() == (ROOT / "docs/example.json").read_bytes()


@pytest.mark.parametrize(
    "label",
    ["plain", "it's", 'a "quoted" one', "a/b&c", "back\\slash", "naïve, größer", True, 3, -1.5],
    ids=str,
)
def test_the_command_for_feedback_survives_any_label(label: Any) -> None:
    """Whatever a label is made of, the command in `docs/contract.md` sends it as it is."""
    manifest = read_artifact(ROOT / "artifacts", SERVED).manifest
    section = api(manifest, EXAMPLE, {"prediction_id": "", "label": label})["Say what was right"]
    (command,) = blocks_in(section)
    script = command.partition(" | ")[2].partition(" | curl")[0]
    given = '{"prediction_id":"' + "0" * 32 + '","label":"x"}'
    done = subprocess.run(["sh", "-c", script], input=given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"prediction_id": "0" * 32, "label": label}


def test_the_contract_says_which_features_may_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Features with a default, and the key by which own code finds them, if it is written."""
    manifest = read_artifact(ROOT / "artifacts", SERVED).manifest
    fields = dict(Features.model_fields)
    first, column = next((name, field.alias or name) for name, field in fields.items())

    def section() -> str:
        return api(manifest, EXAMPLE, {"prediction_id": "", "label": ""})["Features"]

    monkeypatch.setattr(documents, "LOOKED_UP", set())
    assert "All inputs are required, each in its own JSON type" in section()
    monkeypatch.setattr(documents, "LOOKED_UP", {first})
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "app/own").mkdir(parents=True)
    code = tmp_path / "app/own/lookup.py"
    code.write_text('"""async def lookup: not yet."""\n', "utf-8")
    assert f"All inputs but `{column}` (which the service has defaults for) are required" in section()
    code.write_text("async def lookup(instances, deadline): ...\n", "utf-8")
    monkeypatch.setattr(documents, "KEYS", {first})
    assert f"(which the service looks up by `{column}`, sent beside the inputs)" in section()


def test_the_contract_says_how_the_label_is_chosen() -> None:
    """By a threshold where the version has one; else it is the most probable label."""
    manifest = read_artifact(ROOT / "artifacts", SERVED).manifest
    labels = [
        {"labels": ["no", "yes"]},
        {"labels": ["no", "yes"], "threshold": {"label": "no", "least": 0.3}},
    ]
    found = [manifest.model_copy(update={"outputs": Outputs.model_validate(one)}) for one in labels]
    answer = {"prediction_id": "", "label": "no"}
    plain, ruled = (api(one, EXAMPLE, answer)["Answer"] for one in found)
    assert "the most probable one" in plain
    assert "`no` if its probability is at least 0.3" in ruled


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
    """The image installs the very releases, by hash, that the tests ran with."""
    locks = {}
    for lock in ("dev", "runtime"):
        text = (ROOT / "requirements" / f"{lock}.txt").read_text("utf-8").replace("\\\n", "")
        assert all(re.match(r"\S+==\S+ .*--hash=sha256:", line) for line in text.splitlines())
        assert "://" not in text
        # Without the markers: a package that more of the others need is needed in more cases.
        locks[lock] = {re.sub(r" ;.*?(?= --hash)", "", line).replace(" ", "") for line in text.splitlines()}
    assert locks["runtime"] < locks["dev"]


def test_the_engine_is_sent_what_the_image_copies() -> None:
    """`.dockerignore` lets through every file that the Dockerfile copies, and no other."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert sorted(sent) == sorted(one for names in copied for one in names.split())


def test_containers_get_no_rights() -> None:
    """Compose takes rights away and opens ports on this machine only; the image is nobody's, by hash."""
    for service in services().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & service.keys()
    api = services()["api"]
    assert (api["read_only"], api["tmpfs"]) == (True, ["/tmp"])  # noqa: S108  # in the container
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", api["user"])
    assert api["pids_limit"]
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE)[-1] == api["user"]
    (install,) = re.findall(r"pip .*install(?:.*\\\n)*.*", dockerfile)
    assert "--require-hashes" in install
    assert not re.search(r"APP_API_KEYS|SECRET|TOKEN|^ADD|https?:", dockerfile, re.MULTILINE)


def proofs_in(file: Path) -> set[str]:
    """The names of the tests that a file defines."""
    tree = ast.parse(file.read_text("utf-8")) if file.is_file() else ast.Module([], [])
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


def test_every_threat_names_a_test_that_exists() -> None:
    """Each row of the threat model has an asset, an attacker, a vector, a control, and a test that exists."""
    text = (ROOT / "docs" / "threat_model.md").read_text("utf-8")
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert rows[0] == ["asset", "attacker", "vector", "control", "test"]
    assert len(rows) > 20
    for row in rows[1:]:
        assert len(row) == 5, row
        assert all(row), row
        proofs = re.findall(r"`(tests/service/[\w/]+\.py)::(\w+)`", row[-1])
        assert ", ".join(f"`{file}::{name}`" for file, name in proofs) == row[-1]
        assert [proof for proof in proofs if proof[1] not in proofs_in(TEMPLATE / proof[0])] == []
