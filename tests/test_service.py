"""What was rendered works: its own checks and tests pass, before rendering and after."""

import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts.render import ROOT, SERVICE
from tests.conftest import Bake, Render, commit, contents, run

pytestmark = pytest.mark.slow

BIN = Path(".venv", "Scripts" if os.name == "nt" else "bin")


@pytest.fixture(scope="session")
def service(render: Render) -> Path:
    """A default render with its development environment."""
    folder = render().folder
    setup = run("make", "setup", cwd=folder)
    assert setup.returncode == 0, setup.stdout
    return folder


@pytest.fixture(scope="session")
def unrendered(template: Path, service: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service folder as it stands in the template, with the environment of the rendered service."""
    folder = shutil.copytree(template / SERVICE.name, tmp_path_factory.mktemp("in-place") / SERVICE.name)
    (folder / ".venv").symlink_to(service / ".venv")
    return folder


@pytest.mark.parametrize("target", ["check", "test"])
def test_rendered_service_passes_its_own(service: Path, target: str) -> None:
    """The rendered service passes its own `make check` and `make test`."""
    ended = run("make", target, cwd=service)
    assert ended.returncode == 0, ended.stdout[-20_000:]


@pytest.mark.parametrize("target", ["check", "test"])
def test_unrendered_service_passes_its_own(unrendered: Path, target: str) -> None:
    """The service passes its checks and tests unrendered, so it can be worked on in place."""
    ended = run("make", target, cwd=unrendered)
    assert ended.returncode == 0, ended.stdout[-20_000:]


def test_checking_and_testing_leave_no_trace(service: Path, bake: Bake) -> None:
    """What `make check` and `make test` leave behind is ignored by git."""
    commit(service, "As rendered")
    tracked = run("git", "ls-files", cwd=service).stdout.splitlines()
    assert sorted(tracked) == sorted(contents(bake()))


# Lines of the checklist with a test above, and those that need an index of weaknesses or a quiet machine.
ELSEWHERE = ("make check", "make test", "make audit", "make load")


def test_release_checklist_passes_as_shipped(service: Path, tmp_path: Path) -> None:
    """In a rendered service under git, a version trained anew passes the lines of the release checklist."""
    folder = tmp_path / service.name
    shutil.copytree(service, folder, ignore=shutil.ignore_patterns(".venv", ".git", "build"))
    (folder / ".venv").symlink_to(service / ".venv")
    checklist = folder / "docs" / "release_checklist.md"
    lines = checklist.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(tuple(f"- [ ] Run `{one}`" for one in ELSEWHERE))]
    assert len(kept) == len(lines) - len(ELSEWHERE)
    checklist.write_text("".join(kept), "utf-8")
    commit(folder, "As rendered")
    train = (folder / BIN / "python", "-m", "tests.service.example", "--version", "v2")
    trained = run(*train, cwd=ROOT, PROVE_SERVICE=str(folder))
    assert trained.returncode == 0, trained.stdout
    ended = run("make", "release-check", "VERSION=v2", cwd=folder)
    assert ended.returncode == 0, ended.stdout
    ticked = (folder / "build" / "release-check-v2" / checklist.name).read_text("utf-8")
    assert ticked.count("- [x] Run `") == "".join(kept).count("- [ ] Run `") > 2
    assert ticked.count("Name: ____") == "".join(kept).count("- [ ] Sign: ")


@pytest.mark.parametrize("slo", ["standard", "strict", "relaxed"])
def test_service_level_reaches_the_settings(service: Path, bake: Bake, slo: str) -> None:
    """The chosen service level is what the service starts with."""
    folder = bake(slo=slo)
    promises = tomllib.loads((folder / "slo.toml").read_text(encoding="utf-8"))
    config = run(service / BIN / "python", "-m", "app", "config", cwd=folder)
    assert config.returncode == 0, config.stdout
    deadline = re.search(r"APP_REQUEST_DEADLINE_SECONDS\W+([\d.]+)", config.stdout)
    assert deadline, config.stdout
    assert float(deadline[1]) == promises["request_deadline_seconds"]


@pytest.mark.parametrize(
    "answers",
    [
        {"slo": "strict", "owner_team": "Équipe R&D/données"},
        {
            "slo": "relaxed",
            "owner_team": "@org/ml-team",
            "runbook_base_url": "https://wiki.example.com/~on-call",
            "dashboard_base_url": "https://grafana.example.com:3000/team",
        },
        {"owner_team": "yes", "service_name": "test", "repo_url": "https://example.com:8443/iris%20model"},
    ],
    ids=["strict", "relaxed", "odd names"],
)
def test_alerts_follow_the_answers(service: Path, render: Render, answers: dict[str, str]) -> None:
    """Whatever was answered, Prometheus and Alertmanager accept it; alerts name team, promises and pages."""
    folder = render(**answers).folder
    checks = "accepts or promise or says or goes"
    ended = run(
        *(service / BIN / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("tests/service/integration/test_ops.py", "-k", checks),
        cwd=ROOT,
        PROVE_SERVICE=str(folder),
    )
    assert ended.returncode == 0, ended.stdout
    rules = yaml.safe_load((folder / "ops" / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert {alert["labels"]["team"] for alert in alerts} == {answers["owner_team"]}
    assert {alert["labels"]["service"] for alert in alerts} == {folder.name}
    base = answers.get("runbook_base_url") or (
        f"{answers.get('repo_url', f'https://git.example.com/{folder.name}')}/blob/main/docs/runbooks"
    )
    boards = answers.get("dashboard_base_url", "http://127.0.0.1:3000")
    assert {alert["annotations"]["dashboard_url"] for alert in alerts} == {
        f"{boards}/d/inference-overview",
        f"{boards}/d/inference-model",
    }
    assert {alert["annotations"]["runbook_url"] for alert in alerts} == {
        f"{base}/{alert['alert']}.md" for alert in alerts
    }
