"""Makes the table of docs/reliability.md from a whole run of the faults; a plugin of conftest.py.

`fault(...)` in a test -> a property of its report -> the rows -> compared with the table, or written
"""

import re

import pytest

from tests.service.where import ROOT

TABLE_OF, RULER = ROOT / "docs" / "reliability.md", "|---|--:|--:|--:|--:|\n"
NAME = re.compile(r"^\| (.+?) \|", re.MULTILINE)

_rows: dict[tuple[str, int, str], None] = {}  # of this run: file, line, row of the table


def row(name: str, sent: int, answered: int, refused: int, lost: int) -> str:
    """A row of the table."""
    return f"| {name} | {sent:,} | {answered:,} | {refused:,} | {lost:,} |\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the switch that writes the table."""
    parser.addoption(
        "--write-reliability", action="store_true", help="write the table of docs/reliability.md anew"
    )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Takes what a passed test reported; with xdist, in the process that gathers the reports."""
    file, line, _ = report.location
    if report.when == "call" and report.passed:
        reported = [str(row) for name, row in report.user_properties if name == "fault"]
        _rows.update({(file, line or 0, row): None for row in reported})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """After a good run of all faults, holds the table's rows to those of the run, or writes it anew."""
    option = session.config.option
    partial = option.keyword or option.markexpr or any(".py" in one for one in session.config.args)
    if partial or not _rows or exitstatus != pytest.ExitCode.OK:
        return
    words, ruler, table = TABLE_OF.read_text("utf-8").partition(RULER)
    rows = "".join(row for *_, row in sorted(_rows))
    if option.write_reliability:
        TABLE_OF.write_text(words + ruler + rows, "utf-8")
    elif NAME.findall(rows) != NAME.findall(table):
        print(f"\nother faults than in {TABLE_OF}; to write it: --write-reliability\n{rows}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
