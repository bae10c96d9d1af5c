"""Steady arrivals at a share of the capacity: python -m benchmarks.open_loop --connections 1000 --share 0.85.

a copy of the artifacts -> 64 connections that ask again when answered -> capacity
    -> keep-alive connections, on each a request every connections / rate seconds -> what came back

A request is due at its time however late the answers before it are, and latency counts from that time, as in
wrk2. Clients and service share the machine, so the generator's processor time is printed, too.
"""

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.swap import memory, p99, ready, serving, status_of
from tests.service.where import ROOT as SERVICE

WARM_SECONDS, CAPACITY_SECONDS, CAPACITY_CONNECTIONS = 3.0, 6.0, 64
PATIENCE_SECONDS = 12.0  # after the last request
SLOW_SECONDS = 0.02  # of the slow model for a row


class Client(asyncio.Protocol):
    """One keep-alive connection with requests that are due at certain times."""

    def __init__(self, request: bytes, answers: list[tuple[float, float, int]], interval: float) -> None:
        self._request, self._answers, self._interval = request, answers, interval
        self._buffer, self._due = b"", 0.0
        self._busy = self.stopped = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # it is TCP

    def begin(self, after: float) -> None:
        """Let the first request be due in so many seconds."""
        loop = asyncio.get_running_loop()
        self._due = time.perf_counter() + after
        loop.call_later(after, self._ask)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._buffer += data
        status = status_of(self._buffer)
        if status is None:
            return
        now = time.perf_counter()
        self._answers.append((self._due, now - self._due, status))
        self._buffer, self._busy = b"", False
        self._due += self._interval
        if not self._interval:
            self._due = now
        if self._due <= now:
            self._ask()
        else:
            asyncio.get_running_loop().call_later(self._due - now, self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._busy:
            self._answers.append((self._due, 0.0, 0))

    def _ask(self) -> None:
        if not self.stopped and not self._transport.is_closing():
            self._busy = True
            self._transport.write(self._request)

    def end(self) -> None:
        """Close, and count a request without an answer."""
        self._transport.close()


def prepare(folder: Path, model: str) -> bytes:
    """Artifacts with the model to serve; a body for it."""
    artifacts = folder / "artifacts"
    shutil.copytree(SERVICE / "artifacts", artifacts)
    served = json.loads((artifacts / "release.json").read_text())["serving"]
    (first, *_) = (artifacts / served / "golden.jsonl").read_text().splitlines()
    if model == "slow":
        from tests.service.gameday.day import SINES, width_for
        from tests.service.gameday.trial import Trouble, make_trial

        make_trial(artifacts / served, Trouble(sines=SINES, width=width_for(artifacts, SLOW_SECONDS)))
    return json.dumps(json.loads(first)["features"]).encode()


async def drive(port: int, body: bytes, connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """Ask for `seconds` after a warm-up, at `rate` a second in all or, without one, when answered."""
    lines = ["POST /v1/predict HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    request = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body
    answers: list[tuple[float, float, int]] = []
    interval, loop = connections / rate if rate else 0.0, asyncio.get_running_loop()
    clients = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: Client(request, answers, interval), "127.0.0.1", port
        )
        clients.append(client)
    for index, client in enumerate(clients):
        client.begin(interval * index / connections)
    start, used = time.perf_counter() + WARM_SECONDS, time.process_time()
    end = start + seconds
    await asyncio.sleep(end - time.perf_counter())
    used = (time.process_time() - used) / (WARM_SECONDS + seconds)
    for client in clients:
        client.stopped = True
    waited = time.perf_counter()
    while any(client._busy for client in clients) and time.perf_counter() < waited + PATIENCE_SECONDS:
        await asyncio.sleep(0.1)
    for client in clients:
        client.end()
    inside = [(took, status) for due, took, status in answers if start <= due < end]
    done = sum(status == 200 and start <= due + took < end for due, took, status in answers)
    took = [seconds for seconds, status in inside if status == 200]
    return {
        "rate": done / seconds,
        "statuses": Counter(status for _, status in inside),
        "p50": 1000 * sorted(took)[len(took) // 2] if took else 0.0,
        "p99": p99(took) if took else 0.0,
        "generator": used,
    }


def shares(master: int) -> list[int]:
    """Connections of each worker."""
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in children]


async def measure(folder: Path, port: int, master: int, body: bytes, options: argparse.Namespace) -> None:
    """Drive, and print what was seen."""
    await ready((folder / "log").open("rb"), options.workers)
    capacity = (
        options.capacity or (await drive(port, body, CAPACITY_CONNECTIONS, 0, CAPACITY_SECONDS))["rate"]
    )
    print(f"{options.model} model, {options.workers} workers: {capacity:,.0f} requests/s on 64 connections")
    for connections in options.connections:
        for share in options.share:
            running = asyncio.create_task(drive(port, body, connections, share * capacity, options.seconds))
            await asyncio.sleep(WARM_SECONDS + options.seconds * 0.7)
            files, before = shares(master), memory(master)
            seen = await running
            total = sum(seen["statuses"].values())
            refused = total - seen["statuses"][200]
            print(
                f"{connections} connections, {share:g} of the capacity: {seen['rate']:,.0f} answered/s "
                f"({seen['rate'] / capacity:.2f}), refused {refused / max(total, 1):.2%}, "
                f"p50 {seen['p50']:.0f} ms, p99 {seen['p99']:.0f} ms, {dict(seen['statuses'])}, "
                f"files of the workers {files}, memory {before:.0f} MB, "
                f"generator {seen['generator']:.2f} processors"
            )


def main() -> None:
    """Measure the service with the model that comes with the template, or one of 20 ms a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "slow"), default="tiny")
    parser.add_argument("--connections", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--share", type=float, nargs="+", default=[0.85])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--capacity", type=float, help="requests/s, where it was measured before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        body = prepare(folder, options.model)
        with serving(folder, options.workers) as (port, master):
            uvloop.run(measure(folder, port, master, body, options))


if __name__ == "__main__":
    main()
