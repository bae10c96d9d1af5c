"""Quotas that workers share through Redis: exact while it is there, and no harm done while it is not."""

import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import httpx2
import pytest

from app.api.security import FAILURES
from tests.service.conftest import EXAMPLE, Service, until
from tests.service.faults.conftest import Fault

Start = Callable[..., Service]
QUOTA, CALLERS = 40, 16


class Redis:
    """Debian's `redis-server` on a port of its own, with nothing kept on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Come up, or come back, on the same port."""
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": "", "appendonly": "no"}
        command = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(["redis-server", *command], stdout=subprocess.DEVNULL)
        until(self._answers, "redis-server")

    def _answers(self) -> bool:
        assert self.process.poll() is None, "redis-server has ended: is its port taken?"
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
        return False

    def end(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of one's own."""
    redis = Redis(tmp_path)
    yield redis
    redis.end()


@pytest.fixture
def shared(start: Start, redis: Redis) -> Service:
    """Two workers with a common quota an hour."""
    return start(rate_limit=f"{QUOTA}/hour", rate_limit_storage=f"redis://127.0.0.1:{redis.port}")


def crowd(service: Service, requests: int, **headers: str) -> Counter[int]:
    """The statuses of that many requests at once, a connection each, so that both workers get their share."""

    def ask(_number: int) -> int:
        url = f"{service.url}/v1/predict"
        return httpx2.post(url, json=EXAMPLE, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(CALLERS) as pool:
        return Counter(pool.map(ask, range(requests)))


def fallbacks(service: Service) -> float:
    """Requests that a worker counted by itself."""
    return service.metrics().get("rate_limit_fallbacks_total", 0.0)


def test_the_quota_is_exact_over_workers(shared: Service, fault: Fault) -> None:
    """Of more requests at once than the quota allows, exactly the quota is answered, by two workers."""
    statuses = crowd(shared, 3 * QUOTA)
    assert statuses == {200: QUOTA, 429: 2 * QUOTA}
    assert fallbacks(shared) == 0
    assert shared.metrics()['requests_shed_total{reason="rate_limit"}'] == 2 * QUOTA
    fault("three times a client's quota", sent=3 * QUOTA, answered=sum(statuses.values()))


def test_failures_are_counted_for_all_workers(start: Start, redis: Redis) -> None:
    """With Redis the throttle for wrong keys is one for all workers; a right key passes it."""
    storage = f"redis://127.0.0.1:{redis.port}"
    service = start(api_keys=sha256(b"right").hexdigest(), rate_limit_storage=storage)
    wrong = crowd(service, FAILURES.amount + 20, **{"x-api-key": "wrong"})
    assert wrong == {401: FAILURES.amount, 429: 20}
    assert crowd(service, 20, **{"x-api-key": "right"}) == {200: 20}


def test_a_killed_redis_refuses_nobody(shared: Service, redis: Redis, fault: Fault) -> None:
    """Without Redis each worker counts by itself; the log says once that it went and once that it is back."""
    assert shared.predict().status_code == 200
    redis.end()
    statuses = crowd(shared, 4 * QUOTA)
    assert statuses.keys() == {200, 429}
    assert QUOTA <= statuses[200] <= 2 * QUOTA
    assert fallbacks(shared) == 4 * QUOTA

    def said(event: str) -> list[dict[str, object]]:
        return [line for line in shared.lines() if line["event"].startswith(f"rate limit storage {event}")]

    assert 1 <= len(said("away")) <= 2  # once a worker
    assert "Connection" in str(said("away")[0]["exception"])
    redis.start()
    # Asked again after a pause: until then, and for the other worker, requests go on as before.
    until(lambda: crowd(shared, 1) and said("back"), "the log to say that Redis is back")
    fault("Redis killed", sent=4 * QUOTA, answered=sum(statuses.values()))


def test_a_redis_that_hangs_holds_up_nobody(shared: Service, redis: Redis, fault: Fault) -> None:
    """A Redis that is there but does not answer is given up on, and every request is answered without it."""
    os.kill(redis.process.pid, signal.SIGSTOP)
    try:
        statuses = crowd(shared, 2 * QUOTA)
    finally:
        os.kill(redis.process.pid, signal.SIGCONT)
    assert statuses.keys() <= {200, 429}
    assert statuses[200] >= QUOTA
    assert fallbacks(shared) == 2 * QUOTA
    fault("Redis hangs", sent=2 * QUOTA, answered=sum(statuses.values()))
