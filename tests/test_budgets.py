"""A service is small enough to own: lines of Python and files of a default render stay within budgets.

Every line of a file counts, comments and blank lines too. New lines beyond a budget need others to go first.
"""

import re
from pathlib import Path

import pytest

from tests.conftest import Bake, contents

SERVES = ("app/", "server/", "gunicorn.conf.py")
# Where -> the most lines of Python: what it is today, so that growth fails. docs/decisions/0008 has the
# ceilings, which are lower: 12,500 in all, 4,400 what serves, 6,000 lifecycle, 135 files.
BUDGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "all": (("",), 14_150),
    "what serves": (SERVES, 5_330),
    "lifecycle": (("lifecycle/",), 7_110),
    "tests": (("tests/",), 1_250),
}
THE_WAY_OF_A_REQUEST = 2_700
FILES = 141


def lines(service: Path) -> dict[str, int]:
    """The Python files of a service with the number of their lines."""
    return {name: content.count(b"\n") for name, content in contents(service).items() if name.endswith(".py")}


def listed(sizes: dict[str, int]) -> str:
    """Files with their lines, the longest first, for the message of a failure."""
    return "\n".join(f"{size:6,} {name}" for name, size in sorted(sizes.items(), key=lambda one: -one[1]))


@pytest.mark.parametrize("part", BUDGETS)
def test_python_stays_within_its_budget(bake: Bake, part: str) -> None:
    """No part of a default render has more lines of Python than its budget allows."""
    folders, budget = BUDGETS[part]
    sizes = {name: size for name, size in lines(bake()).items() if name.startswith(folders)}
    total = sum(sizes.values())
    assert 0 < total <= budget, f"{part}: {total:,} lines, the budget is {budget:,}\n{listed(sizes)}"


def test_the_way_of_a_request_can_be_read(bake: Bake) -> None:
    """docs/architecture.md follows one prediction through files that exist, in few steps and few lines."""
    text = (bake() / "docs" / "architecture.md").read_text("utf-8")
    way = text.partition("## One prediction\n")[2].partition("\n## ")[0]
    files = dict.fromkeys(re.findall(r"`((?:app|server)/[\w/]+\.py|gunicorn\.conf\.py)`", way))
    assert files, "docs/architecture.md names no file under the heading 'One prediction'"
    assert len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 8
    sizes = lines(bake())
    on_the_way = {name: sizes[name] for name in files}
    total = sum(on_the_way.values())
    assert total <= THE_WAY_OF_A_REQUEST, (
        f"{total:,} lines, the budget is {THE_WAY_OF_A_REQUEST:,}\n{listed(on_the_way)}"
    )


def test_files_stay_within_their_budget(bake: Bake) -> None:
    """A default render has at most as many files as its budget allows."""
    files = len(contents(bake()))
    assert files <= FILES, f"{files} files, the budget is {FILES}"
