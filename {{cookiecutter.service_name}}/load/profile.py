"""What the service does at 1, 4, 16, 64 connections, and what stops it first: load/profile.md and .svg.

    golden rows -> keep-alive connections, each asks again when answered -> latencies
    /metrics, /proc before and after each step -> stages, processor time -> table, bottleneck, advice

The clients share this machine with the service, so their processor time is measured too, and stated.
"""

import asyncio
import itertools
import json
import math
import os
import platform
import re
import tomllib
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

from app.core.store import read_artifact, read_release

ROOT = Path(__file__).resolve().parents[1]
PROC = Path("/proc")
CONNECTIONS = (1, 4, 16, 64)
PATH = "/v1/predict"
STAGES = ("queue", "preprocess", "inference", "postprocess")
PATIENCE_SECONDS = 30.0  # for the last answer of a step
BUSY = 0.9  # of what there is; the rest is lost in hand-overs even when nothing else is short
STRAY = 0.25  # processors used by others, above which figures are not to be quoted


@dataclass
class Answers:
    """What the clients of one step saw."""

    seconds: list[float] = field(default_factory=list)  # of each 200
    others: Counter[int] = field(default_factory=Counter)  # other statuses; 0 is a lost connection


class _Connection(asyncio.Protocol):
    """One client on one keep-alive connection: the next request leaves when the last is answered."""

    def __init__(self, requests: Iterator[bytes], answers: Answers, end: float) -> None:
        self._requests, self._answers, self._end = requests, answers, end
        self._buffer, self._sent, self.done = b"", 0.0, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # it is TCP
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if not separator or len(body) < int(length[1] if length else 0):
            return
        now, status, self._buffer = perf_counter(), int(head[9:12]), b""
        if status == 200:
            self._answers.seconds.append(now - self._sent)
        else:
            self._answers.others[status] += 1
        if now < self._end:
            self._ask()
        else:
            self.done.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._answers.others[0] += 1
            self.done.set_result(None)

    def _ask(self) -> None:
        self._sent = perf_counter()
        self._transport.write(next(self._requests))


def drive(address: str, connections: int, seconds: float) -> Answers:
    """Ask for predictions on so many connections for so long."""
    return uvloop.run(_drive(address, connections, seconds))


async def _drive(address: str, connections: int, seconds: float) -> Answers:
    answers, where = Answers(), urlsplit(address)
    requests = itertools.cycle(_requests(where.netloc))
    loop, end = asyncio.get_running_loop(), perf_counter() + seconds

    async def client() -> None:
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(requests, answers, end), where.hostname or "", where.port or 80
            )
        except OSError:
            answers.others[0] += 1
        else:
            await connection.done

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    _, silent = await asyncio.wait(clients, timeout=seconds + PATIENCE_SECONDS)
    if silent:
        answers.others[0] += len(silent)
    return answers


def _requests(host: str) -> list[bytes]:
    """Golden rows of the version that is released, one instance a request, as bytes to send."""
    artifacts = ROOT / "artifacts"
    golden = read_artifact(artifacts, read_release(artifacts).serving).files["golden.jsonl"]
    key = os.environ.get("LOAD_API_KEY", "")
    requests = []
    for line in golden.splitlines():
        body = json.dumps(json.loads(line)["features"]).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"X-API-Key: {key}\r\n" if key else ""
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests


def get(address: str) -> str:
    """The body of a GET."""
    with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310  # our own http address
        return str(response.read().decode())


def served(address: str) -> dict[str, Any]:
    """What /version says of the model."""
    model: dict[str, Any] = json.loads(get(f"{address}/version"))["model"]
    return model


def workers_of(pid: int) -> list[int]:
    """Processes started by `pid`; none where there is no /proc."""
    # "pid (name) state ppid ...", where the name may hold anything.
    stats = (path.read_text(errors="replace") for path in PROC.glob("[0-9]*/stat") if path.exists())
    return [int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == pid]


@dataclass(frozen=True)
class Reading:
    """Counters at one moment; processor time in seconds, None where the system does not tell."""

    samples: dict[str, float]
    clock: float
    client: float
    server: float | None
    machine: float | None

    @classmethod
    def take(cls, address: str, pid: int) -> "Reading":
        """Read /metrics first: its own cost then lies outside every step."""
        lines = (line for line in get(f"{address}/metrics").splitlines() if not line.startswith("#"))
        samples = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
        tick = os.sysconf("SC_CLK_TCK")
        server = machine = None
        if workers := workers_of(pid):
            fields = [(PROC / str(one) / "stat").read_text().rpartition(")")[2].split() for one in workers]
            server = sum(int(one[11]) + int(one[12]) for one in fields) / tick
            total = [int(part) for part in (PROC / "stat").read_text().splitlines()[0].split()[1:9]]
            machine = (sum(total) - total[3] - total[4]) / tick  # without idle and waiting for disks
        return cls(samples, perf_counter(), process_time(), server, machine)

    def sum(self, name: str, *labels: str) -> float:
        """The sum of a metric's samples that carry all `labels`, each as it is exposed."""
        return sum(
            value
            for sample, value in self.samples.items()
            if sample.partition("{")[0] == name and all(label in sample for label in labels)
        )


@dataclass(frozen=True)
class Step:
    """One number of connections; times in milliseconds, processors as the mean number in use."""

    connections: int
    rate: float  # good answers a second
    p50: float
    p95: float
    p99: float
    refused: dict[int, int]  # other answers than 200, by status
    refused_share: float
    stages: dict[str, float]  # mean milliseconds of a request, and "total"
    rows_a_call: float
    client: float
    server: float | None
    model: float  # of `server`, about: the time inside the model's calls
    stray: float  # processors used by neither the service nor the clients


def step(address: str, pid: int, connections: int, seconds: float) -> Step:
    """Measure one number of connections."""
    before = Reading.take(address, pid)
    began, client = perf_counter(), process_time()
    answers = drive(address, connections, seconds)
    took, client = perf_counter() - began, process_time() - client
    after = Reading.take(address, pid)

    def grown(name: str, *labels: str) -> float:
        return after.sum(name, *labels) - before.sum(name, *labels)

    def mean_ms(name: str, *labels: str) -> float:
        return 1000 * grown(f"{name}_sum", *labels) / max(grown(f"{name}_count", *labels), 1)

    stages = {name: mean_ms("inference_stage_duration_seconds", f'stage="{name}"') for name in STAGES}
    stages["total"] = mean_ms("http_request_duration_seconds", f'handler="{PATH}"')
    calls = grown("inference_batch_rows_count")
    server = machine = None
    if before.server is not None and after.server is not None:
        server = (after.server - before.server) / took
    if before.machine is not None and after.machine is not None:
        machine = (after.machine - before.machine) / took
    times = sorted(answers.seconds)
    p50, p95, p99 = (
        1000 * times[min(int(share * len(times)), len(times) - 1)] if times else math.nan
        for share in (0.5, 0.95, 0.99)
    )
    others = sum(answers.others.values())
    return Step(
        connections=connections,
        rate=len(times) / took,
        p50=p50,
        p95=p95,
        p99=p99,
        refused=dict(answers.others),
        refused_share=others / max(others + len(times), 1),
        stages=stages,
        rows_a_call=grown("inference_batch_rows_sum") / max(calls, 1),
        client=client / took,
        server=server,
        model=stages["inference"] / 1000 * calls / took,
        stray=max(0.0, (machine or 0) - (server or 0) - client / took),
    )


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and what."""

    workers: int
    processors: int
    model: str


def bottleneck(peak: Step, machine: Machine) -> tuple[str, str]:
    """What stopped the service at its highest throughput, and what to do about it."""
    cpus, workers = machine.processors, machine.workers
    if peak.refused.get(503, 0) and peak.refused_share > 0.01:
        return (
            f"Admission: {peak.refused_share:.0%} were refused, so that the rest was answered in time.",
            "Raise `APP_MAX_CONCURRENCY` or `APP_MAX_QUEUE` only if the latency above may still grow; "
            "otherwise more workers or machines.",
        )
    if peak.server is None:
        return "Unknown: this system does not tell what the workers used.", "Measure on Linux."
    per_request = 1e6 * peak.server / max(peak.rate, 1e-9)
    share = min(1.0, peak.model / max(peak.server, 1e-9))
    inside = (
        f"the model, {share:.0%} of it" if share >= 0.5 else f"HTTP and validation; the model is {share:.0%}"
    )
    per_processor = f"`APP_WORKERS={cpus}`, one a processor; more would take memory and answer no more."
    cost = f"{per_request:.0f} µs of processor time a request, most of it in {inside}"
    if peak.server >= BUSY * min(workers, cpus):
        return f"Processor time of the workers: {peak.server:.1f} in use, {cost}.", per_processor
    if peak.client >= BUSY:
        return (
            f"The load generator: it filled its one processor while the workers used {peak.server:.1f}. "
            f"The service can do more than this shows ({cost}).",
            "Load it from other machines before deciding on workers.",
        )
    if peak.server + peak.client + peak.stray >= BUSY * cpus:
        others = f", others {peak.stray:.1f}" if peak.stray > STRAY else ""
        return (
            f"Processor time of this machine: the workers used {peak.server:.1f} processors, the load "
            f"generator {peak.client:.1f}{others} ({cost}).",
            f"{per_processor} To see what these workers can do, load them from another machine.",
        )
    slowest = max(STAGES, key=lambda name: peak.stages[name])
    return (
        f"Waiting, not processors: the workers used {peak.server:.1f} of {cpus}. The longest stage is "
        f"`{slowest}`.",
        "More connections would be answered as well. If the stage is `queue`, look at "
        "`APP_BATCH_MAX_WAIT_MS` and at models that run one call at a time.",
    )


def report(steps: Sequence[Step], machine: Machine, chart: str, day: str) -> str:
    """The profile as Markdown."""
    peak = max(steps, key=lambda one: one.rate)
    promised = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))["latency_p95_ms"]
    kept = list(itertools.takewhile(lambda one: one.p95 < promised, steps))
    what, advice = bottleneck(peak, machine)
    held = f"holds up to {kept[-1].connections} connections" if kept else "does not hold"
    if kept and kept[-1] is steps[-1]:
        held += ", the most tried"
    lines = [
        "# Performance profile",
        "",
        f"Written by `make load` on {day}: {machine.model}; {machine.workers} workers, "
        f"{machine.processors} processors, shared with the load generator; "
        f"Python {platform.python_version()}.",
        "One instance a request, on connections that each ask again when answered: at many connections the "
        "latency is mostly waiting for one's turn.",
        "",
        f"![Throughput and latency by number of connections]({chart})",
        "",
        f"- **Peak:** {peak.rate:,.0f} predictions a second at {peak.connections} connections, "
        f"p99 {_ms(peak.p99)} ms.",
        f"- **Promise:** p95 below {promised:g} ms {held}.",
        f"- **First bottleneck:** {what}",
        f"- **Workers:** {advice} `make size` says what the memory carries.",
    ]
    if (worst := max(one.stray for one in steps)) > STRAY:
        lines.append(f"- **Do not quote:** something else used up to {worst:.1f} processors meanwhile.")
    lines += [
        "",
        "| connections | requests/s | p50 ms | p95 ms | p99 ms | not 200 | rows a model call "
        "| processors: workers | load generator |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in steps:
        workers = "-" if one.server is None else f"{one.server:.2f}"
        lines.append(
            f"| {one.connections} | {one.rate:,.0f} | {_ms(one.p50)} | {_ms(one.p95)} | {_ms(one.p99)} "
            f"| {_statuses(one.refused)} | {one.rows_a_call:.1f} | {workers} | {one.client:.2f} |"
        )
    lines += [
        "",
        "Mean milliseconds of a request inside the service, as `/metrics` has them; `rest` is HTTP, "
        "validation and the turn of others.",
        "",
        "| connections | queue | preprocess | inference | postprocess | rest | total |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in steps:
        known = [one.stages[name] for name in STAGES]
        cells = [*known, max(0.0, one.stages["total"] - sum(known)), one.stages["total"]]
        lines.append(f"| {one.connections} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _statuses(refused: dict[int, int]) -> str:
    named = (f"{count} of {status or 'connections lost'}" for status, count in sorted(refused.items()))
    return ", ".join(named) or "0"


def chart(steps: Sequence[Step]) -> str:
    """Throughput and latency by number of connections, as SVG; the latency's scale is logarithmic."""
    top = max(max(one.rate for one in steps), 1e-9)
    times = [t for one in steps for t in (one.p50, one.p95, one.p99) if t > 0]
    low, high = (math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))) if times else (0, 1)
    high = max(high, low + 1)

    def x(left: int, index: int) -> float:
        return left + (index + 0.5) * 300 / len(steps)

    def y(milliseconds: float) -> float:
        return 240 - 190 * (math.log10(milliseconds) - low) / (high - low)

    parts = [text(200, 24, "requests a second"), text(560, 24, "latency, ms")]
    for power in range(low, high + 1):
        level = y(10.0**power)
        parts.append(f'<path d="M410 {level:.0f}h300" stroke="#ddd"/>')
        parts.append(text(404, level + 4, f"{10.0**power:g}", "end"))
    for index, one in enumerate(steps):
        bar, at = 190 * one.rate / top, x(50, index)
        parts.append(f'<path d="M{at - 20:.0f} 240v-{bar:.1f}h40v{bar:.1f}z" fill="#4878a8"/>')
        parts.append(text(at, 234 - bar, f"{one.rate:,.0f}"))
        parts += [text(place, 258, str(one.connections)) for place in (at, x(410, index))]
    for name, colour in (("p50", "#4878a8"), ("p95", "#d08030"), ("p99", "#b03030")):
        values = [(x(410, index), getattr(one, name)) for index, one in enumerate(steps)]
        points = " ".join(f"{at:.0f},{y(value):.1f}" for at, value in values if value > 0)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(440 + 60 * int(name > "p50") + 60 * int(name > "p95"), 44, name, colour=colour))
    parts += [text(place, 278, "connections") for place in (200, 560)]
    return picture(730, 290, parts)


def picture(width: int, height: int, parts: Sequence[str]) -> str:
    """An SVG on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = "#333") -> str:
    """Words in an SVG."""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def write(address: str, pid: int, target: Path, seconds: float) -> None:
    """Measure every number of connections and write `target` and the chart beside it."""
    model = served(address)
    drive(address, CONNECTIONS[-1], seconds)  # what only happens once happens here
    steps = []
    for connections in CONNECTIONS:
        steps.append(step(address, pid, connections, seconds))
        rate, p99 = steps[-1].rate, _ms(steps[-1].p99)
        print(f"profile: {connections} connections, {rate:,.0f} a second, p99 {p99} ms", flush=True)
    machine = Machine(
        workers=len(workers_of(pid)) or int(os.environ.get("APP_WORKERS", "1")),
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        model=f"model {model['version']} ({model['runtime']}, run as `{model['execution']}`)",
    )
    picture = target.with_suffix(".svg")
    picture.write_text(chart(steps), "utf-8")
    target.write_text(report(steps, machine, picture.name, str(datetime.now(UTC).date())), "utf-8")
