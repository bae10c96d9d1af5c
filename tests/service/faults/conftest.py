"""Sends requests while a fault lasts, and reports how each of them ended.

load(url) -> Load.counts() -> fault("kill -9", sent=..., answered=..., ...) -> tests/service/reliability.py
"""

import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.service.conftest import EXAMPLE, PATIENCE_SECONDS, Document, assert_golden, recorded, until
from tests.service.reliability import row

PREDICTION = json.dumps(EXAMPLE).encode()
Fault = Callable[..., None]


class Load:
    """Clients that predict one thing after the other, each on its own connection as long as that is open.

    `ends` counts how each request ended: `answered`, `refused` with 503, or `lost`. A connection that nobody
    accepts is no request: its client goes home.
    """

    def __init__(self, url: str, row: Document) -> None:
        self._address, self._row = httpx2.URL(url), row
        self._ends: list[Counter[str]] = []  # of each client
        self.over = threading.Event()

    @property
    def ends(self) -> Counter[str]:
        """How the requests of all clients ended so far."""
        return sum(self._ends, Counter())

    def client(self) -> None:
        """One client, until it is over."""
        ends: Counter[str] = Counter()
        self._ends.append(ends)
        connection = http.client.HTTPConnection(
            self._address.host, self._address.port, timeout=PATIENCE_SECONDS
        )
        while not self.over.is_set():
            try:
                connection.request("POST", "/v1/predict", PREDICTION)
                answer = connection.getresponse()
                document = json.loads(answer.read())
            except ConnectionRefusedError:
                break
            except (OSError, http.client.HTTPException):
                connection.close()
                ends["lost"] += 1
                continue
            if answer.status == 503:
                assert document["code"] in ("overloaded", "model_timeout")
                assert int(answer.headers["retry-after"]) > 0
                ends["refused"] += 1
            else:
                assert answer.status == 200
                assert_golden(self._row, document)
                ends["answered"] += 1
        connection.close()

    def flows(self, more: int = 200) -> None:
        """Return when that many more requests have been answered."""
        enough = self.ends["answered"] + more
        until(lambda: self.ends["answered"] >= enough, "answers")

    def counts(self) -> dict[str, int]:
        """What `fault` wants to know."""
        ends = self.ends
        return {"sent": ends.total(), **{end: ends[end] for end in ("answered", "refused", "lost")}}


@contextmanager
def load(url: str, clients: int = 8, artifacts: Path | None = None) -> Iterator[Load]:
    """That many clients, sending until the end of the block or of the service."""
    one = Load(url, recorded(EXAMPLE, "v1", artifacts) if artifacts else recorded(EXAMPLE))
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(one.client) for _ in range(clients)]
        try:
            one.flows()
            yield one
        finally:
            one.over.set()
    for client in running:
        client.result()


@pytest.fixture
def fault(record_property: Callable[[str, object], None]) -> Fault:
    """`fault(name, sent=, answered=, refused=, lost=)`: what a test injected, and what became of requests."""

    def report(name: str, *, sent: int, answered: int, refused: int = 0, lost: int = 0) -> None:
        assert sent == answered + refused + lost, "every request has one end"
        record_property("fault", row(name, sent, answered, refused, lost))

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder, so that a run can leave them out."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.faults)
