"""What releases cost a service under load: python -m benchmarks.swap, ARGS: --connections 64 --swaps 20.

a copy of the service's folder -> 64 keep-alive connections -> p99 before
                               -> a release every few seconds -> p99 of the seconds around each, memory (PSS)

Clients and service share the machine, so only the ratio means anything. The target: at most 3 times the p99
before, no failed request, and memory that stays.
"""

import argparse
import asyncio
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import uvloop

from scripts.demo import free_port
from scripts.render import ROOT

SERVICE = ROOT / "{{cookiecutter.service_name}}"
BEFORE_SECONDS, AROUND_SECONDS, BETWEEN_SECONDS = 10.0, 2.0, 4.0


def status_of(answer: bytes) -> int | None:
    """The status of an answer; None if it is not complete yet."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
    return int(head[9:12]) if separator and len(body) >= int(length or 0) else None


class Client(asyncio.Protocol):
    """One keep-alive connection: asks again when answered, and notes when it was and how long it took."""

    def __init__(self, request: bytes, answers: list[tuple[float, float, int]]) -> None:
        self._request, self._answers = request, answers
        self._buffer, self._sent = b"", 0.0
        self.ending = False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # it is TCP
        self._ask()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._buffer += data
        status = status_of(self._buffer)
        if status is None:
            return
        now = time.perf_counter()
        self._answers.append((now, now - self._sent, status))
        self._buffer = b""
        if self.ending:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio; a connection that ends before it is to is an answer that failed."""
        if not self.ending:
            self._answers.append((time.perf_counter(), 0.0, 0))
        self.done.set_result(None)

    def _ask(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)


@contextmanager
def serving(folder: Path, workers: int) -> Iterator[tuple[int, int]]:
    """The service with artifacts of its own; its port and the process id of its master."""
    port, log = free_port(), folder / "log"
    settings = {"HOST": "127.0.0.1", "PORT": port, "WORKERS": workers, "ARTIFACTS_DIR": folder / "artifacts"}
    own = {name: value for name, value in os.environ.items() if not name.startswith("APP_")}
    variables = own | {f"APP_{name}": str(value) for name, value in settings.items()}
    line = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    with log.open("wb") as output:
        process = subprocess.Popen(line, cwd=SERVICE, env=variables, stdout=output, stderr=output)
    try:
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def release(folder: Path, version: str) -> None:
    """Change release.json as a promotion does."""
    path = folder / "artifacts" / "release.json"
    new = path.with_name("new")
    new.write_text(json.dumps(json.loads(path.read_text()) | {"serving": version}))
    new.replace(path)


def memory(master: int) -> float:
    """Megabytes (PSS) of the master and its workers."""
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (master, *children)]
    return (
        sum(int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:"))
        / 1024
    )


def p99(seconds: list[float]) -> float:
    """Milliseconds within which 99 of 100 came."""
    return 1000 * sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


async def ready(log: BinaryIO, workers: int) -> None:
    """Wait until so many workers have said in the rest of the log that they serve a version."""
    seen = 0
    while seen < workers:
        await asyncio.sleep(0.05)
        seen += log.read().count(b'"event":"ready"')  # a line cut in two would be missed; lines come whole


async def measure(folder: Path, port: int, master: int, options: argparse.Namespace) -> None:
    """Drive, release, and print what was seen."""
    artifacts = folder / "artifacts"
    served = json.loads((artifacts / "release.json").read_text())["serving"]
    (first, *_) = (artifacts / served / "golden.jsonl").read_text().splitlines()
    body = json.dumps(json.loads(first)["features"]).encode()
    lines = ["POST /v1/predict HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    log = (folder / "log").open("rb")
    await ready(log, options.workers)
    answers: list[tuple[float, float, int]] = []
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(options.connections):
        _, client = await loop.create_connection(
            partial(Client, head.encode() + body, answers), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.sleep(BEFORE_SECONDS / 2)
    start, other, sizes, releases = time.perf_counter(), f"v{int(served[1:]) + 1}", [], []
    await asyncio.sleep(BEFORE_SECONDS)
    end, before_memory = time.perf_counter(), memory(master)
    for count in range(options.swaps):
        log.seek(0, os.SEEK_END)
        began = time.perf_counter()
        release(folder, (other, served)[count % 2])
        await ready(log, options.workers)
        releases.append((began, time.perf_counter()))
        await asyncio.sleep(BETWEEN_SECONDS)
        sizes.append(memory(master))
    for client in clients:
        client.ending = True
    await asyncio.gather(*(client.done for client in clients))
    before = p99([seconds for at, seconds, _ in answers if start <= at < end])
    during = [
        p99([seconds for at, seconds, _ in answers if began <= at < ended + AROUND_SECONDS])
        for began, ended in releases
    ]
    failed = sum(status != 200 for _, _, status in answers)
    rate = sum(start <= at < end for at, _, _ in answers) / (end - start)
    print(f"{options.connections} connections, {options.workers} workers, {rate:,.0f} requests/s before")
    print(f"{len(answers):,} requests, {failed} failed, over {options.swaps} releases")
    middle, worst = statistics.median(during), max(during)
    print(f"p99 before: {before:.1f} ms; around a release: median {middle:.1f}, worst {worst:.1f} ms")
    print(f"ratio to the p99 before: median {middle / before:.2f}, worst {worst / before:.2f}")
    print(
        f"memory (PSS) {before_memory:.1f} MB before; after each release: "
        + " ".join(f"{one:.0f}" for one in sizes)
    )


def main() -> None:
    """Measure a service with the model that comes with the template."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = folder / "artifacts"
        shutil.copytree(SERVICE / "artifacts", artifacts)
        served = json.loads((artifacts / "release.json").read_text())["serving"]
        other = artifacts / f"v{int(served[1:]) + 1}"
        shutil.copytree(artifacts / served, other)
        manifest = other / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": other.name}))
        with serving(folder, options.workers) as (port, master):
            uvloop.run(measure(folder, port, master, options))


if __name__ == "__main__":
    main()
