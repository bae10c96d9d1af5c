"""The image: built with and without BuildKit, run as nobody in particular, without rights, ended in order."""

import http.client
import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import Bake, run

pytestmark = pytest.mark.image

PATIENCE_SECONDS = 120.0  # for what is waited for; only a broken image takes as long
NOBODY = "54321"  # a user and a group that the image does not know
FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


class BuildError(Exception):
    """There is no image; the message is what the builder said."""


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
def build(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """`build(folder)`: the image of what is there, by either builder; gives its name."""
    able = [client for client in clients() if request.param == "0" or speaks_buildkit(client)]
    assert able, "no docker client here speaks BuildKit: install its buildx plugin"
    tags: list[str] = []

    def build(folder: Path) -> str:
        tag = f"iris-classifier-test:{request.param}-{os.getpid()}-{len(tags)}"
        built = run(
            able[0], "build", "--force-rm", "--tag", tag, ".", cwd=folder, DOCKER_BUILDKIT=request.param
        )
        if built.returncode:
            raise BuildError(built.stdout)
        tags.append(tag)
        return tag

    yield build
    run("docker", "rmi", "--force", *tags, cwd=Path.cwd())


@pytest.fixture(scope="module")
def image(build: Callable[[Path], str], bake: Bake) -> str:
    """The image of the service as it is rendered."""
    return build(bake())


def docker(*words: str) -> str:
    """Runs a docker command that must work and gives what it printed."""
    ended = run("docker", *words, cwd=Path.cwd())
    assert ended.returncode == 0, ended.stdout
    return ended.stdout.strip()


@contextmanager
def running(image: str, *options: str) -> Iterator[str]:
    """A healthy container with a read-only root, no rights and an unknown user; its port on loopback only."""
    limits = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]  # noqa: S108  # in the container
    user = ["--user", f"{NOBODY}:{NOBODY}"]
    name = docker("run", "--detach", *limits, *user, "--publish", "127.0.0.1::8000", *options, image)
    try:
        health = "{{.State.Health.Status}}"
        wait_for(lambda: docker("inspect", "--format", health, name) != "starting", name, "its health check")
        assert docker("inspect", "--format", health, name) == "healthy", docker("logs", name)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def wait_for(look: Callable[[], bool], container: str, what: str) -> None:
    """Returns as soon as `look` gives true; fails, showing the container's log, when it takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not look():
        assert time.monotonic() < deadline, f"waited in vain for {what}: {docker('logs', container)}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    """A running container for tests that only ask."""
    with running(image) as name:
        yield name


@pytest.fixture
def start(image: str) -> Iterator[Callable[..., str]]:
    """`start(*options)`: a running container of one's own."""
    with ExitStack() as stack:
        yield lambda *options: stack.enter_context(running(image, *options))


def address(container: str) -> str:
    """Host and port under which the container is reached."""
    return docker("port", container, "8000/tcp")


def predict(container: str) -> dict[str, str]:
    """The answer to a request for a prediction."""
    request = urllib.request.Request(
        f"http://{address(container)}/v1/predict",
        json.dumps(FLOWER).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, str] = json.load(response)
    return answer


def half_sent(container: str) -> http.client.HTTPConnection:
    """A request that is inside, its body still to be sent: the service has said `100 Continue`."""
    connection = http.client.HTTPConnection(address(container), timeout=PATIENCE_SECONDS)
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", str(len(json.dumps(FLOWER))))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    assert connection.sock.recv(1024).startswith(b"HTTP/1.1 100 ")
    return connection


def found(image: str, *conditions: str) -> list[str]:
    """What `find` finds in the image's own file system, looking as a user that the image does not know."""
    search = ["find", "/", "-xdev", *conditions, "-print"]
    # It complains about folders that this user may not enter: what is in them is out of reach as well.
    ended = run("docker", "run", "--rm", "--user", f"{NOBODY}:{NOBODY}", image, *search, cwd=Path.cwd())
    return [line for line in ended.stdout.splitlines() if line.startswith("/")]


def test_container_predicts(container: str) -> None:
    """The container becomes healthy and predicts, without rights, on a read-only root, as an unknown user."""
    assert predict(container)["label"] == "setosa"
    status = docker("exec", container, "cat", "/proc/1/status")
    rights = dict(line.split(":", 1) for line in status.splitlines())
    assert rights["Uid"].split() == [NOBODY] * 4
    assert {int(rights[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}
    assert rights["NoNewPrivs"].strip() == "1"


def test_image_runs_as_no_privileged_user(image: str) -> None:
    """Without being told a user, the container runs as a number that is not root's."""
    assert docker("inspect", "--format", "{{.Config.User}}", image) == "10001:10001"


def test_container_answers_what_it_took_when_told_to_stop(start: Callable[..., str]) -> None:
    """After SIGTERM a request that is half inside is answered, then the container ends with exit code 0."""
    container = start()
    connection = half_sent(container)
    docker("kill", "--signal", "TERM", container)
    wait_for(lambda: "Handling signal: term" in docker("logs", container), container, "the signal to arrive")
    connection.send(json.dumps(FLOWER).encode())
    with connection.getresponse() as response:
        assert (response.status, json.load(response)["label"]) == (200, "setosa")
    connection.close()
    assert docker("wait", container) == "0"


def test_container_stops_without_being_killed(start: Callable[..., str]) -> None:
    """A request that never arrives whole does not keep the container: it ends by itself, with exit code 0."""
    container = start()
    with half_sent(container).sock:
        docker("stop", "--time", f"{PATIENCE_SECONDS:.0f}", container)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", container) == "0"


def test_container_reaps_orphans(container: str) -> None:
    """A process that lost its parent ends for good in the container, and its exit code harms no worker."""
    # 3 is what a worker of gunicorn ends with when it cannot start, which would end all of gunicorn.
    leave = "mkfifo /tmp/told; (read line </tmp/told; exit 3) >/dev/null 2>&1 & echo $!"
    orphan = docker("exec", container, "sh", "-c", leave)
    assert docker("exec", container, "grep", "PPid", f"/proc/{orphan}/status").split() == ["PPid:", "1"]
    docker("exec", container, "sh", "-c", "echo >/tmp/told")
    gone = ["docker", "exec", container, "test", "!", "-e", f"/proc/{orphan}"]
    wait_for(lambda: not run(*gone, cwd=Path.cwd()).returncode, container, "the orphan to be reaped")
    assert predict(container)["label"] == "setosa"


def test_container_serves_the_version_it_was_built_with(container: str) -> None:
    """The model is in the image: it takes no volume and no network to serve it."""
    assert predict(container)["model_version"] == "v1"


def test_container_serves_a_mounted_version(start: Callable[..., str], bake: Bake, tmp_path: Path) -> None:
    """A folder mounted at APP_ARTIFACTS_DIR takes the place of the model in the image."""
    mounted = shutil.copytree(bake() / "artifacts", tmp_path / "artifacts")
    release = mounted / "release.json"
    release.write_text(json.dumps({"serving": "v0", "previous": None}), encoding="utf-8")
    for path in (mounted, *mounted.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    container = start("--volume", f"{mounted}:/models:ro", "--env", "APP_ARTIFACTS_DIR=/models")
    assert predict(container)["model_version"] == "v0"


LOOK_AROUND = """
import json, subprocess, sys
from shutil import which
MODULES = "sklearn pytest lifecycle tests pip ensurepip setuptools wheel".split()
find = f"from importlib.util import find_spec; print([name for name in {MODULES} if find_spec(name)])"
for python in (sys.executable, sys._base_executable):
    print(subprocess.check_output([python, "-c", find], text=True).strip())
TOOLS = "cc c99 gcc g++ clang tcc ld as make cmake rustc go pip pip3 uv git curl wget ssh".split()
print([tool for tool in TOOLS if which(tool)])
"""


def test_image_holds_no_development_tools(image: str) -> None:
    """The image holds what serves and nothing else: no compiler, no pip, no scikit-learn, no tests."""
    printed = docker("run", "--rm", image, "python", "-c", LOOK_AROUND)
    assert printed.splitlines() == ["[]", "[]", "[]"]


def test_image_lends_no_rights(image: str) -> None:
    """No file of the image runs with the rights of its owner or its group."""
    assert found(image, "-type", "f", "-perm", "/6000") == []


def test_image_cannot_be_changed_from_inside(image: str) -> None:
    """The service's user can write to /tmp and nowhere else, also where the root is not read-only."""
    assert found(image, "!", "-type", "l", "-writable") == ["/tmp"]  # noqa: S108  # in the container


def test_image_installs_what_is_locked(image: str, bake: Bake) -> None:
    """The image holds the very releases of the lock, checked by their hashes, and no other package."""
    program = (
        "from importlib.metadata import distributions\n"
        "for one in distributions(): print(f'{one.name.lower()}=={one.version}'.replace('_', '-'))"
    )
    installed = docker("run", "--rm", image, "python", "-c", program).splitlines()
    lock = (bake() / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    assert set(installed) <= {line.split()[0] for line in lock.splitlines() if "==" in line}
    assert len(installed) > 20


def test_second_build_takes_the_packages_from_the_cache(
    build: Callable[[Path], str], image: str, bake: Bake, tmp_path: Path
) -> None:
    """Building again changes nothing, and after a change to the code only the code."""
    service = shutil.copytree(bake(), tmp_path / "service")
    assert layers(build(service)) == layers(image)
    with (service / "app" / "main.py").open("a", encoding="utf-8") as code:
        code.write("# changed\n")
    changed = [one != other for one, other in zip(layers(image), layers(build(service)), strict=True)]
    # The last layers are: packages, configuration, code, artifacts.
    assert changed[:-2] == [False] * (len(changed) - 2)
    assert changed[-2]


def layers(image: str) -> list[str]:
    """The digests of an image's layers; one that was made anew has another, if only for its times."""
    digests: list[str] = json.loads(docker("inspect", "--format", "{{json .RootFS.Layers}}", image))
    return digests


def test_other_bytes_than_locked_stop_the_build(
    build: Callable[[Path], str], bake: Bake, tmp_path: Path
) -> None:
    """A package whose bytes are not those of the lock is not installed: there is no image."""
    service = shutil.copytree(bake(), tmp_path / "service")
    lock = service / "requirements" / "runtime.txt"
    others = re.sub(r"sha256:\w+", f"sha256:{0:064}", lock.read_text(encoding="utf-8"))
    lock.write_text(others, encoding="utf-8")
    with pytest.raises(BuildError, match="DO NOT MATCH THE HASHES"):
        build(service)
