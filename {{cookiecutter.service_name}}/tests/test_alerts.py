"""Rules, alerts and dashboards: read by the programs that use them, and true to the promises and runbooks.

ops/prometheus, ops/alertmanager -> promtool, amtool; alerts -> docs/runbooks; queries -> metrics that exist
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, program, read

RULES = sorted((ROOT / "ops" / "prometheus").glob("*rules.yml"))
BOARDS = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
PAGES = sorted((ROOT / "docs" / "runbooks").glob("*.md"))
OF_PROMETHEUS = {"up", "ALERTS"}


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: `record` or `alert`."""
    files = [yaml.safe_load(read(path)) for path in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def board(path: Path) -> dict[str, Any]:
    """A dashboard."""
    document: dict[str, Any] = json.loads(read(path))
    return document


def metrics_in(expression: str) -> set[str]:
    """The metric names in a PromQL expression."""
    for noise in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^\]]*\]", r"\b(by|without|on|ignoring)\s*\([^)]*\)"):
        expression = re.sub(noise, " ", expression)
    words = set(re.findall(r"(?<![\w.:])[A-Za-z_][\w:]*+(?!\s*\()", expression))
    return words - {"or", "and", "unless", "offset", "bool", "group_left", "group_right"}


def check(*command: str | Path) -> None:
    """Run a program that must find no errors."""
    name, *arguments = map(str, command)
    relaxed = os.environ | {"GOGC": "800"}  # garbage collected less often: a third less CPU
    done = subprocess.run(
        [program(name), *arguments], capture_output=True, text=True, check=False, env=relaxed
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `ops/` for the programs."""
    copy = Path(shutil.copytree(ROOT / "ops", tmp_path_factory.mktemp("ops") / "ops"))
    for path in copy.rglob("*.yml"):
        path.write_text(read(path), "utf-8")
    return copy


def test_prometheus_accepts_the_rules(ops: Path) -> None:
    """`promtool` finds nothing wrong in the rules, nor in the configuration that loads them."""
    check(
        "promtool", "check", "rules", "--lint=all", "--lint-fatal", *(ops / "prometheus").glob("*rules.yml")
    )
    check("promtool", "check", "config", ops / "prometheus" / "prometheus.yml")


def test_alertmanager_accepts_its_configuration(ops: Path) -> None:
    """`amtool` finds no errors in the routes of alerts."""
    check("amtool", "check-config", ops / "alertmanager" / "alertmanager.yml")


def test_alerts_fire_when_they_should(ops: Path) -> None:
    """`promtool test rules`: faults, their absence and little traffic."""
    for tests in sorted((ops / "prometheus").glob("*rules_test.yml")):
        check("promtool", "test", "rules", tests)


def test_every_alert_has_tests_of_both_kinds() -> None:
    """rules_test.yml has for each alert a case in which it fires, and one in which it does not."""
    files = [yaml.safe_load(read(path)) for path in (ROOT / "ops" / "prometheus").glob("*rules_test.yml")]
    cases = [case for file in files for test in file["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name: str) -> None:
    """It has severity, team, service and a sentence with the number; its runbook and dashboard exist."""
    labels, notes = ALERTS[name]["labels"], ALERTS[name]["annotations"]
    assert labels["severity"] in {"page", "ticket"}
    assert labels["team"]
    assert labels["service"]
    assert "$value" in notes["summary"]
    assert re.match(r"[A-Z].*\.$", notes["summary"], re.DOTALL), "the summary is a sentence"
    page = notes["runbook_url"].rpartition("/")[2]
    assert page == f"{name}.md", f"runbook_url of {name} must end in {name}.md"
    assert (ROOT / "docs" / "runbooks" / page).is_file(), f"write docs/runbooks/{page}, or rename the alert"
    assert notes["dashboard_url"].rpartition("/d/")[2] in {board(path)["uid"] for path in BOARDS}


def test_alerts_are_routed_to_the_team_that_owns_them() -> None:
    """The team of every alert has its routes in alertmanager.yml, for pages and for tickets."""
    route = yaml.safe_load(read("ops/alertmanager/alertmanager.yml"))["route"]
    routed = {tuple(sorted(re.sub(r'"', "", one) for one in child["matchers"])) for child in route["routes"]}
    for name, rule in ALERTS.items():
        labels = rule["labels"]
        wanted = (f"severity={labels['severity']}", f"team={labels['team']}")
        assert wanted in routed, f"no route of alertmanager.yml takes {name}: {wanted}"


def test_rules_and_load_gate_promise_the_same() -> None:
    """`slo_rules.yml` records the numbers of `slo.toml`, so alerts, panels and `make load` agree."""
    promises = tomllib.loads(read("slo.toml"))
    (group,) = yaml.safe_load(read("ops/prometheus/slo_rules.yml"))["groups"]
    recorded = {rule["record"]: float(rule["expr"]) for rule in group["rules"]}
    assert recorded == {
        "slo:availability:objective": promises["availability"],
        "slo:latency:objective": 0.95,  # the promise is about p95
        "slo:latency:seconds": promises["latency_p95_ms"] / 1000,
    }
    (bucket,) = [rule["labels"]["le"] for rule in group["rules"] if "labels" in rule]
    assert float(bucket) == promises["latency_p95_ms"] / 1000


@pytest.mark.parametrize("path", [*RULES, *BOARDS, *PAGES], ids=lambda path: path.name)
def test_queries_ask_for_metrics_that_exist(path: Path) -> None:
    """Each metric in a rule, panel or runbook is declared in app/, or recorded by a rule."""
    if path.suffix == ".yml":
        groups = yaml.safe_load(read(path))["groups"]
        queries = [rule["expr"] for group in groups for rule in group["rules"]]
    elif path.suffix == ".json":
        queries = [target["expr"] for panel in board(path)["panels"] for target in panel.get("targets", [])]
    else:
        queries = re.findall(r"^ *```promql\n(.*?)^ *```", read(path), re.MULTILINE | re.DOTALL)
    code = "".join(file.read_text("utf-8") for file in (ROOT / "app").rglob("*.py"))
    recorded = {rule["record"] for rule in rules("record")}
    for metric in set().union(*map(metrics_in, queries)) - recorded - OF_PROMETHEUS:
        declared = re.sub(r"_(bucket|sum|count|total)$", "", metric)
        found = f'"{declared}"' in code or f'"{metric}"' in code
        assert found, f"{path.name} asks for {metric}, which no code in app/ declares and no rule records"


def test_panels_ask_the_data_source_that_is_provided() -> None:
    """Every panel uses the data source variable of its board, of the kind that Grafana gets."""
    source = yaml.safe_load(read("ops/grafana/provisioning/datasources/prometheus.yaml"))["datasources"][0]
    for path in BOARDS:
        variables = {one["name"]: one.get("query") for one in board(path)["templating"]["list"]}
        assert variables["datasource"] == source["type"], path.name
    panels = [panel for path in BOARDS for panel in board(path)["panels"]]
    asked = {target["datasource"]["uid"] for panel in panels for target in panel.get("targets", [])}
    assert asked == {"${datasource}"}
    linked = {name for path in BOARDS for name in re.findall(r"runbooks:raw\}/(\w+\.md)", read(path))}
    assert linked <= {path.name for path in PAGES}
