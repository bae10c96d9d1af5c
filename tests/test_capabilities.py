"""Capabilities: a service with each of them, and with all, passes its own checks and tests."""

import json
from pathlib import Path

import pytest

from scripts.render import ROOT
from tests.conftest import Bake, Render, run

pytestmark = pytest.mark.slow

CAPABILITIES: list[str] = json.loads((ROOT / "cookiecutter.json").read_text("utf-8"))["_capabilities"]
ALL = " ".join(CAPABILITIES)


@pytest.fixture(scope="module")
def with_all(render: Render) -> Path:
    """A service with all capabilities and its development environment."""
    folder = render(capabilities=ALL).folder
    setup = run("make", "setup", cwd=folder)
    assert setup.returncode == 0, setup.stdout
    return folder


@pytest.mark.parametrize("target", ["check", "test"])
@pytest.mark.parametrize("capabilities", [*CAPABILITIES, ALL])
def test_service_with_capabilities_passes_its_own(
    with_all: Path, bake: Bake, capabilities: str, target: str
) -> None:
    """`make check` and `make test` pass; the environment is that of all capabilities."""
    folder = with_all
    if capabilities != ALL:
        folder = bake(capabilities=capabilities, service_name=f"with-{capabilities}")
        if not (folder / ".venv").exists():
            (folder / ".venv").symlink_to(with_all / ".venv")
    ended = run("make", target, cwd=folder)
    assert ended.returncode == 0, ended.stdout[-20_000:]
