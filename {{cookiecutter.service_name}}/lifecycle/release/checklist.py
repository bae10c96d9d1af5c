"""Runs docs/release_checklist.md: the lines with a command are run, the others are for a person.

    - [ ] Run `command`: what it shows   -> PASS or FAIL, by its exit code
    - [ ] Sign: what a person looked at  -> SIGN, with room for a name and a date

The document is the only list. A ticked copy goes to build/, to be kept with the release.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from app.core.store import VERSION_PATTERN
from lifecycle.errors import LifecycleError
from lifecycle.files import ROOT, write_file

CHECKLIST = "docs/release_checklist.md"
BOX = "- [ ] "
LINE = re.compile(r"- \[ \] (?:Run `([^`]+)`|Sign): (.+)")
LAST_LINES = 15  # of the output of a failed command
TICKED = {
    "PASS": "- [x] {}",
    "FAIL": "- [ ] **FAILED** {}",
    "SIGN": "- [ ] {} Name: ____ Date: ____",
}


@dataclass(frozen=True)
class Line:
    """One line of the checklist; without a command it is for a person. `output` is that of a failure."""

    number: int  # in the file
    command: str | None
    text: str
    outcome: str = "SIGN"
    seconds: float = 0.0
    output: str = ""


def parse(document: str) -> list[Line]:
    """The lines to tick, in order; raises LifecycleError for one that says neither Run nor Sign."""
    lines = []
    for number, text in enumerate(document.splitlines(), 1):
        if found := LINE.fullmatch(text):
            lines.append(Line(number, found[1], found[2]))
        elif text.lstrip().startswith("- ["):
            needed = f"neither `{BOX}Run `command`: ...` nor `{BOX}Sign: ...`"
            raise LifecycleError(f"{CHECKLIST}: line {number} is {needed}")
    return lines


def release_check(version: str, *, root: Path = ROOT) -> Iterator[Line]:
    """Run the checklist for `version`, yield each line when it is done, leave a ticked copy in `root`/build.

    Raises LifecycleError before the first command if the document or the version's name is not well formed.
    """
    if not re.fullmatch(VERSION_PATTERN, version):
        raise LifecycleError(f"{version!r} is not a version name like v2")
    document, folder = (root / CHECKLIST).read_text("utf-8"), folder_of(version, root)
    copy, lines = document.splitlines(), parse(document)
    for one in lines:
        line = _run(one, one.command.replace("$VERSION", version), root, folder) if one.command else one
        copy[line.number - 1] = TICKED[line.outcome].format(copy[line.number - 1].removeprefix(BOX))
        yield line
    text = "\n".join(copy).replace("$VERSION", version) + "\n"
    write_file(folder / Path(CHECKLIST).name, text.encode())


def folder_of(version: str, root: Path = ROOT) -> Path:
    """The folder of the logs and the ticked copy."""
    return root / "build" / f"release-check-{version}"


def _run(line: Line, command: str, root: Path, folder: Path) -> Line:
    """Run the command without a shell; its output goes to a log in `folder`."""
    # A make around this one would hand its flags down.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    log, began = folder / f"{line.number}.log", perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            code = subprocess.run(  # noqa: S603  # a command in the repository's own document
                shlex.split(command), cwd=root, env=own, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        except OSError as error:
            output.write(f"{command}: {error.strerror}\n".encode())
            code = 1
    done = replace(line, command=command, outcome="FAIL" if code else "PASS", seconds=perf_counter() - began)
    last = log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return replace(done, output="\n".join(last)) if code else done
