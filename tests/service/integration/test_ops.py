"""Rules, alerts and dashboards against the real programs that read them, and the real service they watch."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import tomllib
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from ops.alertmanager.receiver import Receiver, show

from app.core.errors import _STATUS as STATUS_BY_CODE
from app.observability.metrics import FAILURES, LATENCY
from lifecycle.operations.monitor import trained_features
from tests.service.conftest import ARTIFACTS, LABELS, SERVED, serving, until
from tests.service.gameday.programs import alertmanager_flags, compressed, queries, running
from tests.service.integration.test_artifacts import edit
from tests.service.unit.test_docs import ADDED_METRICS, ALERTS, BASE_ALERTS, blocks, metrics_in
from tests.service.watching import prepare, program, traffic, watching
from tests.service.where import ROOT

PROMETHEUS = ROOT / "ops" / "prometheus"
BOARDS = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
RUNBOOKS = ROOT / "docs" / "runbooks"
TRAINED = bool(trained_features(ARTIFACTS, SERVED))  # on rows enough for an index of drift


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ops/` as the programs read it."""
    return prepare(tmp_path_factory.mktemp("ops"))


def rules(kind: str) -> list[dict[str, Any]]:
    """Every rule of a kind, `record` or `alert`."""
    files = [yaml.safe_load(path.read_text("utf-8")) for path in PROMETHEUS.glob("*rules.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def board(path: Path) -> dict[str, Any]:
    """A dashboard."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def check(*command: str | Path) -> str:
    """What a program says that finds nothing wrong."""
    name, *arguments = command
    done = subprocess.run([program(str(name)), *arguments], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_rules_and_configuration(ops: Path) -> None:
    """`promtool` finds nothing wrong, and the configuration loads every rule file there is."""
    files = sorted((ops / "prometheus").glob("*rules.yml"))
    check("promtool", "check", "rules", "--lint=all", "--lint-fatal", *files)
    said = check("promtool", "check", "config", ops / "prometheus" / "prometheus.yml")
    assert f"{len(files)} rule files found" in said


def test_alertmanager_accepts_its_configuration(ops: Path) -> None:
    """`amtool` finds nothing wrong."""
    check("amtool", "check-config", ops / "alertmanager" / "alertmanager.yml")


@pytest.mark.parametrize(
    ("severity", "own", "receiver"),
    [
        ("page", True, "pager"),
        ("ticket", True, "tickets"),
        ("page", False, "unrouted"),
        ("", True, "unrouted"),
    ],
)
def test_an_alert_goes_to_who_must_act(ops: Path, severity: str, own: bool, receiver: str) -> None:
    """Pages go to the team's pager, tickets to its queue; what is nobody's is still told to somebody."""
    config = ops / "alertmanager" / "alertmanager.yml"
    text = config.read_text("utf-8")
    (team,) = set(re.findall(r'team="([^"]*)"', text))
    labels = [f"team={team if own else 'others'}", f"severity={severity}"]
    said = check("amtool", "config", "routes", "test", f"--config.file={config}", *labels)
    assert said.strip() == receiver


def test_what_says_more_holds_back_what_says_less(
    ops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not ready holds back its own latency, and nothing else; the sample receiver prints the rest.

    Alertmanager is the real one, with waits that are a hundredth as long.
    """
    config = Path(shutil.copytree(ops / "alertmanager", tmp_path / "alertmanager")) / "alertmanager.yml"
    text = compressed(config.read_text("utf-8"), 100)
    (team,) = set(re.findall(r'team="([^"]*)"', text))
    own, other = "own", "other"
    alerts = {
        ("ServiceNotReady", "page", own): "page",
        ("LatencyBudgetBurn", "page", own): None,
        ("LatencyBudgetBurn", "ticket", own): None,
        ("NoTraffic", "page", own): None,
        ("Saturation", "ticket", own): None,
        ("WorkerRestarts", "ticket", own): "ticket",
        ("LatencyBudgetBurn", "page", other): "page",
        ("LatencyBudgetBurn", "ticket", other): None,  # paged already
        ("AvailabilityBudgetBurn", "ticket", other): "ticket",
    }
    names = ("alertname", "severity", "service")
    told: set[tuple[str, ...]] = set()

    def heard() -> bool:
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        told.update((*(line[name] for name in names), line["to"]) for line in lines)
        return len(told) >= len([to for to in alerts.values() if to])

    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver(("127.0.0.1", 0), show))
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        stack.callback(receiver.shutdown)
        config.write_text(text.replace("receiver:9095", f"127.0.0.1:{receiver.server_port}"), "utf-8")
        url = stack.enter_context(running(tmp_path, "alertmanager", *alertmanager_flags(tmp_path)))
        labels = [{**dict(zip(names, alert, strict=True)), "team": team} for alert in alerts]
        httpx2.post(f"{url}/api/v2/alerts", json=[{"labels": one} for one in labels]).raise_for_status()
        until(heard, "those that are not held back")
        known = httpx2.get(f"{url}/api/v2/alerts").json()
    assert told == {(*alert, to) for alert, to in alerts.items() if to}
    held = {tuple(one["labels"][name] for name in names) for one in known if one["status"]["inhibitedBy"]}
    assert held == {alert for alert, to in alerts.items() if not to}


def test_every_alert_fires_when_it_should(ops: Path) -> None:
    """`promtool test rules`: faults, their absence and little traffic; each alert has a case of each kind."""
    cases = []
    for tests in sorted((ops / "prometheus").glob("*rules_test.yml")):
        check("promtool", "test", "rules", tests)
        groups = yaml.safe_load(tests.read_text("utf-8"))["tests"]
        cases += [case for group in groups for case in group["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == ALERTS
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == ALERTS


def test_rules_and_load_gate_promise_the_same() -> None:
    """`slo_rules.yml` and `slo.toml` hold the same numbers, and a histogram bucket ends at the latency."""
    promises = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))
    (group,) = yaml.safe_load((PROMETHEUS / "slo_rules.yml").read_text("utf-8"))["groups"]
    recorded = {rule["record"]: float(rule["expr"]) for rule in group["rules"]}
    assert recorded == {
        "slo:availability:objective": promises["availability"],
        "slo:latency:objective": 0.95,  # p95
        "slo:latency:seconds": promises["latency_p95_ms"] / 1000,
    }
    (bucket,) = [rule["labels"]["le"] for rule in group["rules"] if "labels" in rule]
    assert float(bucket) == promises["latency_p95_ms"] / 1000
    assert bucket in map(str, LATENCY)


def test_every_alert_says_what_to_do() -> None:
    """Severity, team, a sentence with the number, a runbook that is there, and a dashboard that is there."""
    boards = {board(path)["uid"] for path in BOARDS}
    for rule in rules("alert"):
        labels, notes = rule["labels"], rule["annotations"]
        assert labels["severity"] in {"page", "ticket"}
        assert labels["team"]
        assert labels["service"]
        assert "$value" in notes["summary"]
        assert notes["summary"][0].isupper()
        assert notes["summary"].endswith((".", "requests."))
        page = notes["runbook_url"].rpartition("/")[2]
        assert page == f"{rule['alert']}.md"
        assert (RUNBOOKS / page).is_file(), page
        assert notes["dashboard_url"].rpartition("/d/")[2] in boards
    assert {rule["alert"] for rule in rules("alert")} == ALERTS
    assert {rule["alert"] for rule in rules("alert") if rule["labels"]["severity"] == "page"} == {
        "AvailabilityBudgetBurn", "LatencyBudgetBurn", "ServiceNotReady", "NoTraffic", "ServingFallback",
    }  # fmt: skip


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_works_where_it_is_put(path: Path) -> None:
    """It has a fixed address, asks nothing when imported, fits a screen, and its links lead somewhere."""
    content, text = board(path), path.read_text("utf-8")
    assert content["uid"] == f"inference-{path.stem}"
    assert "__inputs" not in content
    assert "${DS_" not in text
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in content["panels"]) <= 24
    source, runbooks = content["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert runbooks["definition"] == "label_values(service:info, runbooks)"
    pages = {page.name for page in RUNBOOKS.iterdir()}
    linked = set(re.findall(r"\$\{runbooks:raw\}/([^\"]+)", text))
    assert "README.md" in linked
    assert linked <= pages
    assert set(re.findall(r'"/d/([^"]+)"', text)) <= {board(other)["uid"] for other in BOARDS}


def test_every_runbook_is_linked_from_a_panel() -> None:
    """Whoever sees it on a dashboard is one click from what to do."""
    texts = "".join(path.read_text("utf-8") for path in BOARDS)
    assert set(re.findall(r"runbooks:raw\}/(\w+)\.md", texts)) - {"README"} == BASE_ALERTS


def test_what_is_asked_for_is_there(tmp_path: Path) -> None:
    """After real traffic every panel has data, and each metric in a rule, panel or runbook is one there is.

    Either the running service shows it in /metrics, or a rule records it; and Prometheus takes every query.
    The rules run beside the model, as shadow and as canary. A release while it runs is marked in the
    dashboards, and both versions stand side by side.
    """
    release = Path(shutil.copytree(ARTIFACTS, tmp_path / "artifacts")) / "release.json"
    beside = {"shadow": "v0", "canary": "v0", "canary_percent": 50}
    edit(release, lambda document: document.update(beside))
    with ExitStack() as stack:
        service = stack.enter_context(serving(tmp_path, artifacts_dir=release.parent))
        watch = stack.enter_context(watching(tmp_path, service.url))
        start = watch.now()

        def shown(query: str) -> bool:
            traffic(service)
            return watch.has_data(query, start)

        panels = sorted(query for query in queries() if TRAINED or ":psi:" not in query)
        for query in panels:
            until(partial(shown, query), f"data for {query}")
        runbooks = {query for path in RUNBOOKS.iterdir() for query in blocks(path, "promql")}
        for query in runbooks:
            watch.query(query)
        asked = [*runbooks, *(rule["expr"] for kind in ("record", "alert") for rule in rules(kind))]
        named = set().union(*map(metrics_in, [*asked, *panels]))
        emitted = {re.split(r"[{ ]", name)[0] for name in service.metrics()}
        recorded = {rule["record"] for rule in rules("record")}
        of_others = "prediction_value_bucket" if LABELS else "prediction_score_bucket"
        assert named - emitted - recorded == {"up", "ALERTS", of_others, *ADDED_METRICS}
        assert {one["metric"]["__name__"] for one in watch.query('{__name__=~".+:.+"}')} == (
            recorded if TRAINED else {record for record in recorded if ":psi:" not in record}
        )

        def marked(mark: str) -> bool:
            return "v0" in versions(watch.query(mark, start))

        new = release.with_suffix(".new")
        new.write_text(
            release.read_text("utf-8").replace(f'"serving": "{SERVED}"', '"serving": "v0"'), "utf-8"
        )
        new.replace(release)
        for path in BOARDS:
            (mark,) = [one["expr"] for one in board(path)["annotations"]["list"] if one["name"] == "Releases"]
            until(partial(marked, mark), "the mark of the release")
        (side_by_side,) = [
            panel["targets"][0]["expr"]
            for path in BOARDS
            for panel in board(path)["panels"]
            if panel["title"] == "Predictions by version"
        ]

        def both() -> bool:
            traffic(service)
            return versions(watch.query(side_by_side.replace("$__rate_interval", "4s"), start)) == {
                "v0",
                SERVED,
            }

        until(both, "both versions")


def versions(series: list[dict[str, Any]]) -> set[str]:
    """The versions that series are of."""
    return {one["metric"].get("version") or one["metric"]["model_version"] for one in series}


def test_failures_are_counted_by_problem() -> None:
    """Every problem answered 500 has its series from the start, so that the first one is seen."""
    assert set(FAILURES) == {code for code, status in STATUS_BY_CODE.items() if status == 500}


def test_a_fault_reaches_who_must_act(tmp_path: Path) -> None:
    """Real requests that fail page the team, its ticket for the same is held back, and all ends with them.

    The deadline is so short that every request misses it; a worker is killed too, which is a ticket.
    """
    with ExitStack() as stack:
        service = stack.enter_context(serving(tmp_path, request_deadline_seconds="0.000001"))
        watch = stack.enter_context(watching(tmp_path, service.url))
        until(lambda: watch.query("service:ready:ratio == 1"), "the first scrape")

        def paged() -> bool:
            assert service.predict().status_code == 503
            return bool(watch.told("firing", alertname="AvailabilityBudgetBurn", severity="page"))

        until(paged, "a page")
        ((path, alert), *_) = watch.told("firing", alertname="AvailabilityBudgetBurn")
        assert path == "/page"
        assert alert["labels"].keys() == {"alertname", "severity", "team", "service"}
        assert re.fullmatch(
            r"Requests fail [\d.k]+ times as often as promised\.", alert["annotations"]["summary"]
        )
        assert alert["annotations"]["runbook_url"].endswith("/AvailabilityBudgetBurn.md")
        ticket = {"alertname": "AvailabilityBudgetBurn", "severity": "ticket"}
        until(lambda: watch.silenced(**ticket), "the ticket for the same to be held back")
        assert not watch.told("firing", **ticket)

        os.kill(service.workers()[0], signal.SIGKILL)
        until(lambda: watch.told("firing", alertname="WorkerRestarts", severity="ticket"), "a ticket")
        assert {path for path, _ in watch.told("firing", severity="ticket")} == {"/ticket"}
        # Nobody asks any more: the errors leave the short window.
        until(lambda: watch.told("resolved", alertname="AvailabilityBudgetBurn"), "the end of the page")
