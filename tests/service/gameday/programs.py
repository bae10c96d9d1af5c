"""Prometheus and Alertmanager around a running service, as long as a block lasts.

ops/ -> a copy for this machine, its durations divided by `speed` -> the real programs -> Watch

Only durations and addresses differ from what production runs; the rules are the same.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from ops.alertmanager.receiver import Receiver, Tell

from lifecycle.command import ROOT, LifecycleError
from lifecycle.operations.programs import started

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
