"""What each fault did to requests, gathered from a whole run into the table of docs/reliability.md.

fault("kill -9", sent=..., answered=..., ...) -> the test's report -> pytest_sessionfinish -> the table
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
from tests.service.where import ROOT

TABLE_OF, RULER = ROOT / "docs" / "reliability.md", "|---|--:|--:|--:|--:|\n"
PREDICTION = json.dumps(EXAMPLE).encode()
Fault = Callable[..., None]
Row = tuple[str, int, str]

_rows: dict[Row, None] = {}  # of this run: file, line, row of the table


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
        record_property("fault", f"| {name} | {sent:,} | {answered:,} | {refused:,} | {lost:,} |\n")

    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Takes what a passed test reported; with xdist, in the process that gathers the reports."""
    file, line, _ = report.location
    if report.when == "call" and report.passed:
        reported = [str(row) for name, row in report.user_properties if name == "fault"]
        _rows.update({(file, line or 0, row): None for row in reported})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the table below the words that people wrote, after a run of everything that went well."""
    config = session.config
    everything = config.args == ["tests/faults"] and not (config.option.keyword or config.option.markexpr)
    if everything and exitstatus == pytest.ExitCode.OK and not hasattr(config, "workerinput"):
        words = TABLE_OF.read_text("utf-8").partition(RULER)[0]
        TABLE_OF.write_text(words + RULER + "".join(row for *_, row in sorted(_rows)), "utf-8")
