"""What was rendered works: its own checks and tests pass, its server predicts, it can be updated."""

import json
import os
import re
import shutil
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from scripts.render import SERVICE
from tests.conftest import Bake, Render, commit, contents, run

# One worker runs them all, so that the environment is installed once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("service")]

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
    """The service passes its `make check` and `make test` unrendered, so it can be worked on in place."""
    ended = run("make", target, cwd=unrendered)
    assert ended.returncode == 0, ended.stdout[-20_000:]


def test_checking_and_testing_leave_no_trace(service: Path, bake: Bake) -> None:
    """What `make check` and `make test` leave behind is ignored by git."""
    commit(service, "As rendered")
    tracked = run("git", "ls-files", cwd=service).stdout.splitlines()
    assert sorted(tracked) == sorted(contents(bake()))


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


def test_demo_from_an_empty_clone(repository: Path) -> None:
    """`make demo` in a fresh clone predicts over HTTP, refuses bad input, and ends without a terminal."""
    demo = run("make", "demo", cwd=repository)
    assert demo.returncode == 0, demo.stdout
    assert '"label": "setosa"' in demo.stdout
    assert '"model_version": "v1"' in demo.stdout
    assert re.search(r"petal_width\": NaN\}\n  400 \{", demo.stdout)
    assert re.search(r"\n  422 \{", demo.stdout)
    (docs,) = re.findall(r"http://127\.0\.0\.1:\d+/docs", demo.stdout)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(docs, timeout=5)

    # What just served was installed from requirements/runtime.txt alone.
    python = repository / "build" / "iris-classifier" / BIN / "python"
    absent = run(python, "-c", "import sklearn", cwd=repository)
    assert "No module named 'sklearn'" in absent.stdout


def test_update_keeps_what_the_owners_changed(repository: Path, tmp_path: Path) -> None:
    """`cruft update` brings a change of the template into a service and keeps its owners' changes."""
    upstream = shutil.copytree(
        repository, tmp_path / "upstream", ignore=shutil.ignore_patterns(".venv", "build")
    )
    cruft = Path(sys.executable).parent / "cruft"
    created = run(
        cruft,
        "create",
        str(upstream),
        "--no-input",
        "--extra-context",
        json.dumps({"ci": "none"}),
        cwd=tmp_path,
    )
    assert created.returncode == 0, created.stdout
    service = tmp_path / "iris-classifier"
    with (service / "app" / "main.py").open("a", encoding="utf-8") as module:
        module.write("# ours\n")
    commit(service, "Ours")

    slo = upstream / SERVICE.name / "slo.toml"
    slo.write_text("# theirs\n" + slo.read_text(encoding="utf-8"), encoding="utf-8")
    commit(upstream, "Theirs")
    updated = run(cruft, "update", "--skip-apply-ask", cwd=service)
    assert updated.returncode == 0, updated.stdout
    assert (service / "slo.toml").read_text(encoding="utf-8").startswith("# theirs\n")
    assert (service / "app" / "main.py").read_text(encoding="utf-8").endswith("# ours\n")
    assert not (service / ".github").exists()


def test_cruft_renders_the_same(repository: Path, bake: Bake, tmp_path: Path) -> None:
    """Cruft renders what cookiecutter renders, byte for byte."""
    cruft = Path(sys.executable).parent / "cruft"
    created = run(cruft, "create", str(repository), "--no-input", cwd=tmp_path)
    assert created.returncode == 0, created.stdout
    files = contents(tmp_path / "iris-classifier")
    del files[".cruft.json"]
    assert files == contents(bake())
