"""What each fault did to requests, gathered from a whole run into the table of docs/reliability.md.

fault("kill -9", sent=..., answered=..., ...) -> the test's report -> pytest_sessionfinish -> the table
"""

from collections.abc import Callable

import pytest

from tests.conftest import ROOT

TABLE_OF, RULER = ROOT / "docs" / "reliability.md", "|---|--:|--:|--:|--:|\n"
Fault = Callable[..., None]
Row = tuple[str, int, str]

_rows: dict[Row, None] = {}  # of this run: file, line, row of the table


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
        _rows.update(
            {(file, line or 0, str(row)): None for name, row in report.user_properties if name == "fault"}
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Writes the table below the words that people wrote, after a run of everything that went well."""
    config = session.config
    everything = config.args == ["tests/faults"] and not (config.option.keyword or config.option.markexpr)
    if everything and exitstatus == pytest.ExitCode.OK and not hasattr(config, "workerinput"):
        words = TABLE_OF.read_text("utf-8").partition(RULER)[0]
        TABLE_OF.write_text(words + RULER + "".join(row for *_, row in sorted(_rows)), "utf-8")
