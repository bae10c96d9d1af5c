"""Measures how many workers this machine can run.

the service with 1 and with 2 workers, under load -> memory of each, processor time of a request
-> a table of workers, the number to set, and the reason
"""

from dataclasses import dataclass
from typing import Annotated

import psutil
import typer

from app.core.batcher import MAX_BYTES
from app.rollout.fleet import Machine, default_workers, machine
from lifecycle.command import ROOT, LifecycleError, table
from lifecycle.operations.programs import service
from load.run import step

MEMORY_SHARE = 0.8  # the rest is for system buffers
CONNECTIONS = 64
MIB = 2**20


def size(
    seconds: Annotated[float, typer.Option(help="How long each of the four steps takes.")] = 2.0,
) -> None:
    """Measure how many workers suit this model and this machine."""
    cost, there = measure(seconds), machine()
    workers, reason = advise(cost, there)
    picked = default_workers(ROOT / "artifacts")
    each = "not available on this system"
    if cost.worker is not None:
        each = f"{cost.worker / MIB:.0f} MiB each, {MAX_BYTES / MIB:.0f} of them for requests"
    typer.echo(
        f"machine    {there.cpus} processors, {there.memory / MIB:,.0f} MiB\n"
        f"worker     {each}\n"
        f"model      {cost.model_seconds * 1e6:.0f} µs a row alone, run as `{cost.execution}`\n"
        f"request    {cost.request_seconds * 1e6:.0f} µs of processor time, with {CONNECTIONS} at once\n\n"
        f"{size_table(cost, there)}\n\n"
        f"{reason}\n"
        f"without APP_WORKERS the service starts {picked}, "
        f"{'the same' if picked == workers else 'from the size of the model file: set it'}\n"
        f"APP_WORKERS={workers}"
    )


@dataclass(frozen=True)
class Cost:
    """Measurements. Memory in bytes; a page shared by n processes counts as 1/n in each (PSS)."""

    shared: int | None  # memory that all workers share; None if the system has no PSS
    worker: int | None  # memory that each worker adds, with all the requests that may wait in it
    model_seconds: float  # time in the model, for a request alone
    request_seconds: float  # processor time of a request among many
    execution: str


def measure(seconds: float) -> Cost:
    """Start the service with two workers and then with one; measure both under load, `seconds` per step."""
    weights: list[int] = []
    for workers in (2, 1):  # in this order: `busy` and `alone` must be of one worker
        typer.echo(f"size: measuring with {workers} workers ...", err=True)
        with service(APP_WORKERS=str(workers), APP_METRICS_ENABLED="true") as running:
            busy = step(running, CONNECTIONS, seconds)
            if psutil.LINUX:  # other systems have no PSS
                processes = (running.process, *running.workers())
                weights.append(sum(one.memory_full_info().pss for one in processes))
            alone = step(running, 1, seconds)
            execution = running.model()["execution"]
    if not (alone.rate and busy.rate):
        raise LifecycleError(f"the service answered nothing with 200; statuses: {busy.refused}")
    idle = max(weights[0] - weights[1], 1) if weights else None
    shared, worker = (max(weights[1] - idle, 0), idle + MAX_BYTES) if idle else (None, None)
    return Cost(shared, worker, alone.stages["inference"] / 1000, busy.server / busy.rate, execution)


def carried(cost: Cost, there: Machine) -> int | None:
    """Number of workers that fit into memory, at least one; None if a worker's memory is unknown."""
    if cost.shared is None or cost.worker is None:
        return None
    return max(1, int(there.memory * MEMORY_SHARE - cost.shared) // cost.worker)


def advise(cost: Cost, there: Machine) -> tuple[int, str]:
    """The number of workers to set, and the reason why not more."""
    most = carried(cost, there)
    if most is not None and most < there.cpus:
        return most, f"memory bound: {MEMORY_SHARE:.0%} of the memory carries no more"
    return there.cpus, "CPU bound: beyond one worker a processor, workers add memory and no answers"


def size_table(cost: Cost, there: Machine) -> str:
    """A table of workers, their memory, and about how many predictions a second they give."""
    chosen, _ = advise(cost, there)
    rows = []
    for workers in sorted({1, 2, 4, 8, there.cpus, chosen}):
        memory = share = "n/a"
        if cost.shared is not None and cost.worker is not None:
            total = cost.shared + workers * cost.worker
            memory, share = f"{total / MIB:,.0f} MiB", f"{total / there.memory:.0%}"
        rate = f"{min(workers, there.cpus) / cost.request_seconds:,.0f}"
        rows.append((workers, memory, share, rate, "<-" if workers == chosen else ""))
    return table(("workers", "memory", "of the limit", "about predictions/s", ""), rows)
