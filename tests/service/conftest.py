"""The real service for tests: started as everywhere else, talked to over HTTP, always ended.

    serving(folder, **settings) -> Service: url, client, log lines -> SIGTERM, or SIGKILL to its group

`folder` is the working folder and gets the log, so that no `.env` and no variable of the developer's counts.
"""

import ctypes
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
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

from app.core.store import Input
from app.schemas.contract import served_contract_sha256
from app.schemas.predict import Features, Prediction
from tests.service import reliability
from tests.service.gameday.trial import make_trial, number_of
from tests.service.where import ROOT

ARTIFACTS = ROOT / "artifacts"
GUNICORN = ("gunicorn", "--config", str(ROOT / "gunicorn.conf.py"), "app.main:create_app()")
PATIENCE_SECONDS = 60.0  # for what is waited for; only a broken service takes as long

# No test asserts how long a thing takes: the machine may be busy.
# No database of examples: it would be written into the service's folder.
settings.register_profile(
    "service", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("service")

OF_OTHERS = "needs a library of other models, which the services with imported models bring"
# Reasons for which a test may be skipped; any other fails the run, so that no case is lost unseen.
MAY_BE_SKIPPED = {
    "no feature may be null",
    "no feature of this contract is a number",
    "a regressor has no labels",
    "a regressor has no score",
    "another model was imported; these are of the demo's",
    OF_OTHERS,
}
INSTALLED = "is not installed"  # how the reason ends where a program is missing; in CI such tests fail

FOUND = pytest.StashKey[set[str]]()  # files of the service before the tests

Document = dict[str, Any]
T = TypeVar("T")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def of_others(library: str) -> Any:
    """A library that models other than the template's need; without it, the test is skipped."""
    return pytest.importorskip(library, reason=OF_OTHERS)


def golden_set(version: str, artifacts: Path = ARTIFACTS) -> list[Document]:
    """Rows with `features`, `tolerance`, and `label` and `probabilities`, or a regressor's `value`."""
    return [json.loads(line) for line in (artifacts / version / "golden.jsonl").read_bytes().splitlines()]


def _manifest(version: str) -> Document:
    document: Document = json.loads((ARTIFACTS / version / "manifest.json").read_bytes())
    return document


# What the contract and the served version give the tests, so that these hold for whatever model is served.
SERVED: str = json.loads((ARTIFACTS / "release.json").read_bytes())["serving"]
MANIFEST = _manifest(SERVED)
INPUTS: dict[str, Document] = {one["name"]: one for one in MANIFEST["inputs"]}
LABELS: list[Any] = MANIFEST["outputs"]["labels"]  # none: a regressor
VERSIONS = sorted(  # those of this contract; others are of one before
    path.parent.name
    for path in ARTIFACTS.glob("v*/golden.jsonl")
    if _manifest(path.parent.name)["contract_sha256"] == served_contract_sha256()
)


def spelled(label: Any) -> str:
    """A label as a key in JSON and in metrics: itself, or as JSON has it."""
    return label if isinstance(label, str) else json.dumps(label)


# Whether it is the model that comes with the template; some tests know more of that one.
DEMO = list(INPUTS) == ["sepal_length", "sepal_width", "petal_length", "petal_width"] and "setosa" in LABELS


def answer_of(one: Document) -> Any:
    """The label, or a regressor's value, of an answer or a golden row."""
    return one["label"] if LABELS else one["value"]


def _sure(row: Document) -> bool:
    """Whether nothing speaks for a review: the score is high enough, every value was seen in training."""
    seen = [
        low <= row["features"][name] <= high
        for name, one in INPUTS.items()
        if row["features"][name] is not None
        for low, high in [one["training_range"] or (-math.inf, math.inf)]
        if one["training_range"]
    ]
    threshold = MANIFEST["outputs"]["review_threshold"]
    return all(seen) and (not LABELS or max(row["probabilities"].values()) >= threshold)


_EXAMPLES: list[Document] = Features.model_json_schema()["examples"]
_SURE = sorted(
    [row for row in golden_set(SERVED) if _sure(row)] or golden_set(SERVED),
    key=lambda row: (*_EXAMPLES, row["features"]).index(row["features"]),
)
_FIRST = _SURE[0]
_LAST = next((row for row in _SURE if answer_of(row) != answer_of(_FIRST)), _SURE[-1])
# Two complete instances with different answers, neither for review; and what the model says of them.
EXAMPLE: Document = _FIRST["features"]
OTHER: Document = _LAST["features"]
ANSWER, OTHER_ANSWER = answer_of(_FIRST), answer_of(_LAST)
# A feature that is a number with a range to it: tests that need one are skipped where there is none.
_FEATURE = number_of([Input.model_validate(one) for one in MANIFEST["inputs"]])
NUMBER = _FEATURE.name if _FEATURE else ""
WITH_NUMBER = pytest.mark.skipif(not NUMBER, reason="no feature of this contract is a number")
FIELD = NUMBER or next(iter(INPUTS))


def without(name: str, row: Document = EXAMPLE) -> Document:
    """An instance that lacks a feature."""
    return {key: value for key, value in row.items() if key != name}


def wrong(text: str = "long") -> Any:
    """What `FIELD` cannot be, with this text in it."""
    one = INPUTS[FIELD]
    return [text] if one["dtype"] == "string" and not one["categories"] else text


def number(share: float, name: str = NUMBER) -> float:
    """A value of a feature: 0 is the least that training saw, 1 the most; within hard bounds."""
    one = INPUTS[name]
    low, high = map(float, one["training_range"])
    bounds = (-math.inf if one["minimum"] is None else one["minimum"],
              math.inf if one["maximum"] is None else one["maximum"])  # fmt: skip
    value = min(max(low + share * (high - low), bounds[0]), bounds[1])
    return value if one["dtype"] == "float64" else (math.ceil if share > 1 else math.floor)(value)


def varied(count: int) -> list[Document]:
    """That many instances, all in the range seen in training, and different where a feature is a float."""
    floats = [name for name, one in INPUTS.items() if one["dtype"] == "float64" and one["training_range"]]

    def row(step: float) -> Document:
        # Every other feature runs the other way.
        return EXAMPLE | {name: number(abs(at % 2 - step), name) for at, name in enumerate(floats)}

    return [row(step / max(count - 1, 1)) for step in range(count)]


def recorded(features: Document, version: str = SERVED, artifacts: Path = ARTIFACTS) -> Document:
    """The golden row of an instance."""
    return next(row for row in golden_set(version, artifacts) if row["features"] == features)


def assert_golden(row: Document, answer: Document) -> None:
    """The answer is the recorded one: the same label, each probability or the value within the tolerance."""
    expected = {"features": row["features"]}
    for key in ("label", "probabilities", "value"):
        if key in row:
            expected[key] = row[key] if key == "label" else about(row[key], row["tolerance"])
    assert {**{key: answer.get(key) for key in expected}, "features": row["features"]} == expected


def about(value: Any, tolerance: float) -> Any:
    """What equals a number, or each of several by name, within an absolute tolerance."""
    return pytest.approx(value, abs=tolerance, rel=0)


def assert_answers(
    answer: Document, features: Document = EXAMPLE, version: str = "", artifacts: Path = ARTIFACTS
) -> None:
    """The answer, a document, is what is on record for the instance."""
    assert_golden(recorded(features, version or SERVED, artifacts), answer)


def copied_artifacts(folder: Path) -> Path:
    """A copy to change: whatever version serves is v1 in it, with a model.onnx, and the version before v0."""
    root = folder / "artifacts"
    for version, name in ((SERVED, "v1"), ("v0", "v0")):
        shutil.copytree(ARTIFACTS / version, root / name)
    if SERVED != "v1":
        document = (root / "v1" / "manifest.json").read_text("utf-8")
        (root / "v1" / "manifest.json").write_text(
            document.replace(f'"version": "{SERVED}"', '"version": "v1"')
        )
    if not (root / "v1" / "model.onnx").exists():
        make_trial(root / "v1")
    release = json.loads((ARTIFACTS / "release.json").read_bytes()) | {"serving": "v1", "previous": "v0"}
    (root / "release.json").write_text(json.dumps(release))
    return root


def prediction(answer: Any, score: float = 0.9, action: str = "accept") -> Prediction:
    """An answer as the pipeline makes it."""
    make: Any = Prediction  # whose fields depend on the task
    given: tuple[Any, ...] = (answer, score, {}, action) if LABELS else (answer, action)
    made: Prediction = make("", "v1", *given)
    return made


# A number without a maximum may be larger than the model can take, which is 422, or can calculate with, which
# is 500 `non_finite_output`, as the contract says. So generated numbers are moderate there.
UNBOUNDED = any(
    one["dtype"] in ("float64", "int64") and one.get("maximum") is None for one in INPUTS.values()
)
MODERATE = """
import schemathesis

def moderate(value):
    if isinstance(value, dict):
        return {key: moderate(one) for key, one in value.items()}
    if isinstance(value, list):
        return [moderate(one) for one in value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value)(value % 1000) if number and abs(value) > 1000 else value

@schemathesis.hook
def map_body(context, body):
    return moderate(body)
"""


def moderate_numbers(folder: Path) -> dict[str, str]:
    """The environment in which Schemathesis sends moderate numbers, if this contract needs it."""
    (folder / "moderate.py").write_text(MODERATE if UNBOUNDED else "", "utf-8")
    return os.environ | {"SCHEMATHESIS_HOOKS": "moderate", "PYTHONPATH": str(folder)}


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

    def predict(self, features: Any = EXAMPLE, **options: Any) -> httpx2.Response:
        """The answer to POST /v1/predict; `content=` sends bytes as they are."""
        body = {} if "content" in options else {"json": features}
        return self.client.post("/v1/predict", **body, **options)

    def lines(self) -> list[dict[str, Any]]:
        """Everything logged so far, each line being one JSON object."""
        return [json.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1]]

    def kill(self, pid: int) -> None:
        """Kill a worker, once every worker's word that it is ready is written: a thread does that."""
        until(
            lambda: [one["event"] for one in self.lines()].count("ready") == len(self.workers()), "all words"
        )
        os.kill(pid, signal.SIGKILL)

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


def pipelined(url: str, requests: int) -> None:
    """That many GET /health over one connection, each answered."""
    address, size = httpx2.URL(url), 50
    with socket.create_connection((address.host, address.port), PATIENCE_SECONDS) as connection:
        for _ in range(0, requests, size):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n" * size)
            seen = b""
            while seen.count(b'{"status":"ok"}') < size:
                seen += connection.recv(65_536)


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


@pytest.fixture(scope="session", autouse=True)
def _in_the_folder() -> None:
    """Commands of the service take its folder as their working folder.

    Not before tests run: the workers of xdist are given paths relative to the first working folder.
    """
    os.chdir(ROOT)


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


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Adds the plugin that gathers what faults did; registered here, xdist's main process has it too."""
    pluginmanager.register(reliability)


def pytest_configure(config: pytest.Config) -> None:
    """Remembers the files of the service: tests work on copies."""
    config.stash[FOUND] = files_of_the_service()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when a test left a file in the service, or was skipped for a reason not on the list."""
    config = session.config
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # in a worker of xdist
        return
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", ())}
    unknown = {one for one in reasons if INSTALLED not in one} - MAY_BE_SKIPPED
    left = config.stash[FOUND] ^ files_of_the_service()
    for complaint, found in (
        ("skipped for a reason that is not listed", unknown),
        ("added or removed", left),
    ):
        if found:
            reporter.write_line(f"\n{complaint}: {sorted(found)}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def files_of_the_service() -> set[str]:
    """The files in the service's folder that git would track."""
    ignored = re.findall(r"^([\w./*]+)$", (ROOT / ".gitignore").read_text("utf-8"), re.MULTILINE)
    left_out = shutil.ignore_patterns(".git", *(one.removesuffix("/") for one in ignored))
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(set(folders) - left_out(folder, folders))
        found |= {str(Path(folder, file)) for file in set(files) - left_out(folder, files)}
    return found
