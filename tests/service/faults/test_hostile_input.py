"""Hostile input in quantity, while others work: nobody else notices, and nothing grows."""

import random
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from pathlib import Path

import httpx2
import pytest

from tests.service.conftest import EXAMPLE, Service, assert_answers, moderate_numbers
from tests.service.faults.conftest import Fault
from tests.service.integration.test_hostile_input import (
    BODY,
    CHUNKED,
    LENGTH,
    MALFORMED,
    NOT_HTTP,
    ODD,
    connected,
    ended,
    request,
)

Start = Callable[..., Service]
MIB = 2**20
SLOW_CLIENTS, MALFORMED_REQUESTS, RANDOM_REQUESTS = 200, 10_000, 10_000
CLIENTS = 8  # at a time
KNOWN_PATHS = (
    "/", "/v1/predict", "/v1/predict/batch", "/health", "/ready", "/version", "/docs", "/openapi.json",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "REPORT", "C4N4RY",
)  # fmt: skip


@contextmanager
def steady(service: Service, clients: int = 2) -> Iterator[Counter[int]]:
    """Well-behaved clients that predict without pause; their answers by status once the block has ended."""
    counts: Counter[int] = Counter()
    over = threading.Event()

    def predict() -> Counter[int]:
        own: Counter[int] = Counter()
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            while not (over.is_set() and own):
                own[client.post("/v1/predict", json=EXAMPLE).status_code] += 1
        return own

    with ThreadPoolExecutor(clients) as pool:
        streams = [pool.submit(predict) for _ in range(clients)]
        try:
            yield counts
        finally:
            over.set()
    for stream in streams:
        counts.update(stream.result())  # a lost answer would raise here


def memory(service: Service, kind: str = "VmRSS") -> dict[int, int]:
    """Bytes of each worker, now or (`VmHWM`) at their highest."""
    found = {}
    for pid in service.workers():
        status = Path(f"/proc/{pid}/status").read_text()
        found[pid] = int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0]) * 1024
    return found


def assert_unharmed(service: Service, pids: list[int]) -> None:
    """The same workers as before, no answer was a 5xx, no line of the log is an error, predictions go on."""
    assert service.workers() == pids
    failed = [name for name in service.metrics() if name.startswith("http_requests") and 'status="5' in name]
    assert not [name for name in failed if "/ready" not in name]  # which is 503 until it is 200
    assert not [line for line in service.lines() if line["level"] in ("error", "critical")]
    assert_answers(service.predict().json())


def test_slow_clients_are_left_and_others_are_served(start: Start, fault: Fault) -> None:
    """Two hundred connections that are silent or stop within a request end; predictions go on meanwhile."""
    service = start(header_timeout_seconds=3)
    pids = service.workers()
    beginnings = (b"", b"P", request(LENGTH, body=BODY)[:40], request(b"X: y")[:-2], b"\r\n")
    with ExitStack() as stack, steady(service) as counts:
        slow = [stack.enter_context(connected(service)) for _ in range(SLOW_CLIENTS)]
        for index, connection in enumerate(slow):
            connection.sendall(beginnings[index % len(beginnings)])
        told = [connection.recv(65536) for connection in slow]
        assert all(one == b"" or one.startswith(b"HTTP/1.1 408 ") for one in told)
        assert told.count(b"") == SLOW_CLIENTS // len(beginnings)  # who was silent is told nothing
        assert all(ended(connection) for connection, one in zip(slow, told, strict=True) if one)
    assert counts.keys() == {200}
    assert_unharmed(service, pids)
    refused = SLOW_CLIENTS - told.count(b"")
    assert service.metrics()['http_requests_total{handler="none",method="OTHER",status="408"}'] == refused
    fault("200 connections that stop within a request", sent=counts[200], answered=counts[200])


FLOODS = {
    "headers": (request(b"X: ")[:-4], b"x" * MIB, 431),
    "many headers": (request(b"X: y")[:-2], b"abc: d\r\n" * (MIB // 8), 431),
    "URI": (b"GET /", b"x" * MIB, 414),
    "empty lines": (b"", b"\r\n" * (MIB // 2), 431),
    "body with a length": (request(b"Content-Length: 67108864"), b"x" * MIB, 413),
    "body in chunks": (request(CHUNKED), b"100000\r\n%s\r\n" % (b"x" * MIB), 413),
    "body in tiny chunks": (request(CHUNKED), b"1\r\nx\r\n" * (MIB // 6), 413),
    "trailers": (request(CHUNKED, body=b"1\r\nx\r\n0\r\n"), b"abc: d\r\n" * (MIB // 8), 413),
    "a body nobody asked for": (
        request(b"Content-Length: 67108864", line=b"GET /health HTTP/1.1"), b"x" * MIB, 200
    ),
}  # fmt: skip


@pytest.mark.parametrize("of", FLOODS)
def test_a_flood_is_not_kept(start: Start, fault: Fault, of: str) -> None:
    """Eight clients who send 64 MB each, of headers, bodies or nothing, cost the service a few MB at most."""
    beginning, more, status = FLOODS[of]
    # Patient, for this is about memory: a busy machine must not make it one about time.
    service = start(header_timeout_seconds=60, request_deadline_seconds=60, drain_seconds=70)
    pids = service.workers()
    for _ in range(50):
        assert service.predict().status_code == 200
    before = memory(service, "VmHWM")

    def flood(_: int) -> bytes:
        with connected(service) as connection:
            with suppress(ConnectionError):  # refused before the end, and gone
                connection.sendall(beginning)
                for _ in range(64):
                    connection.sendall(more)
            with suppress(ConnectionError):
                return connection.recv(65536)
        return b""

    with steady(service) as counts, ThreadPoolExecutor(CLIENTS) as pool:
        told = list(pool.map(flood, range(CLIENTS)))
    assert {one[:13] for one in told} <= {b"HTTP/1.1 %d " % status, b""}
    assert counts.keys() == {200}
    assert_unharmed(service, pids)
    grown = {pid: size - before[pid] for pid, size in memory(service, "VmHWM").items()}
    assert max(grown.values()) < 48 * MIB, grown
    fault(f"8 times 64 MB: {of}", sent=counts[200], answered=counts[200])


def requests_gone_wrong(seed: int) -> Iterator[bytes]:
    """Requests cut, doubled, spliced, flipped and stuffed; endless, and the same for the same seed."""
    draw = random.Random(seed)
    bodies = [request(b"Content-Length: %d" % len(body), body=body) for body in MALFORMED.values()]
    seeds = [*NOT_HTTP.values(), *ODD.values(), *(one for one in bodies if len(one) < 10_000)]
    stuffing = [
        b"\r", b"\n", b"\r\n\r\n", b"\0", b"\xff", b" ", b"\t", b":", b"%", b"/", b"0" * 300, b"-1", b"HTTP/",
        b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n", b"{", b"[" * 999,
    ]  # fmt: skip
    while True:
        content = bytearray(draw.choice(seeds))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content) + 1)
            end = min(len(content), at + draw.randint(1, 40))
            match draw.randrange(6):
                case 0:
                    del content[at:end]
                case 1:
                    content[at:at] = content[at:end]
                case 2:
                    content[at:at] = draw.choice(stuffing)
                case 3:
                    content[at:end] = draw.randbytes(end - at)
                case 4:
                    content[at:] = draw.choice(seeds)[at:]
                case _ if at:
                    del content[at:]
        yield bytes(content)


def test_ten_thousand_malformed_requests_break_nothing(start: Start, fault: Fault) -> None:
    """None of them gets a 5xx or ends a worker, the memory stays level, and others are served meanwhile."""
    service = start(header_timeout_seconds=3)
    pids, address = service.workers(), httpx2.URL(service.url)

    def send(content: bytes) -> list[int]:
        """The statuses of what came back until the end, or until nothing more did for a while."""
        said = b""
        with socket.create_connection((address.host, address.port), 10) as connection, suppress(OSError):
            connection.sendall(content)
            connection.settimeout(0.1)
            while more := connection.recv(65536):
                said += more
                connection.settimeout(0.01)
        return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", said, re.MULTILINE)]

    made = requests_gone_wrong(seed=4)
    statuses: Counter[int] = Counter()
    sizes = []
    with steady(service, 1) as counts, ThreadPoolExecutor(CLIENTS) as pool:
        for part in (2000, MALFORMED_REQUESTS):
            for found in pool.map(send, (next(made) for _ in range(part))):
                statuses[max(found, default=0)] += 1
            sizes.append(max(memory(service).values()))
    assert counts.keys() == {200}
    assert max(statuses) < 500
    assert sum(statuses.values()) - statuses[200] >= MALFORMED_REQUESTS, statuses
    assert_unharmed(service, pids)
    assert sizes[1] - sizes[0] < 16 * MIB, sizes
    answered = counts[200] + sum(statuses.values()) - statuses[0]  # 0: it stopped within a request, and left
    fault("more than 10,000 malformed requests", sent=answered, answered=answered)


def test_ten_thousand_paths_and_methods_make_no_series(start: Start, fault: Fault) -> None:
    """However many paths and methods strangers invent, a scrape has as many names as before."""
    service = start()
    pids = service.workers()

    def send(calls: list[tuple[str, str]]) -> list[int]:
        connection = service.connection()
        found = []
        for method, path in calls:
            connection.request(method, path)
            answer = connection.getresponse()
            answer.read()
            found.append(answer.status)
        connection.close()
        return found

    send(list(product(METHODS, (*KNOWN_PATHS, "/metrics", "/unknown"))))
    service.predict()
    before = service.metrics().keys()
    draw = random.Random(4)
    letters = "abc019-._~!$&'()*+,;=:@/%20%0a%00%ff%F0%9F%98%80"

    def path() -> str:
        if draw.random() < 0.2:
            return draw.choice(KNOWN_PATHS) + "?" + "".join(draw.choices(letters, k=9)).replace("%", "")
        return "/" + "".join(draw.choices(letters, k=draw.randint(1, 60)))

    calls = [(draw.choice(METHODS), path()) for _ in range(RANDOM_REQUESTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        shares = [calls[first::CLIENTS] for first in range(CLIENTS)]
        statuses = Counter(status for found in pool.map(send, shares) for status in found)
    assert service.metrics().keys() == before
    assert max(statuses) < 500
    assert_unharmed(service, pids)
    fault("10,000 random paths and methods", sent=RANDOM_REQUESTS, answered=sum(statuses.values()))


def test_generated_sequences_find_no_fault(start: Start, fault: Fault, tmp_path: Path) -> None:
    """Predictions and batches made of each other, along the API's links: each answer is as documented."""
    service = start()
    pids, before, url = service.workers(), service.metrics(), f"{service.url}/openapi.json"
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", url, "--phases", "stateful",
         "--checks", "all", "--max-examples", "50", "--seed", "1", "--continue-on-failure", "--no-color"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=moderate_numbers(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    links = re.search(r"API Links: +(\d+) covered / (\d+) selected", done.stdout)
    assert links, done.stdout
    assert int(links[1]) == int(links[2]) >= 2
    assert service.workers() == pids
    counts: Counter[str] = Counter()
    for name, count in service.metrics().items():
        if name.startswith("http_requests_total") and 'handler="/v1' in name:
            counts[name.partition('status="')[2][:3]] += int(count - before.get(name, 0))
    assert counts["200"] > 0
    assert max(counts) < "500"
    sent = sum(counts.values())
    fault("generated sequences along the API's links", sent=sent, answered=sent)
