"""How many workers this machine carries: measured, not guessed.

the service with 1 and with 2 workers, under load -> memory of each, processor time of a request
-> a table of workers, the number to set, and what limits it
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from app.core.sizing import Machine, default_workers, machine
from load import profile
from load.run import service

ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"
MEMORY_SHARE = 0.8  # the rest is for the system's buffers, and for requests larger than the usual
CONNECTIONS = 64
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What was measured. Memory in bytes, a page that n processes share counted as 1/n in each (PSS)."""

    shared: int | None  # what is there once, however many workers
    worker: int | None  # what each worker adds; None where the system does not tell
    model_seconds: float  # the model's part of one request alone
    request_seconds: float | None  # processor time of a request among many
    execution: str


def pss(pid: int) -> int | None:
    """Bytes of a process and its workers together; None where the system does not tell (not Linux)."""
    total = 0
    try:
        for one in (pid, *profile.workers_of(pid)):
            lines = (profile.PROC / str(one) / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except OSError:
        return None
    return total * 1024


def measure(seconds: float) -> Cost:
    """Start the service with one and then with two workers, load each for `seconds` a step, weigh it."""
    weights: list[int] = []
    for workers in (2, 1):  # what the steps find is then that of one worker
        typer.echo(f"size: measuring with {workers} workers ...", err=True)
        with service(APP_WORKERS=str(workers), APP_METRICS_ENABLED="true") as running:
            busy = profile.step(running.address, running.pid, CONNECTIONS, seconds)
            weight = pss(running.pid)
            weights += [weight] if weight else []
            alone = profile.step(running.address, running.pid, 1, seconds)
            execution = profile.served(running.address)["execution"]
    if not (alone.rate and busy.rate):
        typer.echo(f"size: the service answered nothing with 200; statuses: {busy.refused}", err=True)
        raise typer.Exit(1)
    shared = worker = None
    if len(weights) == 2:
        worker = max(weights[0] - weights[1], 1)
        shared = max(weights[1] - worker, 0)
    request = busy.server / busy.rate if busy.server is not None else None
    return Cost(shared, worker, alone.stages["inference"] / 1000, request, execution)


def carried(cost: Cost, there: Machine) -> int | None:
    """Workers that the memory carries, at least one; None where a worker's memory is not known."""
    if cost.shared is None or cost.worker is None:
        return None
    return max(1, int(there.memory * MEMORY_SHARE - cost.shared) // cost.worker)


def advise(cost: Cost, there: Machine) -> tuple[int, str]:
    """The number of workers to set, and why not more."""
    most = carried(cost, there)
    if most is not None and most < there.cpus:
        return most, f"memory bound: {MEMORY_SHARE:.0%} of the memory carries no more"
    return there.cpus, "CPU bound: beyond one worker a processor, workers add memory and no answers"


def table(cost: Cost, there: Machine) -> str:
    """Workers, their memory, and about how many predictions a second they give."""
    chosen, _ = advise(cost, there)
    lines = ["workers     memory  of the limit   about predictions/s"]
    for workers in sorted({1, 2, 4, 8, there.cpus, chosen}):
        memory = share = "n/a"
        if cost.shared is not None and cost.worker is not None:
            total = cost.shared + workers * cost.worker
            memory, share = f"{total / MIB:,.0f} MiB", f"{total / there.memory:.0%}"
        rate = "n/a"
        if cost.request_seconds:
            rate = f"{min(workers, there.cpus) / cost.request_seconds:,.0f}"
        mark = "  <-" if workers == chosen else ""
        lines.append(f"{workers:>7} {memory:>10} {share:>13} {rate:>21}{mark}")
    return "\n".join(lines)


def size(
    seconds: Annotated[float, typer.Option(help="How long each of the four steps takes.")] = 2.0,
) -> None:
    """Say how many workers this model and this machine carry, from a measurement."""
    there, cost = machine(), measure(seconds)
    workers, reason = advise(cost, there)
    picked = default_workers(ARTIFACTS)
    each = "not available on this system" if cost.worker is None else f"{cost.worker / MIB:.0f} MiB each"
    request = "n/a" if cost.request_seconds is None else f"{cost.request_seconds * 1e6:.0f} µs"
    typer.echo(
        f"machine    {there.cpus} processors, {there.memory / MIB:,.0f} MiB\n"
        f"worker     {each}\n"
        f"model      {cost.model_seconds * 1e6:.0f} µs a row alone, run as `{cost.execution}`\n"
        f"request    {request} of processor time, with {CONNECTIONS} at once\n\n"
        f"{table(cost, there)}\n\n"
        f"{reason}\n"
        f"without APP_WORKERS the service starts {picked}, "
        f"{'the same' if picked == workers else 'from the size of the model file: set it'}\n"
        f"APP_WORKERS={workers}"
    )
