"""What the service does at 1, 4, 16, 64 connections, and what limits it: load/profile.md and .svg.

    golden rows -> keep-alive connections, each asks again when answered -> latencies
    /metrics and processor time before and after each step -> stages, cost -> table, bottleneck, advice

The clients share this machine with the service, so their processor time is measured too, and stated.
"""

import asyncio
import itertools
import json
import os
import platform
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

import httpx2
import numpy as np
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from load.service import ROOT, Running, golden_rows

CONNECTIONS = (1, 4, 16, 64)
PATH = "/v1/predict"
STAGES = ("queue", "preprocess", "inference", "postprocess")
LAST_ANSWER_SECONDS = 30.0
BUSY = 0.9  # share of the processors that counts as all: some is lost in hand-overs
STRAY = 0.25  # processors used by other programs, above which figures are not to be quoted


@dataclass
class Answers:
    """What the clients of one step saw."""

    seconds: list[float] = field(default_factory=list)  # of each 200
    others: Counter[int] = field(default_factory=Counter)  # other statuses; 0 is a lost connection


def drive(address: str, connections: int, seconds: float) -> Answers:
    """Ask for predictions on so many connections for so long."""
    return uvloop.run(_drive(address, connections, seconds))


async def _drive(address: str, connections: int, seconds: float) -> Answers:
    answers, where, end = Answers(), urlsplit(address), perf_counter() + seconds
    requests = itertools.cycle(_requests(where.netloc))
    clients = [
        asyncio.create_task(_client(where.hostname or "", where.port or 80, requests, answers, end))
        for _ in range(connections)
    ]
    _, silent = await asyncio.wait(clients, timeout=seconds + LAST_ANSWER_SECONDS)
    answers.others[0] += len(silent)
    return answers


async def _client(host: str, port: int, requests: Iterator[bytes], answers: Answers, end: float) -> None:
    """One client on one keep-alive connection: the next request leaves when the last is answered."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
        while (sent := perf_counter()) < end:
            writer.write(next(requests))
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1] if length else 0))
            if (status := int(head[9:12])) == 200:
                answers.seconds.append(perf_counter() - sent)
            else:
                answers.others[status] += 1
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        answers.others[0] += 1


def _requests(host: str) -> list[bytes]:
    """Golden rows of the version that is released, one instance a request, as bytes to send."""
    key = os.environ.get("LOAD_API_KEY", "")
    requests = []
    for row in golden_rows()[1]:
        body = json.dumps(row["features"]).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"X-API-Key: {key}\r\n" if key else ""
        requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return requests


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
    server: float
    model: float  # of `server`, about: the time inside the model's calls
    stray: float  # processors used by neither the service nor the clients


def _scrape(running: Running) -> list[Sample]:
    families = text_string_to_metric_families(httpx2.get(f"{running.address}/metrics").text)
    return [sample for family in families for sample in family.samples]


def _total(samples: list[Sample], name: str, labels: dict[str, str]) -> float:
    return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def step(running: Running, connections: int, seconds: float) -> Step:
    """Measure one number of connections."""
    workers, own = running.workers(), [psutil.Process()]
    before = _scrape(running)
    psutil.cpu_percent()  # what it says next is of the time since this call
    began, server, client = perf_counter(), _processor_seconds(workers), _processor_seconds(own)
    answers = drive(running.address, connections, seconds)
    took = perf_counter() - began
    server = (_processor_seconds(workers) - server) / took
    client = (_processor_seconds(own) - client) / took
    busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    after = _scrape(running)

    def grown(name: str, **labels: str) -> float:
        return _total(after, name, labels) - _total(before, name, labels)

    def mean_ms(name: str, **labels: str) -> float:
        return 1000 * grown(f"{name}_sum", **labels) / max(grown(f"{name}_count", **labels), 1)

    stages = {name: mean_ms("inference_stage_duration_seconds", stage=name) for name in STAGES}
    stages["total"] = mean_ms("http_request_duration_seconds", handler=PATH)
    calls = grown("inference_batch_rows_count")
    p50, p95, p99 = (1000 * np.quantile(answers.seconds or [np.nan], (0.5, 0.95, 0.99))).tolist()
    good, others = len(answers.seconds), sum(answers.others.values())
    return Step(
        connections=connections,
        rate=good / took,
        p50=p50,
        p95=p95,
        p99=p99,
        refused=+answers.others,
        refused_share=others / max(others + good, 1),
        stages=stages,
        rows_a_call=grown("inference_batch_rows_sum") / max(calls, 1),
        client=client,
        server=server,
        model=stages["inference"] / 1000 * calls / took,
        stray=max(0.0, busy - server - client),
    )


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and what."""

    workers: int
    processors: int
    model: str


def bottleneck(peak: Step, machine: Machine) -> tuple[str, str]:
    """What limited the service at its highest throughput, and what to do about it."""
    cpus = machine.processors
    if peak.refused.get(503, 0) and peak.refused_share > 0.01:
        return (
            f"Admission: {peak.refused_share:.0%} were refused, so that the rest was answered in time.",
            "Raise `APP_MAX_CONCURRENCY` or `APP_MAX_QUEUE` only if the latency above may still grow; "
            "otherwise more workers or machines.",
        )
    if not peak.rate:
        return "Unknown: no request was answered with 200.", "Find out why, from the statuses below."
    share = min(1.0, peak.model / max(peak.server, 1e-9))
    used = f"{1e6 * peak.server / peak.rate:.0f} µs of processor time a request"
    cost = f"{used}, {share:.0%} of it in the model, the rest in HTTP and validation"
    per_processor = f"`APP_WORKERS={cpus}`, one a processor; more would take memory and answer no more."
    if peak.server >= BUSY * min(machine.workers, cpus):
        return f"Processor time of the workers: {peak.server:.1f} in use, {cost}.", per_processor
    if peak.client >= BUSY:
        return (
            f"The load generator: it filled its one processor while the workers used {peak.server:.1f}. "
            f"The service can do more than this shows ({cost}).",
            "Load it from other machines before deciding on workers.",
        )
    if peak.server + peak.client + peak.stray >= BUSY * cpus:
        return (
            f"Processor time of this machine: the workers used {peak.server:.1f} processors, the load "
            f"generator {peak.client:.1f}, others {peak.stray:.1f} ({cost}).",
            f"{per_processor} To see what these workers can do, load them from another machine.",
        )
    slowest = max(STAGES, key=lambda name: peak.stages[name])
    return (
        f"Waiting, not processors: the workers used {peak.server:.1f} of {cpus}. The longest stage is "
        f"`{slowest}`.",
        "More connections would be answered as well. If the stage is `queue`, look at "
        "`APP_BATCH_MAX_WAIT_MS` and at models that run one call at a time.",
    )


REPORT = """\
# Performance profile

Written by `make load` on {day}: {machine.model}; {machine.workers} workers, \
{machine.processors} processors, shared with the load generator; Python {python}.
One instance a request, on connections that each ask again when answered: at many connections the latency is \
mostly waiting for the requests before.

![Throughput and latency by number of connections]({picture})

- **Peak:** {peak.rate:,.0f} predictions a second at {peak.connections} connections, p99 {p99} ms.
- **Promise:** p95 below {promised:g} ms {held}.
- **First bottleneck:** {what}
- **Workers:** {advice} `make size` says what the memory carries.
{warning}
| connections | requests/s | p50 ms | p95 ms | p99 ms | not 200 | rows a model call | processors: workers \
| load generator |
|--:|--:|--:|--:|--:|--:|--:|--:|--:|
{figures}

Mean milliseconds of a request inside the service, as `/metrics` has them; `rest` is HTTP, validation and \
waiting for other requests.

| connections | queue | preprocess | inference | postprocess | rest | total |
|--:|--:|--:|--:|--:|--:|--:|
{stages}
"""


def report(steps: Sequence[Step], machine: Machine, picture: str, day: str) -> str:
    """The profile as Markdown."""
    peak, worst = max(steps, key=lambda one: one.rate), max(one.stray for one in steps)
    promised = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))["latency_p95_ms"]
    kept = list(itertools.takewhile(lambda one: one.p95 < promised, steps))
    what, advice = bottleneck(peak, machine)
    held = f"holds up to {kept[-1].connections} connections" if kept else "does not hold"
    if kept and kept[-1] is steps[-1]:
        held += ", the most tried"
    warning = f"- **Do not quote:** other programs used up to {worst:.1f} processors meanwhile.\n"
    figures = [
        f"| {one.connections} | {one.rate:,.0f} | {_ms(one.p50)} | {_ms(one.p95)} | {_ms(one.p99)} "
        f"| {_statuses(one.refused)} | {one.rows_a_call:.1f} | {one.server:.2f} | {one.client:.2f} |"
        for one in steps
    ]
    stages = []
    for one in steps:
        known = [one.stages[name] for name in STAGES]
        cells = [*known, max(0.0, one.stages["total"] - sum(known)), one.stages["total"]]
        stages.append(f"| {one.connections} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return REPORT.format(
        day=day, machine=machine, python=platform.python_version(), picture=picture, peak=peak,
        p99=_ms(peak.p99), promised=promised, held=held, what=what, advice=advice,
        warning=warning if worst > STRAY else "", figures="\n".join(figures), stages="\n".join(stages),
    )  # fmt: skip


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _statuses(refused: dict[int, int]) -> str:
    named = (f"{count} of {status or 'connections lost'}" for status, count in sorted(refused.items()))
    return ", ".join(named) or "0"


def draw(steps: Sequence[Step], path: Path) -> None:
    """Throughput and latency by number of connections; the latency's scale is logarithmic."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, latency = figure.subplots(1, 2)
    names = [str(one.connections) for one in steps]
    rates.bar_label(rates.bar(names, [one.rate for one in steps]), fmt="{:,.0f}")
    rates.set(title="requests a second", xlabel="connections")
    for name, colour in (("p50", "#4878a8"), ("p95", "#d08030"), ("p99", "#b03030")):
        latency.plot(names, [getattr(one, name) for one in steps], "o-", label=name, color=colour)
    latency.set(title="latency, ms", xlabel="connections", yscale="log")
    latency.legend()
    figure.savefig(path)


def write(running: Running, target: Path, seconds: float) -> None:
    """Measure every number of connections and write `target` and the picture beside it."""
    model = running.model()
    drive(running.address, CONNECTIONS[-1], seconds)  # a first time, for caches and connections
    steps = []
    for connections in CONNECTIONS:
        steps.append(step(running, connections, seconds))
        rate, p99 = steps[-1].rate, _ms(steps[-1].p99)
        print(f"profile: {connections} connections, {rate:,.0f} a second, p99 {p99} ms", flush=True)
    machine = Machine(
        workers=len(running.workers()),
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        model=f"model {model['version']} ({model['runtime']}, run as `{model['execution']}`)",
    )
    picture = target.with_suffix(".svg")
    draw(steps, picture)
    target.write_text(report(steps, machine, picture.name, str(datetime.now(UTC).date())), "utf-8")
