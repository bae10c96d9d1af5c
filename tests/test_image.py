"""The image: built with and without BuildKit, run without rights, watched by its own health check."""

import json
import os
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Bake, run

pytestmark = pytest.mark.image

START_SECONDS = 120
FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


def clients() -> list[str]:
    """Gives every `docker` on the PATH; a machine may have one with BuildKit built in and one without."""
    folders = os.environ["PATH"].split(os.pathsep)
    found = [shutil.which("docker", path=folder) for folder in folders]
    return list(dict.fromkeys(client for client in found if client))


def speaks_buildkit(client: str) -> bool:
    """Whether the client brings BuildKit: built in until version 23, later in the buildx plugin."""
    version = run(client, "version", "--format", "{{.Client.Version}}", cwd=Path.cwd()).stdout
    return int(version.split(".")[0]) < 23 or run(client, "buildx", "version", cwd=Path.cwd()).returncode == 0


@pytest.fixture(scope="module", params=["0", "1"], ids=["classic", "buildkit"])
def image(request: pytest.FixtureRequest, bake: Bake) -> Iterator[str]:
    """The image, built by either builder."""
    tag = f"iris-classifier-test:{request.param}-{os.getpid()}"
    able = [client for client in clients() if request.param == "0" or speaks_buildkit(client)]
    assert able, "no docker client here speaks BuildKit: install its buildx plugin"
    build = run(able[0], "build", "--tag", tag, ".", cwd=bake(), DOCKER_BUILDKIT=request.param)
    assert build.returncode == 0, build.stdout
    yield tag
    run("docker", "rmi", "--force", tag, cwd=Path.cwd())


def docker(*words: str) -> str:
    """Runs a docker command that must work and gives what it printed."""
    ended = run("docker", *words, cwd=Path.cwd())
    assert ended.returncode == 0, ended.stdout
    return ended.stdout.strip()


@pytest.fixture
def container(image: str) -> Iterator[str]:
    """A running container with a read-only root and no rights, its port open on loopback only."""
    limits = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]  # noqa: S108  # in the container
    name = docker("run", "--detach", *limits, "--publish", "127.0.0.1::8000", image)
    yield name
    docker("rm", "--force", "--volumes", name)


def wait_until_healthy(container: str) -> None:
    """Returns when the image's own health check passed."""
    deadline = time.monotonic() + START_SECONDS
    state = ""
    while time.monotonic() < deadline and state in ("", "starting"):
        state = docker("inspect", "--format", "{{.State.Health.Status}}", container)
        time.sleep(0.2)
    assert state == "healthy", docker("logs", container)


def test_container_predicts(container: str) -> None:
    """The container becomes healthy and predicts, as a user without rights on a read-only root."""
    wait_until_healthy(container)
    address = docker("port", container, "8000/tcp")
    body = json.dumps(FLOWER).encode()
    request = urllib.request.Request(
        f"http://{address}/v1/predict", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        assert json.load(response)["label"] == "setosa"
    assert docker("exec", container, "id", "-u") == "10001"


def test_container_stops_when_told(container: str) -> None:
    """`docker stop` ends the service in order, long before it would be killed."""
    wait_until_healthy(container)
    docker("stop", "--time", "60", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"


def test_image_holds_no_development_tools(image: str) -> None:
    """The image holds what serves and nothing else: no scikit-learn, no tests, no lifecycle code."""
    program = (
        "from importlib.util import find_spec\n"
        "print([name for name in ('sklearn', 'pytest', 'lifecycle', 'tests') if find_spec(name)])"
    )
    assert docker("run", "--rm", image, "python", "-c", program) == "[]"


def test_dockerfile_passes_its_linter(bake: Bake) -> None:
    """Hadolint has nothing to say about the Dockerfile."""
    lint = run(
        "hadolint",
        "Dockerfile",
        cwd=bake(),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    assert lint.returncode == 0, lint.stdout
