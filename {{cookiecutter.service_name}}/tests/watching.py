"""Prometheus and Alertmanager around a service, as compose.yaml wires them, for tests and the game day.

    ops/ -> a copy for this machine, its durations divided by `speed` -> the real programs -> Watch

Only durations and addresses differ from what production runs; the rules are the same.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import (
    ANSWER,
    EXAMPLE,
    FIELD,
    NUMBER,
    OTHER,
    PATIENCE_SECONDS,
    ROOT,
    SERVED,
    Service,
    answer_of,
    begin,
    end,
    golden_set,
    number,
    until,
    wrong,
)

UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
SCRAPE_MS = 1000  # no faster: reading all workers' counts takes its time


def program(name: str) -> str:
    """Where one of the programs is; Debian and Ubuntu have them in prometheus and prometheus-alertmanager."""
    found = shutil.which(name) or shutil.which(f"prometheus-{name}")
    if not found and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed: apt-get install prometheus prometheus-alertmanager")
    assert found, f"{name} is not installed"
    return found


def compressed(text: str, speed: float) -> str:
    """A configuration with every duration divided by `speed`; names of series keep theirs."""
    return re.sub(
        r"(?<![\w:.$])(\d+)(ms|s|m|h|d)\b",
        lambda found: f"{max(1, round(int(found[1]) * UNIT_MS[found[2]] / speed))}ms",
        text,
    )


def prepare(folder: Path, speed: float = 1, addresses: Mapping[str, str] | None = None) -> Path:
    """A copy of `ops/` in `folder` that real programs read; in the template, with its answers filled in."""
    copy = shutil.copytree(ROOT / "ops", folder / "ops")
    for path in [*copy.rglob("*.yml")]:
        text = path.read_text("utf-8")
        text = re.sub(r"\{\% (end)?raw \%\}", "", text)
        text = re.sub(r"\{\{ cookiecutter\W(\w+_url) \}\}", r"https://git.example.com/\1", text)
        text = re.sub(r"\{\{ cookiecutter\W(\w+) \}\}", r"\1", text)
        if speed != 1:
            text = compressed(text, speed)
            text = re.sub(r"scrape_interval: .*", f"scrape_interval: {SCRAPE_MS}ms", text)
        for name, address in (addresses or {}).items():
            text = text.replace(name, address)
        path.write_text(text, "utf-8")
    return copy


@dataclass
class Watch:
    """Running programs that look at a service."""

    prometheus: str
    alertmanager: str
    received: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # receiver's path, message

    def query(self, expression: str, start: float | None = None) -> list[dict[str, Any]]:
        """The series an expression gives now, or over the time since `start`; fails if it is invalid."""
        if start is None:
            path, more = "query", {}
        else:
            path, more = "query_range", {"start": str(start), "end": str(self.now()), "step": "1"}
        answer = httpx2.get(f"{self.prometheus}/api/v1/{path}", params={"query": expression, **more})
        body = answer.json()
        assert body["status"] == "success", f"{expression}: {body.get('error')}"
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    def now(self) -> float:
        """Prometheus' clock."""
        body = httpx2.get(f"{self.prometheus}/api/v1/query", params={"query": "time()"}).json()
        return float(body["data"]["result"][0])

    def alerts(self) -> list[dict[str, Any]]:
        """What Prometheus has pending or firing."""
        body = httpx2.get(f"{self.prometheus}/api/v1/alerts").json()
        found: list[dict[str, Any]] = body["data"]["alerts"]
        return found

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


def traffic(service: Service) -> None:
    """Something of everything that clients do: rows alone and together, sure and unsure, wrong, labels."""
    golden = golden_set(SERVED)
    unsure = min(golden, key=lambda row: max(row.get("probabilities", {"": 0}).values()))["features"]
    strange = {**EXAMPLE, NUMBER: number(2)} if NUMBER else OTHER
    answers = {str(answer_of(row)): row["features"] for row in golden}  # one of each
    rows = ([EXAMPLE, OTHER, *answers.values()] * 33)[:99]
    batch = service.client.post("/v1/predict/batch", json={"instances": [*rows, unsure, strange]})
    assert batch.status_code == 200, batch.text
    for features in (EXAMPLE, OTHER, unsure):
        answer = service.predict(features)
        service.client.post(
            "/v1/feedback", json={"prediction_id": answer.json()["prediction_id"], "label": ANSWER}
        )
    for _ in range(2):  # on one connection, so at one worker, which knows it again
        service.predict(headers={"idempotency-key": "sent again"})
    assert service.predict({**EXAMPLE, FIELD: wrong()}).status_code == 422
    assert service.predict(content=b"{").status_code == 400


@contextmanager
def watching(folder: Path, service: str, speed: float = 60) -> Iterator[Watch]:
    """Prometheus, Alertmanager and a receiver on ports the kernel chose, watching the service at this URL."""
    received: list[tuple[str, dict[str, Any]]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with ExitStack() as stack:
        receiver = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Receiver))
        threading.Thread(target=receiver.serve_forever, daemon=True).start()
        stack.callback(receiver.shutdown)
        first = prepare(folder / "first", speed, {"127.0.0.1:9095": f"127.0.0.1:{receiver.server_port}"})
        alertmanager = stack.enter_context(
            running(
                folder,
                "alertmanager",
                f"--config.file={first}/alertmanager/alertmanager.yml",
                f"--storage.path={folder}/alertmanager",
                "--cluster.listen-address=",
            )
        )
        addresses = {"api:8000": _host(service), "alertmanager:9093": _host(alertmanager)}
        second = prepare(folder / "second", speed, addresses)
        prometheus = stack.enter_context(
            running(
                folder,
                "prometheus",
                f"--config.file={second}/prometheus/prometheus.yml",
                f"--storage.tsdb.path={folder}/prometheus",
                "--rules.alert.resend-delay=1s",
            )
        )
        yield Watch(prometheus, alertmanager, received)


@contextmanager
def running(folder: Path, name: str, *flags: str) -> Iterator[str]:
    """One of the programs, once it is ready; its URL."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = begin(
            folder,
            "--web.listen-address=127.0.0.1:0",
            *flags,
            program=(program(name),),
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def address() -> str | None:
        assert process.poll() is None, log.read_text()
        found = re.search(r'msg="Listening on"\S* address=(127\.0\.0\.1:[1-9]\d*)', log.read_text())
        return found and f"http://{found[1]}"

    try:
        url = until(address, f"{name}'s address")
        until(lambda: httpx2.get(f"{url}/-/ready").status_code == 200, name)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_SECONDS)
        finally:
            end(process)


def _host(url: str) -> str:
    return url.removeprefix("http://")
