"""Renders the template for the tests: `bake(**answers)` gives the folder, `refuse(**answers)` what was said.

The command line is run as a user runs it, because that is where answers turn hostile.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.render import copy_template

# Under `make`, a make that a test starts would take over the flags and the job server of the outer one.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("ARGS", "MAKE", "MFLAGS", "APP_"))
}


class Rendering(NamedTuple):
    """How a run of cookiecutter ended."""

    status: int
    said: str
    folder: Path


Bake = Callable[..., Path]
Render = Callable[..., Rendering]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switch behind `make files`."""
    parser.addoption("--refresh-files", action="store_true", help="write tests/files/ anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the image tests out where no container engine answers, but not in CI: there they fail."""
    image = [item for item in items if item.get_closest_marker("image")]
    if not image or "CI" in os.environ or engine_answers():
        return
    config.hook.pytest_deselected(items=image)
    items[:] = [item for item in items if item not in image]


def engine_answers() -> bool:
    """Whether `docker` is installed and its engine runs."""
    return (
        bool(shutil.which("docker"))
        and not subprocess.run(["docker", "info"], capture_output=True).returncode
    )


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and gives its status and its output, both streams as they came."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "utf-8", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
    )


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template without the environments and caches of this work tree."""
    return copy_template(tmp_path_factory.mktemp("clean") / "template")


@pytest.fixture(scope="session")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a git repository with one commit, as if just cloned."""
    clone = shutil.copytree(template, tmp_path_factory.mktemp("cloned") / "template")
    commit(clone, "The template as it stands")
    return clone


def commit(folder: Path, message: str) -> None:
    """Records everything in `folder`, starting its history if there is none; no configuration is needed."""
    identity = ["-c", "user.name=A test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "--all"], [*identity, "commit", "-q", "--message", message]):
        ended = run("git", *command, cwd=folder)
        assert ended.returncode == 0, ended.stdout


def cookiecutter(template: Path, into: Path, home: Path, *flags: str) -> list[str]:
    """The command that renders into a folder; `flags` are Python's. Answers may follow.

    Its configuration lies in `home`: the user's may hold other defaults, and other workers write the same
    replay file.
    """
    config = home / "config.yaml"
    config.write_text(f"replay_dir: {(home / 'replay').as_posix()!r}\n", encoding="utf-8")
    command = [sys.executable, *flags, "-m", "cookiecutter", str(template), "--no-input"]
    return [*command, "--output-dir", str(into), "--config-file", str(config)]


@pytest.fixture(scope="session")
def render(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Runs cookiecutter with `answers` into `into`, a new folder unless one is given."""
    home = tmp_path_factory.mktemp("home")

    def render(*words: str, into: Path | None = None, template: Path = template, **answers: str) -> Rendering:
        into = into or tmp_path_factory.mktemp("baked")
        given = [f"{name}={answer}" for name, answer in answers.items()]
        ended = run(*cookiecutter(template, into, home), *words, *given, cwd=home)
        return Rendering(
            ended.returncode, ended.stdout, into / answers.get("service_name", "iris-classifier")
        )

    return render


@pytest.fixture(scope="session")
def bake(render: Render) -> Bake:
    """Renders with `answers` and gives the folder; the same answers give the same folder, so only read it."""
    baked: dict[tuple[tuple[str, str], ...], Path] = {}

    def bake(**answers: str) -> Path:
        key = tuple(sorted(answers.items()))
        if key not in baked:
            rendering = render(**answers)
            assert rendering.status == 0, rendering.said
            baked[key] = rendering.folder
        return baked[key]

    return bake


def contents(folder: Path) -> dict[str, bytes]:
    """Gives every file below `folder`: its path with forward slashes, its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
