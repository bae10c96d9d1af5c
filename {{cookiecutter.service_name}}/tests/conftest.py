"""The real service for tests: started as everywhere else, talked to over HTTP, always ended.

    serving(folder, **settings) -> Service: url, client, log lines -> SIGTERM, or SIGKILL to its group

`folder` is the working folder and gets the log, so that no `.env` and no variable of the developer's counts.
"""

import ctypes
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ROOT / "artifacts"
GUNICORN = ("gunicorn", "--config", str(ROOT / "gunicorn.conf.py"), "app.main:create_app()")
PATIENCE_SECONDS = 60.0  # for what is waited for; only a broken service takes as long
SETOSA = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
VIRGINICA = {"sepal_length": 6.3, "sepal_width": 3.3, "petal_length": 6.0, "petal_width": 2.5}

VERSIONS = sorted(path.parent.name for path in ARTIFACTS.glob("v*/golden.jsonl"))

# No test asserts how long a thing takes: the machine may be busy.
settings.register_profile("service", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("service")

T = TypeVar("T")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def golden_set(version: str) -> list[dict[str, Any]]:
    """Rows with `features`, `label`, `probabilities`, `tolerance`."""
    return [json.loads(line) for line in (ARTIFACTS / version / "golden.jsonl").read_bytes().splitlines()]


def assert_golden(row: dict[str, Any], label: str, probabilities: dict[str, float]) -> None:
    """The answer is the recorded one: the same label, each probability within the row's tolerance."""
    recorded: Any = pytest.approx(row["probabilities"], abs=row["tolerance"], rel=0)
    assert (row["features"], label, probabilities) == (row["features"], row["label"], recorded)


def until(look: Callable[[], T | None], what: str) -> T:
    """What `look` gives as soon as it is something; fails with `what` when it stays nothing for too long."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (found := look()):
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.01)
    return found


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with exactly these `APP_` settings; `workers=1` is APP_WORKERS=1."""
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith("APP_")}
    given = {f"APP_{name.upper()}": str(value) for name, value in settings.items()}
    return {"APP_ARTIFACTS_DIR": str(ARTIFACTS), **own, "PYTHONPATH": str(ROOT), **given}


def run(
    folder: Path, *command: str, stdin: bytes = b"", timeout: float = PATIENCE_SECONDS, **settings: object
) -> subprocess.CompletedProcess[str]:
    """`python -m command...` in `folder`, to its end."""
    pipe = subprocess.PIPE
    process = begin(folder, *command, env=environment(**settings), stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        output, errors = process.communicate(stdin, timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, output.decode(), errors.decode())


def begin(
    folder: Path, *command: str, program: tuple[str, ...] = (sys.executable, "-m"), **options: Any
) -> subprocess.Popen[bytes]:
    """`python -m command...` in a process group of its own that does not outlive this process."""

    def die_with_parent() -> None:
        if LIBC is not None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(
        [*program, *command],
        cwd=folder,
        start_new_session=True,
        preexec_fn=die_with_parent,
        **options,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a process group behind, whatever state it is in."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def refusal(folder: Path, **settings: object) -> str:
    """The one line with which the service, within ten seconds, refuses to start; it says nothing else."""
    done = run(folder, *GUNICORN, stdin=b"", timeout=10, **{"host": "127.0.0.1", "port": 0, **settings})
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    # What the server itself logs comes as JSON lines; a reason found in a worker is one of them.
    reasons = [line["reason"] for line in map(json.loads, done.stdout.splitlines()) if "reason" in line]
    (line,) = {*done.stderr.splitlines(), *reasons}
    return str(line)


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    client: httpx2.Client

    def predict(self, features: Any = SETOSA, **options: Any) -> httpx2.Response:
        """The answer to POST /v1/predict; `content=` sends bytes as they are."""
        body = {} if "content" in options else {"json": features}
        return self.client.post("/v1/predict", **body, **options)

    def lines(self) -> list[dict[str, Any]]:
        """Everything logged so far, each line being one JSON object."""
        return [json.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1]]

    def line(self, request_id: str) -> dict[str, Any]:
        """The log line of one request, once it is there."""
        return until(
            lambda: next((one for one in self.lines() if one.get("request_id") == request_id), None),
            f"the log line of {request_id}",
        )

    def metrics(self) -> dict[str, float]:
        """Every sample of a scrape on a fresh connection, by name and labels as they stand there."""
        text = httpx2.get(f"{self.url}/metrics").text
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def connection(self) -> http.client.HTTPConnection:
        """A connection for requests that are to be sent piece by piece."""
        address = httpx2.URL(self.url)
        return http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE_SECONDS)

    def workers(self) -> list[int]:
        """The process ids of all workers there have been."""
        booted = (re.match(r"Booting worker with pid: (\d+)", str(line["event"])) for line in self.lines())
        return [int(match[1]) for match in booted if match]

    def listening(self) -> bool:
        """Whether a new connection is accepted."""
        connection = self.connection()
        try:
            connection.connect()
        except OSError:
            return False
        connection.close()
        return True

    def half_sent(self, body: bytes) -> http.client.HTTPConnection:
        """A request that is inside, its body still to be sent: the service has said `100 Continue`."""
        connection = self.connection()
        connection.putrequest("POST", "/v1/predict")
        for name, value in {"Content-Length": len(body), "Expect": "100-continue"}.items():
            connection.putheader(name, str(value))
        connection.endheaders()
        assert connection.sock.recv(1024).startswith(b"HTTP/1.1 100 ")
        return connection

    def answers(self, path: str = "/ready") -> bool:
        """Whether GET gives 200; False as long as nobody listens."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client.get(path).status_code == 200
        except httpx2.TransportError:
            return False

    def stop(self) -> int:
        """End it as an orchestrator does; the exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def serving(
    folder: Path, ready: bool = True, app: str = GUNICORN[-1], **settings: object
) -> Iterator[Service]:
    """The service with these settings on a port that the kernel chose, two workers unless said otherwise."""
    log = folder / "service.log"
    variables = environment(**{"host": "127.0.0.1", "port": 0, "workers": 2, **settings})
    with log.open("wb") as output:
        process = begin(folder, *GUNICORN[:-1], app, env=variables, stdout=output, stderr=subprocess.STDOUT)

    def address() -> str | None:
        assert process.poll() is None, log.read_text()
        found = re.search(r"Listening at: (http://[][0-9a-f.:]+)", log.read_text())
        return found and found[1]

    try:
        url = until(address, "the address")
        with httpx2.Client(base_url=url, timeout=PATIENCE_SECONDS) as client:
            service = Service(process, log, url, client)
            if ready:
                until(service.answers, "/ready")
            yield service
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
        end(process)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service as it comes, shared by tests that only ask."""
    with serving(tmp_path_factory.mktemp("service")) as one:
        yield one


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`start(**settings)`: a service of one's own."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(tmp_path, **settings))
