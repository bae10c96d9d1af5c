"""`python -m load.run`: start the service on a free port, load it, stop it; exits with the gate's code.

    service -> locust (load/locustfile.py) -> percentiles, verdict, load/report.html
    service -> 1, 4, 16, 64 keep-alive connections, each asks again when answered -> latencies
    /metrics and processor time before and after each step -> the bottleneck: load/profile.md and .svg

The clients share this machine with the service, so their processor time is measured and reported too.
"""

import asyncio
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Annotated
from urllib.parse import urlsplit

import httpx2
import numpy as np
import psutil
import typer
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from app.rollout.fleet import machine
from lifecycle.command import ROOT
from lifecycle.operations.programs import Running, golden_rows, service

CONNECTIONS = (1, 4, 16, 64)
PATH = "/v1/predict"
STAGES = ("queue", "preprocess", "inference", "postprocess")
LAST_ANSWER_SECONDS = 30.0
BUSY = 0.9  # share of the processors that counts as all: scheduling loses some
STRAY = 0.25  # above this use of processors by other programs, figures must not be quoted

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    users: Annotated[int, typer.Option(help="Clients at once.")] = 20,
    seconds: Annotated[int, typer.Option(help="How long locust loads the service.")] = 15,
    report: Annotated[Path, typer.Option(help="The HTML report.")] = ROOT / "load/report.html",
    profile: Annotated[Path, typer.Option(help="The profile, Markdown.")] = ROOT / "load/profile.md",
    step_seconds: Annotated[
        float, typer.Option(help="For each number of connections of the profile; 0 leaves it out.")
    ] = 3,
) -> None:
    """Load the service and judge it. Other options go to locust, such as --p95-ms or --error-ratio."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the service is stopped too
    with service(APP_METRICS_ENABLED="true") as running:
        print(f"load: {users} clients for {seconds} s", flush=True)
        locust = [sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--only-summary"]
        locust += ["--host", running.address, "--users", str(users), "--spawn-rate", str(users)]
        locust += ["--run-time", f"{seconds}s", "--html", str(report.resolve()), *context.args]
        code = subprocess.run(locust, cwd=ROOT, check=False).returncode  # noqa: S603  # as typed by the user
        print(f"load: report in {report}")
        if step_seconds:
            write_profile(running, profile, step_seconds)
            print(f"load: profile in {profile}")
    raise typer.Exit(code)


@dataclass
class Answers:
    """Answers to the clients of one step."""

    seconds: list[float] = field(default_factory=list)  # of each 200
    others: Counter[int] = field(default_factory=Counter)  # other statuses; 0 is a lost connection


async def _drive(address: str, connections: int, seconds: float) -> Answers:
    """Send predictions on `connections` connections for `seconds`."""
    answers, where, end = Answers(), urlsplit(address), perf_counter() + seconds
    key = f"X-API-Key: {os.environ['LOAD_API_KEY']}\r\n" if os.environ.get("LOAD_API_KEY") else ""
    head = f"POST {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n{key}"
    bodies = [json.dumps(row["features"]).encode() for row in golden_rows()[1]]
    requests = itertools.cycle(
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies
    )

    async def client() -> None:
        """One keep-alive connection: send a request after each answer."""
        try:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            while (sent := perf_counter()) < end:
                writer.write(next(requests))
                answer = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"\r\ncontent-length: *(\d+)", answer, re.IGNORECASE)
                await reader.readexactly(int(length[1] if length else 0))
                if (status := int(answer[9:12])) == 200:
                    answers.seconds.append(perf_counter() - sent)
                else:
                    answers.others[status] += 1
            writer.close()
        except (OSError, asyncio.IncompleteReadError):
            answers.others[0] += 1

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    _, silent = await asyncio.wait(clients, timeout=seconds + LAST_ANSWER_SECONDS)
    answers.others[0] += len(silent)
    return answers


@dataclass(frozen=True)
class Step:
    """Measurements with one number of connections; times in milliseconds, processors in use on average."""

    connections: int
    rate: float  # answers with 200 per second
    p50: float
    p95: float
    p99: float
    refused: dict[int, int]  # answers other than 200, by status
    refused_share: float
    stages: dict[str, float]  # mean milliseconds of a request, and "total"
    rows_a_call: float
    client: float
    server: float
    model: float  # part of `server` in calls of the model, approximately
    stray: float  # processors used by other programs


def _scrape(running: Running) -> list[Sample]:
    families = text_string_to_metric_families(httpx2.get(f"{running.address}/metrics").text)
    return [sample for family in families for sample in family.samples]


def _processor_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def step(running: Running, connections: int, seconds: float) -> Step:
    """Measure with one number of connections."""
    users, before = (running.workers(), [psutil.Process()]), _scrape(running)
    psutil.cpu_percent()  # the next call returns the use since this one
    began, used = perf_counter(), np.array([*map(_processor_seconds, users)])
    answers = uvloop.run(_drive(running.address, connections, seconds))
    took = perf_counter() - began
    server, client = ((np.array([*map(_processor_seconds, users)]) - used) / took).tolist()
    busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    after = _scrape(running)

    def grown(name: str, labels: dict[str, str]) -> float:
        was, now = (
            sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())
            for samples in (before, after)
        )
        return now - was

    def mean(name: str, **labels: str) -> float:
        return grown(f"{name}_sum", labels) / max(grown(f"{name}_count", labels), 1)

    stages = {name: 1000 * mean("inference_stage_duration_seconds", stage=name) for name in STAGES}
    stages["total"] = 1000 * mean("http_request_duration_seconds", handler=PATH)
    p50, p95, p99 = (1000 * np.quantile(answers.seconds or [np.nan], (0.5, 0.95, 0.99))).tolist()
    good, others = len(answers.seconds), answers.others.total()
    return Step(
        connections, good / took, p50, p95, p99, refused=+answers.others,
        refused_share=others / max(others + good, 1),
        stages=stages, rows_a_call=mean("inference_batch_rows"), client=client, server=server,
        model=stages["inference"] / 1000 * grown("inference_batch_rows_count", {}) / took,
        stray=max(0.0, busy - server - client),
    )  # fmt: skip


def bottleneck(peak: Step, workers: int, cpus: int) -> tuple[str, str]:
    """The bottleneck at the highest throughput, and advice."""
    if peak.refused.get(503, 0) and peak.refused_share > 0.01:
        return (
            f"Admission: {peak.refused_share:.0%} were refused, so that the rest was answered in time.",
            "More workers or machines; unset `APP_MAX_QUEUE` if it is set and the latency may still grow.",
        )
    if not peak.rate:
        return "Unknown: no request was answered with 200.", "Find out why, from the statuses below."
    share = min(1.0, peak.model / max(peak.server, 1e-9))
    used = f"{1e6 * peak.server / peak.rate:.0f} µs of processor time a request"
    cost = f"{used}, {share:.0%} of it in the model, the rest in HTTP and validation"
    per_processor = f"`APP_WORKERS={cpus}`, one a processor; more would take memory and answer no more."
    if peak.server >= BUSY * min(workers, cpus):
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
    slowest = max(STAGES, key=peak.stages.__getitem__)
    return (
        f"Waiting, not processors: the workers used {peak.server:.1f} of {cpus}. The longest stage is "
        f"`{slowest}`.",
        "More connections would be answered as well. If the stage is `queue`, look at "
        "`APP_BATCH_MAX_WAIT_MS` and at models that run one call at a time.",
    )


def report(steps: Sequence[Step], workers: int, cpus: int, model: str, picture: str) -> str:
    """The profile as Markdown."""
    peak, stray = max(steps, key=lambda one: one.rate), max(one.stray for one in steps)
    promised = tomllib.loads((ROOT / "slo.toml").read_text("utf-8"))["latency_p95_ms"]
    kept = [one.connections for one in itertools.takewhile(lambda one: one.p95 < promised, steps)]
    held = f"holds up to {kept[-1]} connections, of {CONNECTIONS[-1]} tried" if kept else "does not hold"
    what, advice = bottleneck(peak, workers, cpus)
    warning = f"- **Do not quote:** other programs used up to {stray:.1f} processors meanwhile.\n"
    figures = []
    for one in steps:
        lost = ", ".join(
            f"{n} of {status or 'connections lost'}" for status, n in sorted(one.refused.items())
        )
        times = " | ".join(map(_ms, (one.p50, one.p95, one.p99)))
        parts = " | ".join(f"{one.stages[name]:.3f}" for name in (*STAGES, "total"))
        figures.append(
            f"| {one.connections} | {one.rate:,.0f} | {times} | {lost or 0} | {one.rows_a_call:.1f} "
            f"| {one.server:.2f} | {one.client:.2f} | {parts} |"
        )
    return f"""\
# Performance profile

Written by `make load` on {datetime.now(UTC).date()}: {model}; {workers} workers, \
{cpus} processors, shared with the load generator; Python {platform.python_version()}.
One instance per request; each connection sends the next request after an answer. With many connections the \
latency is mostly waiting for earlier requests.

![Throughput and latency by number of connections]({picture})

- **Peak:** {peak.rate:,.0f} predictions a second at {peak.connections} connections, p99 {_ms(peak.p99)} ms.
- **Promise:** p95 below {promised:g} ms {held}.
- **First bottleneck:** {what}
- **Workers:** {advice} `make size` measures how many workers fit into memory.
{warning if stray > STRAY else ""}
The stages are mean milliseconds of a request inside the service, from `/metrics`. The rest of `total` is \
HTTP, validation and waiting for other requests.

| connections | requests/s | p50 ms | p95 ms | p99 ms | not 200 | rows a model call | processors: workers \
| load generator | {" | ".join(STAGES)} | total |
|{"--:|" * (10 + len(STAGES))}
{chr(10).join(figures)}
"""


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def draw(steps: Sequence[Step], path: Path) -> None:
    """Throughput and latency by number of connections, latency on a logarithmic scale."""
    from matplotlib.figure import Figure  # here: takes a second

    figure = Figure(figsize=(9, 4), layout="constrained")
    rates, latency = figure.subplots(1, 2)
    names = [str(one.connections) for one in steps]
    rates.bar_label(rates.bar(names, [one.rate for one in steps]), fmt="{:,.0f}")
    rates.set(title="requests a second", xlabel="connections")
    for name in ("p50", "p95", "p99"):
        latency.plot(names, [getattr(one, name) for one in steps], "o-", label=name)
    latency.set(title="latency, ms", xlabel="connections", yscale="log")
    latency.legend()
    figure.savefig(path)


def write_profile(running: Running, target: Path, seconds: float) -> None:
    """Measure all numbers of connections; write `target` and the picture beside it."""
    step(running, CONNECTIONS[-1], seconds)  # warm up caches and connections
    steps = []
    for connections in CONNECTIONS:
        steps.append(step(running, connections, seconds))
        rate, p99 = steps[-1].rate, _ms(steps[-1].p99)
        print(f"profile: {connections} connections, {rate:,.0f} a second, p99 {p99} ms", flush=True)
    found = running.model()
    model = f"model {found['version']} ({found['runtime']}, run as `{found['execution']}`)"
    picture, cpus = target.with_suffix(".svg"), machine().cpus
    draw(steps, picture)
    target.write_text(report(steps, len(running.workers()), cpus, model, picture.name), "utf-8")


if __name__ == "__main__":
    command(prog_name="python -m load.run")
