"""Where and how people run it: their platforms, terminals, disks and mistakes, with real servers.

Nothing lasting is done to what is not the service's own, nothing is deleted that it did not make, and the end
of a worker or of the log is the end of nothing else.
"""

import errno
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.rollout.fleet import read_usable
from app.settings import Settings, SettingsError, load_settings
from server.fleet import ForkingFleet, check_address
from tests.service.conftest import (
    ARTIFACTS,
    EXAMPLE,
    GUNICORN,
    PATIENCE_SECONDS,
    Service,
    begin,
    end,
    environment,
    refusal,
    run,
    until,
)

Start = Callable[..., Service]
KEY = "a key"
HASH = sha256(KEY.encode()).hexdigest()
PREDICTIONS = re.compile(r"predictions_total\{")


def events(service: Service, text: str) -> list[str]:
    """The events in the log that have this in them."""
    return [str(line["event"]) for line in service.lines() if text in str(line["event"])]


def ready(service: Service) -> int:
    """How many workers have become ready so far."""
    return len([line for line in service.lines() if line["event"] == "ready"])


def reload(service: Service, workers: int = 2) -> None:
    """SIGHUP, until as many workers more are ready and the others have gone."""
    before = ready(service)
    stopped = len(events(service, "stopped"))
    service.process.send_signal(signal.SIGHUP)
    until(lambda: ready(service) >= before + workers, "successors")
    until(lambda: len(events(service, "stopped")) >= stopped + workers, "the end of those before")


def predictions(service: Service) -> float:
    """How many predictions the metrics of all workers tell of."""
    return sum(value for name, value in service.metrics().items() if PREDICTIONS.match(name))


# ---- what the platform gives


def test_a_folder_of_the_platform_is_left_alone(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in PROMETHEUS_MULTIPROC_DIR is neither written to nor removed, with metrics on or off."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "counter_1.db").write_text("not ours")
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        monkeypatch.setenv(name, str(theirs))
    for enabled in ("false", "true"):
        service = start(workers=1, metrics_enabled=enabled)
        assert service.predict().status_code == 200
        assert service.client.get("/metrics").status_code == (200 if enabled == "true" else 404)
        assert service.stop() == 0
        assert [path.name for path in theirs.iterdir()] == ["counter_1.db"]
        assert (theirs / "counter_1.db").read_text() == "not ours"


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "no folder"])
def test_without_a_master_the_folder_of_the_platform_is_left_alone(tmp_path: Path, there: bool) -> None:
    """Under uvicorn itself a single process counts for itself, whatever PROMETHEUS_MULTIPROC_DIR says."""
    theirs = tmp_path / "theirs"
    if there:
        theirs.mkdir()
        (theirs / "counter_1.db").write_text("not ours")
    names = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
    variables = environment() | dict.fromkeys(names, str(theirs))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    words = ("uvicorn", "--factory", "app.main:create_app", "--port", str(port))
    with (tmp_path / "log").open("wb") as log:
        process = begin(tmp_path, *words, env=variables, stdout=log, stderr=subprocess.STDOUT)

    def scraped() -> str | None:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with suppress(httpx2.TransportError):
            if client.get("/ready").status_code == 200:
                return client.get("/metrics").text
        return None

    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:
            until(scraped, "/metrics")
            assert client.post("/v1/predict", json=EXAMPLE).status_code == 200
            until(lambda: PREDICTIONS.search(scraped() or ""), "the prediction in the metrics")
    finally:
        end(process)
    assert [path.name for path in theirs.glob("*")] == (["counter_1.db"] if there else [])


def test_variables_of_kubernetes_are_left_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What Kubernetes injects for Services named app, app-redis and app-metrics is nobody's setting."""
    for service, port in (("APP", 8000), ("APP_REDIS", 6379), ("APP_METRICS", 9090)):
        for name, value in {
            "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": port, "SERVICE_PORT_HTTP": port,
            "PORT": f"tcp://10.0.0.1:{port}", f"PORT_{port}_TCP": f"tcp://10.0.0.1:{port}",
            f"PORT_{port}_TCP_PROTO": "tcp", f"PORT_{port}_TCP_PORT": port,
            f"PORT_{port}_TCP_ADDR": "10.0.0.1",
        }.items():  # fmt: skip
            monkeypatch.setitem(os.environ, f"{service}_{name}", str(value))
    given = {name: value for name, value in os.environ.items() if name.startswith("APP_")}
    variables = environment(host="127.0.0.1", workers=1) | given
    config = begin(tmp_path, "app", "config", env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = config.communicate(timeout=PATIENCE_SECONDS)
    assert errors == b""
    assert json.loads(output)["APP_PORT"] == 8000


def test_a_setting_like_those_of_kubernetes_is_refused(tmp_path: Path) -> None:
    """A misspelt port is not taken for one of Kubernetes' variables."""
    assert "APP_REDIS_PORT" in refusal(tmp_path, redis_port=6379)


@pytest.mark.parametrize(
    "arguments",
    ["-k sync", "--worker-class gevent", "--bind 127.0.0.1:0", "--max-requests 9", "--graceful-timeout 1",
     "--preload", "--keep-alive 1", "--threads 4", "--reuse-port", "--env APP_PORT=1", "--daemon"],
)  # fmt: skip
def test_what_the_service_relies_on_is_not_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """Arguments of gunicorn that would undo limits, quotas or drain are refused in one line."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", arguments)
    assert "GUNICORN_CMD_ARGS" in refusal(tmp_path, workers=1)


def test_harmless_arguments_are_taken(start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process id file, a name, a backlog and a timeout are the operator's."""
    monkeypatch.setenv(
        "GUNICORN_CMD_ARGS",
        f"--pid {tmp_path}/pid --access-logfile - --error-logfile - --name iris --backlog 100 --timeout 90",
    )
    assert start(workers=1).predict().status_code == 200
    assert (tmp_path / "pid").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"host": "unix:/run/service.sock"}, "APP_HOST"),
        ({"host": "127.0.0.1:8000"}, "APP_HOST"),
        ({"host": "192.0.2.1"}, "APP_HOST"),
        ({"host": "nowhere.invalid"}, "APP_HOST"),
        ({"cors_origins": "https://shop.example/"}, "https://shop.example"),
        ({"api_keys": ","}, "APP_API_KEYS"),
        ({"root_path": "/iris/"}, "APP_ROOT_PATH"),
        ({"rate_limit": "600 per minute"}, "600/minute"),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_write(tmp_path: Path, settings: dict[str, object], named: str) -> None:
    """One line names the variable and what to write, without a regular expression."""
    line = refusal(tmp_path, workers=1, **settings)
    assert named in line
    assert len(line) <= 300
    assert "^" not in line


def test_a_port_in_use_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, without trying for seconds; whoever has the port goes on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        line = refusal(tmp_path, workers=1, port=port)
    assert list(tmp_path.iterdir()) == []
    assert "APP_PORT" in line
    assert "in use" in line


# Where the kernel lets only root listen; in a container it may be nowhere.
RESERVED = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


def test_a_port_that_needs_rights_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names APP_PORT, to a user who may not listen at port 80."""

    class Refusing(socket.socket):
        def bind(self, address: Any) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", Refusing)
        with pytest.raises(SettingsError, match=r"Permission denied.*: change APP_PORT") as refused:
            check_address("127.0.0.1", 80)
    assert "port 80" in str(refused.value)
    if RESERVED <= 80:
        return
    rights = ("setpriv", "--bounding-set=-net_bind_service") if os.geteuid() == 0 else ()
    process = begin(
        tmp_path, *GUNICORN, program=(*rights, sys.executable, "-m"), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, env=environment(host="127.0.0.1", port=80, workers=1),
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        end(process)
    assert process.returncode != 0
    (line,) = said.decode().splitlines()
    assert "port 80 ([Errno 13] Permission denied): change APP_PORT" in line


def test_lines_are_json_unless_said_otherwise(tmp_path: Path) -> None:
    """On a terminal too: whoever reads the log of a container that has one gets what was promised."""
    ours, theirs = pty.openpty()
    with closing(os.fdopen(ours, "rb", buffering=0)) as terminal:
        process = begin(tmp_path, "app", "config", env=environment(), stdout=theirs, stderr=theirs)
        os.close(theirs)
        said = b""
        with suppress(OSError):  # so Linux says that the other end is closed
            while part := terminal.read(4096):
                said += part
        end(process)
    assert json.loads(said)["APP_LOG_FORMAT"] == "json"


def test_small_letters_will_do(tmp_path: Path) -> None:
    """Levels and choices may be written in small letters or capitals."""
    done = run(tmp_path, "app", "config", log_level="info", env="Local", log_format="JSON")
    config = json.loads(done.stdout)
    assert [config[f"APP_{name}"] for name in ("LOG_LEVEL", "ENV", "LOG_FORMAT")] == ["INFO", "local", "json"]


# ---- .env


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings in a folder, as `python -m app` and gunicorn.conf.py read them."""
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.upper().startswith("APP_")]:
        monkeypatch.delenv(name)
    return load_settings()


@pytest.mark.parametrize(
    "content",
    [
        f'APP_API_KEYS="{HASH}\n',
        f"APP_API_KEYS='{HASH}\nAPP_PORT='\n",
        f"APP_API_KEYS: {HASH}\n",
        f"APP_API_KEYS {HASH}\n",
        f"APP_API_KEYS:{HASH}\n",
        f"APP-API-KEYS={HASH}\n",
        f"PP_API_KEYS={HASH}\n",
        f"API_KEYS={HASH}\n",
        f"APP_API_KEYS={HASH}\nAPP_API_KEYS=\n",
        "APP_API_KEYS=${NOT_SET_ANYWHERE}\n",
        f'FOO="bar\nAPP_API_KEYS={HASH}\n# a comment with a "\n',
        f"# caf\xe9\nAPP_API_KEYS={HASH}\n".encode("latin-1"),
        f"APP_API_KEYS={HASH}\n".encode("utf-16"),
        f"APP_API_KEYS={HASH}\n".encode("utf-16-le"),
        f"APP_API_KEYS\0={HASH}\n".encode(),
        f"# a comment\u2028APP_API_KEYS={HASH}\n".encode(),
        None,
    ],
    ids=repr,
)
def test_a_file_that_cannot_be_read_never_opens_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes | None
) -> None:
    """Every line of `.env` is read or stops the start in one line, which shows no value; so does a folder."""
    place = tmp_path / ".env"
    if content is None:
        place.mkdir()  # as Docker makes it where a file to mount is missing
    else:
        place.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SettingsError) as raised:
        alone(tmp_path, monkeypatch)
    (line,) = str(raised.value).splitlines()
    assert ".env" in line or "APP_API_KEYS" in line
    assert HASH not in line
    assert len(line) <= 300


@pytest.mark.parametrize(
    "content",
    [
        f"export APP_API_KEYS={HASH}\n",
        f"\ufeffAPP_API_KEYS = '{HASH}'  # ours\r\n",
        f'OTHER="two\nlines"\nAPP_API_KEYS={HASH}\rLOG_LEVEL=other\n',
        f"HASH={HASH}\nAPP_API_KEYS=${{HASH}}\n",
    ],
    ids=repr,
)
def test_what_people_write_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """Quotes, comments, exports, other programs' variables, any line end: the key counts."""
    (tmp_path / ".env").write_bytes(content.encode())
    assert [key.get_secret_value() for key in alone(tmp_path, monkeypatch).api_keys] == [HASH]


def test_a_reload_takes_a_setting_or_says_why_not(start: Start, tmp_path: Path) -> None:
    """SIGHUP takes version, workers, limits; what it cannot take is named; it never opens the service."""
    env, headers = tmp_path / ".env", {"x-api-key": KEY}
    env.write_text(f"APP_API_KEYS={HASH}\n")
    service = start(workers=2)
    contents: dict[str | bytes, str] = {
        "": "APP_API_KEYS",
        f'APP_API_KEYS="{HASH}\n': "line 1",
        f"# caf\xe9\nAPP_API_KEYS={HASH}\n".encode("latin-1"): ".env",
        f"APP_API_KEYS={HASH}\n".encode("utf-16"): ".env",
        f"APP_API_KEYS: {HASH}\n": "line 1",
        f"APP_API_KEYS={HASH}\nAPP_MODEL_VERSION=v999\n": "v999",
        f"APP_API_KEYS={HASH}\nAPP_TRUSTED_KEYS={'A' * 43}=\n": "sign",
    }
    for content, reason in contents.items():
        env.write_bytes(content.encode() if isinstance(content, str) else content)
        reload(service)
        assert any(reason in event for event in events(service, "the settings stay as they were"))
        assert service.predict().status_code == 401
        assert service.predict(headers=headers).status_code == 200
    env.write_text(f"APP_API_KEYS={HASH}\nAPP_MODEL_VERSION=v0\nAPP_MAX_BATCH_ITEMS=1\n")
    reload(service)
    assert service.predict(headers=headers).json()["model_version"] == "v0"
    answer = service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 2}, headers=headers)
    assert answer.status_code == 422
    assert service.stop() == 0


@pytest.mark.parametrize("name", ["host", "port"])
def test_an_address_is_taken_at_a_restart_only(name: str) -> None:
    """The sockets are those of the start; a reload says so, and changes nothing."""
    before = Settings()
    change = {name: {"host": "::1", "port": 1}[name]}
    fleet = ForkingFleet(before, 1, *read_usable(Settings(artifacts_dir=ARTIFACTS)))
    with pytest.raises(SettingsError, match=f"APP_{name.upper()}"):
        fleet.renew(before.model_copy(update=change), 1)
    assert fleet.settings is before


def test_a_server_file_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    """SIGHUP after gunicorn.conf.py was spoilt or removed, as a deployment may do, changes nothing."""
    config = tmp_path / "gunicorn.conf.py"
    shutil.copy(GUNICORN[2], config)
    with logging_to(tmp_path, None, str(config)) as (process, url):
        for spoil in (lambda: config.write_text("("), config.unlink):
            spoil()
            before = pids_of(process)
            process.send_signal(signal.SIGHUP)
            until(lambda: len(pids_of(process)) == 2 and not pids_of(process) & before, "successors")  # noqa: B023  # called at once
            assert httpx2.post(f"{url}/v1/predict", json=EXAMPLE).status_code == 200


FLAKY = """
import os
import app.main

def create_app():
    if os.path.exists("broken"):
        raise SystemExit(int(open("broken").read()))
    return app.main.create_app()
"""


@pytest.mark.parametrize("code", [3, 4, 1])
def test_a_replacement_that_cannot_start_ends_no_other(start: Start, tmp_path: Path, code: int) -> None:
    """Whatever a successor ends with, the healthy workers go on, and it is tried again."""
    (tmp_path / "own.py").write_text(FLAKY)
    service = start(app="own:create_app()", workers=2)
    (tmp_path / "broken").write_text(str(code))
    service.kill(service.workers()[0])
    until(lambda: len(events(service, f"exited with code {code}")) > 1, "two failed replacements")
    for _ in range(10):
        assert service.predict().status_code == 200
    (tmp_path / "broken").unlink()
    until(lambda: ready(service) == 3, "a replacement")
    assert service.stop() == 0


def test_make_prints_the_port_that_is_used(tmp_path: Path) -> None:
    """`make run` asks the service's own reader of settings."""
    (tmp_path / ".env").write_text("APP_PORT=22021\n")
    done = run(tmp_path, "app", "address")
    assert done.stdout.startswith("docs: http://127.0.0.1:22021/docs")
    assert run(tmp_path, "app", "address", host="::1").stdout.startswith("docs: http://[::1]:22021/")


# ---- disks and logs


def test_metrics_survive_the_cleaning_of_temporary_files(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removed folder of metrics comes back with what was counted; workers that die are replaced."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = start(workers=2)
    for _ in range(20):
        assert service.predict().status_code == 200
    assert predictions(service) == 20
    (folder,) = tmp_path.glob("metrics-*")
    shutil.rmtree(folder)
    assert service.client.get("/metrics").status_code == 200
    until(lambda: folder.is_dir() and predictions(service) == 20, "the counts of both workers")
    assert [value for name, value in service.metrics().items() if name.startswith("model_info")] == [1]
    shutil.rmtree(folder)
    service.kill(service.workers()[0])
    until(lambda: ready(service) == 3, "another worker")
    assert service.predict().status_code == 200
    assert service.client.get("/metrics").status_code == 200
    assert service.stop() == 0
    assert not folder.exists()


def test_a_replacement_needs_no_folder(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the temporary folder gone for good, a killed worker is replaced, and metrics are answered."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    service = start(workers=2)
    shutil.rmtree(temporary)
    temporary.write_text("a file now")
    for count, worker in enumerate(service.workers(), 3):
        service.kill(worker)
        until(lambda count=count: ready(service) == count, "another worker")  # type: ignore[misc]
    assert service.predict().status_code == 200
    assert service.client.get("/metrics").status_code == 200
    assert service.stop() == 0
    assert temporary.read_text() == "a file now"


@pytest.mark.parametrize("killed", [False, True], ids=["replaced", "killed"])
def test_metric_files_are_bounded(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """However often workers are replaced, there are files for those that live, and no count is lost."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = start(workers=2)
    (folder,) = tmp_path.glob("metrics-*")
    counts = []
    for round_ in range(1, 5):
        assert service.predict().status_code == 200
        assert predictions(service) == round_  # written: a killed worker loses what it has not written yet
        if killed:
            for pid in service.workers()[-2:]:
                service.kill(pid)
            until(lambda: ready(service) == 2 * round_ + 2, "their successors")  # noqa: B023  # called at once
        else:
            reload(service)
            until(lambda: len(events(service, "stopped")) == 2 * round_, "the end of those before")  # noqa: B023  # called at once
        counts.append(len(list(folder.iterdir())))
        assert predictions(service) == round_
    assert counts[-1] == counts[1]


def test_a_spoilt_metric_file_stops_no_replacement(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor does not read what its predecessor's death, or somebody else, has left garbled."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service = start(workers=1)
    (folder,) = tmp_path.glob("metrics-*")
    until(lambda: ready(service) == 1, "its word")
    (pid,) = service.workers()
    os.kill(pid, signal.SIGSTOP)  # or it could die of the files, and its successor start amid the spoiling
    for path in folder.glob("*.db"):
        path.write_bytes(path.read_bytes()[:8] + b"\xff" * 4096)
    os.kill(pid, signal.SIGKILL)
    until(lambda: ready(service) == 2, "another worker")
    assert service.predict().status_code == 200
    assert service.metrics()["metrics_files_broken"] == 0


@contextmanager
def logging_to(
    folder: Path, output: Any, config: str = GUNICORN[2], program: tuple[str, ...] = (sys.executable, "-m")
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service whose standard output and error go there, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = environment(host="127.0.0.1", port=port, workers=2)
    command = ("gunicorn", "--config", config, GUNICORN[3])
    process = begin(folder, *command, program=program, env=variables, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url), "/ready")
        yield process, url
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        end(process)


def answers(url: str) -> bool:
    """Whether the service is ready."""
    try:
        return httpx2.get(f"{url}/ready").status_code == 200
    except httpx2.TransportError:
        return False


def pids_of(process: subprocess.Popen[bytes]) -> set[int]:
    """The processes of the workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in children}


@pytest.mark.parametrize("gone", ["reader", "full", "never there"])
def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, gone: str) -> None:
    """The reader of the log ends, the disk is full: dead workers are replaced, and SIGHUP works."""
    if gone == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        source, output = os.pipe()
    close = (
        "import os, sys; os.close(1); os.close(2);"
        "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[1:]])"
    )
    program = (sys.executable, *(("-c", close) if gone == "never there" else ("-m",)))
    with logging_to(tmp_path, output, program=program) as (process, url):
        os.close(output)
        if gone != "full":
            os.close(source)
        before = pids_of(process)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(pids_of(process) - before) == 1 and answers(url), "another worker")
        known = before | pids_of(process)
        process.send_signal(signal.SIGHUP)
        until(lambda: len(pids_of(process)) == 2 and not pids_of(process) & known, "successors")
        assert httpx2.post(f"{url}/v1/predict", json=EXAMPLE).status_code == 200
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("metrics", ["true", "false"])
def test_without_a_folder_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: str) -> None:
    """Nothing writable, no shared memory: it says what to mount, and without metrics it needs nothing."""
    script = f"""
import os, sys, tempfile
import server.metric_files
server.metric_files.MEMORY = {str(tmp_path / "nowhere")!r}
tempfile._candidate_tempdir_list = lambda: [{str(tmp_path / "nowhere")!r}]
from gunicorn.app.wsgiapp import run
sys.argv = ["gunicorn", *sys.argv[1:]]
run()
"""
    (tmp_path / "nowhere.py").write_text(script)
    if metrics == "true":
        done = run(tmp_path, "nowhere", *GUNICORN[1:], workers=1, host="127.0.0.1", port=0)
        (line,) = done.stderr.splitlines()
        assert "tmpfs" in line
        assert len(line) <= 300
    else:
        variables = environment(workers=1, host="127.0.0.1", port=0, metrics_enabled="false")
        with (tmp_path / "log").open("wb") as log:
            process = begin(tmp_path, "nowhere", *GUNICORN[1:], env=variables, stdout=log, stderr=log)
        try:
            until(lambda: '"ready"' in (tmp_path / "log").read_text(), "a worker")
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            end(process)
        assert "Traceback" not in (tmp_path / "log").read_text()


# ---- sockets and addresses


def test_an_upgrade_on_the_fly_keeps_serving(start: Start, tmp_path: Path) -> None:
    """SIGUSR2 starts another master on the same socket; the old one leaves, and nobody is refused."""
    service = start(workers=1)
    first = service.process.pid
    service.process.send_signal(signal.SIGUSR2)
    until(lambda: ready(service) == 2, "the new master's worker")
    second = int(re.findall(r"\((\d+)\)", events(service, "Listening at")[-1])[0])
    assert second != first
    try:
        service.process.terminate()
        assert service.process.wait(PATIENCE_SECONDS) == 0
        for _ in range(20):
            with closing(service.connection()) as connection:
                connection.request("POST", "/v1/predict", json.dumps(EXAMPLE))
                assert connection.getresponse().status == 200
        assert service.client.get("/metrics").status_code == 200
    finally:
        os.kill(second, signal.SIGTERM)
    until(lambda: not service.listening(), "the end")


def test_one_client_has_one_address(start: Start) -> None:
    """On a socket for both kinds of addresses clients of IPv4 have quotas of their own, and proxies count."""
    service = start(
        workers=1,
        host="::",
        rate_limit="2/minute",
        trusted_proxies="127.0.0.0/8",
        rate_limit_storage="memory://",
    )
    port = httpx2.URL(service.url).port
    url = f"http://127.0.0.1:{port}/v1/predict"
    for client in ("198.51.100.1", "::ffff:198.51.100.2", "198.51.100.3", "2001:db8::1"):
        statuses = [
            httpx2.post(url, json=EXAMPLE, headers={"x-forwarded-for": one}).status_code
            for one in (client, client, client.replace("::ffff:", ""))
        ]
        assert statuses == [200, 200, 429], client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("POST", "/v1/predict", 200),
        ("POST", "/v1/predict/batch", 422),
        ("GET", "/no", 404),
    ],
)
def test_an_idle_connection_is_kept_as_long_as_it_says(
    start: Start, method: str, path: str, status: int
) -> None:
    """APP_KEEP_ALIVE_SECONDS decides when an idle connection ends, whatever it was answered."""
    service = start(workers=1, keep_alive_seconds=1)
    with closing(service.connection()) as connection:
        connection.request(method, path, json.dumps(EXAMPLE) if method == "POST" else None)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
        assert connection.sock.recv(1) == b""
