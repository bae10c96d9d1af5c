"""Programs that run as long as a block: the service itself, and Prometheus and Alertmanager around it.

    command -> ready -> the block -> SIGTERM, or SIGKILL where it does not end
    ops/ -> a copy for this machine, its durations divided by `speed` -> the real programs -> Watch

Load tests, `make size`, the game day and tests use them. Only durations and addresses differ from what
production runs; the rules are the same.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from app.core.store import read_artifact, read_release
from lifecycle.command import ROOT, LifecycleError
from ops.alertmanager.receiver import Receiver, Tell

START_SECONDS, END_SECONDS = 60.0, 60.0
T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float) -> T | None:
    """The first true result of `condition`, or None after `seconds`; a failed connection counts as false."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with suppress(OSError, httpx2.TransportError):
            if found := condition():
                return found
        time.sleep(0.1)
    return None


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    ready: Callable[[], object],
    environment: Mapping[str, str] | None = None,
) -> Iterator[psutil.Popen]:
    """Run a program in the service's folder, once `ready` says so; what it prints goes to `log`.

    SystemExit, with the end of the log, if the program ends or is not ready in time.
    """
    with log.open("wb") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: process.poll() is not None or ready(), START_SECONDS)
        if process.poll() is not None or not ready():
            said = log.read_text("utf-8", errors="replace")[-4000:]
            raise SystemExit(f"{said}\n{log.stem} did not become ready")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def golden_rows() -> tuple[str, list[dict[str, Any]]]:
    """The version that is released, and the rows of its golden set."""
    version = read_release(ROOT / "artifacts").serving
    lines = read_artifact(ROOT / "artifacts", version).files["golden.jsonl"].splitlines()
    return version, [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Running:
    """A service that is ready: its address, and the process that started its workers."""

    address: str
    process: psutil.Process

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        workers: list[psutil.Process] = self.process.children()
        return workers

    def model(self) -> dict[str, Any]:
        """The `model` part of /version: version, runtime, how it is run."""
        model: dict[str, Any] = httpx2.get(f"{self.address}/version").raise_for_status().json()["model"]
        return model


@contextmanager
def service(**settings: str) -> Iterator[Running]:
    """Run the service on a free port, with these `APP_` variables; SystemExit if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    environment = {**os.environ, **settings, "APP_HOST": "127.0.0.1", "APP_PORT": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "service.log")
        with started(command, log, lambda: _is_ready(address), environment) as process:
            yield Running(address, process)


def _is_ready(address: str) -> bool:
    return httpx2.get(f"{address}/ready", timeout=2).status_code == 200


OPS = ROOT / "ops"
UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def program(name: str) -> str:
    """The path of one of the programs; LifecycleError if it is not installed."""
    if found := shutil.which(name) or shutil.which(f"prometheus-{name}"):
        return found
    raise LifecycleError(
        f"{name} is not installed; on Debian: apt-get install prometheus prometheus-alertmanager"
    )


def compressed(text: str, speed: float) -> str:
    """A configuration or a query with every duration divided by `speed`; names of series keep theirs."""
    return re.sub(
        r"(?<![\w:.$])(\d+)(ms|s|m|h|d)\b",
        lambda found: f"{max(1, round(int(found[1]) * UNIT_MS[found[2]] / speed))}ms",
        text,
    )


def queries() -> set[str]:
    """What the dashboards ask Prometheus, releases and alerts included."""
    asked = set()
    for path in (OPS / "grafana" / "dashboards").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        asked |= {target["expr"] for panel in content["panels"] for target in panel["targets"]}
        asked |= {one["expr"] for one in content["annotations"]["list"]}
    return asked


@dataclass
class Watch:
    """Running programs that look at a service."""

    prometheus: str
    alertmanager: str
    speed: float

    def query(self, expression: str, start: float | None = None) -> list[dict[str, Any]]:
        """The series an expression gives now, or over the time since `start`; fails if it is invalid."""
        if start is None:
            body = self._asked("query", query=expression)
        else:
            span = {"start": str(start), "end": str(self.now()), "step": "0.25"}
            body = self._asked("query_range", query=expression, **span)
        if body["status"] != "success":
            raise ValueError(f"{expression}: {body.get('error')}")
        return list(body["data"]["result"])

    def has_data(self, query: str, start: float) -> bool:
        """Whether a panel with this query had a number to show at some time since `start`."""
        query = compressed(query, self.speed).replace("$__rate_interval", "4s")
        series = self.query(query, start)
        return any(value != "NaN" for one in series for _, value in one["values"])

    def now(self) -> float:
        """Prometheus' clock."""
        return float(self._asked("query", query="time()")["data"]["result"][0])

    def alerts(self) -> list[dict[str, Any]]:
        """What Prometheus has pending or firing."""
        return list(self._asked("alerts")["data"]["alerts"])

    def shipped(self) -> list[dict[str, Any]]:
        """Every alerting rule there is."""
        groups = self._asked("rules", type="alert")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def _asked(self, path: str, **parameters: str) -> Any:
        return httpx2.get(f"{self.prometheus}/api/v1/{path}", params=parameters, timeout=30).json()


@contextmanager
def watching(
    folder: Path, service: str, speed: float, sample_ms: int, ops: Path = OPS, *, tell: Tell
) -> Iterator[Watch]:
    """Run Prometheus, Alertmanager and a receiver on free ports, watching the service at this URL.

    `sample_ms`, between two scrapes and two evaluations, is not divided by `speed`: a scrape of all workers
    takes its time. `tell` gets each message of Alertmanager, with the receiver's path.
    """
    watch = Watch("", "", speed)
    copy = shutil.copytree(ops, folder / "ops")
    files = [copy / "alertmanager" / "alertmanager.yml", *(copy / "prometheus").glob("*.yml")]
    every = rf"\1: {sample_ms}ms"
    for path in files:
        text = compressed(path.read_text("utf-8"), speed)
        path.write_text(re.sub(r"(scrape_interval|evaluation_interval): .*", every, text), "utf-8")

    def replace(written: str, address: str) -> None:
        address = address.removeprefix("http://")
        for path in files:
            path.write_text(path.read_text("utf-8").replace(written, address), "utf-8")

    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver(("127.0.0.1", 0), tell))
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        stack.callback(receiver.shutdown)
        replace("receiver:9095", f"127.0.0.1:{receiver.server_port}")
        replace("api:8000", service)
        watch.alertmanager = stack.enter_context(running(folder, "alertmanager", *alertmanager_flags(copy)))
        replace("alertmanager:9093", watch.alertmanager)
        flags = (
            f"--config.file={copy}/prometheus/prometheus.yml",
            f"--storage.tsdb.path={folder}/prometheus",
            "--rules.alert.resend-delay=1s",
            f"--query.lookback-delta={max(300_000 / speed, 5 * sample_ms):.0f}ms",
        )
        watch.prometheus = stack.enter_context(running(folder, "prometheus", *flags))
        yield watch


def alertmanager_flags(ops: Path) -> tuple[str, ...]:
    """How Alertmanager is started with the configuration in `ops`."""
    config = ops / "alertmanager" / "alertmanager.yml"
    return f"--config.file={config}", f"--storage.path={ops}/silences", "--cluster.listen-address="


@contextmanager
def running(folder: Path, name: str, *flags: str) -> Iterator[str]:
    """Run one of the programs on a port that the kernel chose; give its URL. Its log is in `folder`."""
    log = folder / f"{name}.log"

    def url() -> str:
        found = re.search(r'"Listening on".* address=(127\.0\.0\.1:[1-9]\d*)', log.read_text("utf-8"))
        return f"http://{found[1]}" if found else ""

    def ready() -> bool:
        return bool(url()) and httpx2.get(f"{url()}/-/ready").status_code == 200

    with started([program(name), "--web.listen-address=127.0.0.1:0", *flags], log, ready):
        yield url()
