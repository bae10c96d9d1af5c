"""Prometheus and Alertmanager around a service, as compose.yaml wires them: for the game day, and for tests.

    ops/ -> a copy for this machine, its durations divided by `speed` -> the real programs -> Watch

Only durations and addresses differ from what production runs; the rules are the same.
"""

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import typer

from ops.alertmanager.receiver import Receiver, Tell

OPS = Path(__file__).resolve().parents[2] / "ops"
PATIENCE_SECONDS = 60.0
UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def program(name: str) -> str:
    """Where one of the programs is; Debian and Ubuntu have them in prometheus and prometheus-alertmanager."""
    if found := shutil.which(name) or shutil.which(f"prometheus-{name}"):
        return found
    missing = f"{name} is not installed; on Debian: apt-get install prometheus prometheus-alertmanager"
    raise typer.BadParameter(missing, param_hint="PATH")


def compressed(text: str, speed: float) -> str:
    """A configuration or a query with every duration divided by `speed`; names of series keep theirs."""
    return re.sub(
        r"(?<![\w:.$])(\d+)(ms|s|m|h|d)\b",
        lambda found: f"{max(1, round(int(found[1]) * UNIT_MS[found[2]] / speed))}ms",
        text,
    )


def queries(board: str = "*") -> set[str]:
    """What a dashboard, or all of them, asks Prometheus, releases and alerts included."""
    asked = set()
    for path in (OPS / "grafana" / "dashboards").glob(f"{board}.json"):
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
    received: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # receiver's path, message

    def query(self, expression: str, start: float | None = None) -> list[dict[str, Any]]:
        """The series an expression gives now, or over the time since `start`; fails if it is invalid."""
        if start is None:
            path, more = "query", {}
        else:
            path, more = "query_range", {"start": str(start), "end": str(self.now()), "step": "0.25"}
        body = self._asked(path, query=expression, **more)
        if body["status"] != "success":
            raise ValueError(f"{expression}: {body.get('error')}")
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

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
        found: list[dict[str, Any]] = self._asked("alerts")["data"]["alerts"]
        return found

    def shipped(self) -> list[dict[str, Any]]:
        """Every alerting rule there is."""
        groups = self._asked("rules", type="alert")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def silenced(self, **labels: str) -> bool:
        """Whether Alertmanager holds back an alert with these labels because another says more."""
        found = httpx2.get(f"{self.alertmanager}/api/v2/alerts").json()
        return any(one["status"]["inhibitedBy"] for one in found if labels.items() <= one["labels"].items())

    def told(self, status: str, **labels: str) -> list[tuple[str, dict[str, Any]]]:
        """The alerts with this status and these labels that receivers got, each with the receiver's path."""
        return [
            (path, alert)
            for path, message in self.received
            for alert in message["alerts"]
            if alert["status"] == status and labels.items() <= alert["labels"].items()
        ]

    def _asked(self, path: str, **parameters: str) -> Any:
        return httpx2.get(f"{self.prometheus}/api/v1/{path}", params=parameters, timeout=30).json()


@contextmanager
def watching(
    folder: Path, service: str, speed: float, sample_ms: int, ops: Path = OPS, tell: Tell | None = None
) -> Iterator[Watch]:
    """Prometheus, Alertmanager and a receiver on ports the kernel chose, watching the service at this URL.

    `sample_ms`, between two scrapes and two evaluations, is not divided: reading all workers' counts takes
    its time. `tell` gets what the receiver gets.
    """
    watch = Watch("", "", speed)

    def receive(path: str, message: dict[str, Any]) -> None:
        watch.received.append((path, message))
        if tell:
            tell(path, message)

    copy = shutil.copytree(ops, folder / "ops")
    files = [copy / "alertmanager" / "alertmanager.yml", *(copy / "prometheus").glob("*.yml")]
    every = rf"\1: {sample_ms}ms"
    for path in files:
        text = compressed(path.read_text("utf-8"), speed)
        path.write_text(re.sub(r"(scrape_interval|evaluation_interval): .*", every, text), "utf-8")

    def replace(written: str, address: str) -> None:
        for path in files:
            path.write_text(path.read_text("utf-8").replace(written, address.rpartition("/")[2]), "utf-8")

    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver(("127.0.0.1", 0), receive))
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
    """One of the programs until the end of the block, once it is ready; its URL. Its log is in `folder`."""
    log = folder / f"{name}.log"
    command = [program(name), "--web.listen-address=127.0.0.1:0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603  # ours
    try:
        yield _ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        found = re.search(r'"Listening on".* address=(127\.0\.0\.1:[1-9]\d*)', log.read_text())
        if found and httpx2.get(f"http://{found[1]}/-/ready").status_code == 200:
            return f"http://{found[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"{log.stem} does not get ready: {log.read_text()}")
