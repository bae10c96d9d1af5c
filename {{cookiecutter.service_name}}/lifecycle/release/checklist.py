"""Runs docs/release_checklist.md: what a command can show is run, what a person must judge is listed.

    - [ ] Run `command`: what it shows   -> PASS or FAIL, by its exit code
    - [ ] Sign: what somebody looked at  -> SIGN, with room for a name and a date

The document is the only list. A ticked copy goes to build/, to be kept with the release.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import typer

from app.core.manifest import VERSION_PATTERN
from lifecycle.release.evaluate import ROOT, table

CHECKLIST = "docs/release_checklist.md"
BOX = "- [ ] "
RUN = re.compile(r"- \[ \] Run `([^`]+)`: (.+)")
SIGN = re.compile(r"- \[ \] Sign: (.+)")
LAST_LINES = 15  # of the output of what failed

Outcome = Literal["PASS", "FAIL", "SIGN"]


@dataclass(frozen=True)
class Line:
    """One line of the checklist; without a command it is for a person."""

    number: int  # in the file
    command: str | None
    text: str


def parse(document: str) -> list[Line]:
    """The lines to tick, in order; raises ValueError for one that says neither Run nor Sign."""
    lines = []
    for number, text in enumerate(document.splitlines(), 1):
        if run := RUN.fullmatch(text):
            lines.append(Line(number, run[1], run[2]))
        elif sign := SIGN.fullmatch(text):
            lines.append(Line(number, None, sign[1]))
        elif text.lstrip().startswith("- ["):
            raise ValueError(f"line {number} is neither `{BOX}Run `command`: ...` nor `{BOX}Sign: ...`")
    return lines


def ticked(document: str, version: str, outcomes: dict[int, Outcome]) -> str:
    """The checklist with what came out of each line."""
    lines = document.splitlines()
    for number, outcome in outcomes.items():
        text = lines[number - 1].removeprefix(BOX)
        lines[number - 1] = {
            "PASS": f"- [x] {text}",
            "FAIL": f"- [ ] **FAILED** {text}",
            "SIGN": f"- [ ] {text} Name: ____ Date: ____",
        }[outcome]
    return "\n".join(lines).replace("$VERSION", version) + "\n"


def run(command: str, root: Path, log: Path) -> bool:
    """Run a command without a shell, its output going to `log`; whether it ended well."""
    # A make around this one would hand its flags down.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    with log.open("wb") as output:
        try:
            ended = subprocess.run(  # noqa: S603  # what the repository's own document says
                shlex.split(command), cwd=root, env=own, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        except OSError as error:
            output.write(f"{command}: {error.strerror}\n".encode())
            return False
    return ended.returncode == 0


def release_check(
    version: Annotated[str, typer.Argument(help="The version to be released, like v2.")],
    root: Annotated[Path, typer.Option(help="The service's folder.", hidden=True)] = ROOT,
) -> None:
    """Run every line of the release checklist that can be run, and list what people must sign."""
    folder = root / "build" / f"release-check-{version}"
    try:
        if not re.fullmatch(VERSION_PATTERN, version):
            raise ValueError(f"{version!r} is not a version name like v2")
        document = (root / CHECKLIST).read_text("utf-8")
        lines = parse(document)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        typer.echo(f"release-check: {CHECKLIST}: {error}", err=True)
        raise typer.Exit(1) from None
    outcomes: dict[int, Outcome] = {}
    rows = []
    for line in lines:
        if line.command is None:
            outcomes[line.number] = "SIGN"
            rows.append(("SIGN", "", line.text))
            continue
        command = line.command.replace("$VERSION", version)
        typer.echo(f"release-check: {command} ...", err=True)
        log, began = folder / f"{line.number}.log", perf_counter()
        outcomes[line.number] = "PASS" if run(command, root, log) else "FAIL"
        rows.append((outcomes[line.number], f"{perf_counter() - began:.0f} s", f"{command}: {line.text}"))
        if outcomes[line.number] == "FAIL":
            last = log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
            typer.echo(
                "\n".join([f"release-check: failed: {command}", *(f"  {one}" for one in last)]), err=True
            )
    copy = folder / "release_checklist.md"
    copy.write_text(ticked(document, version, outcomes), "utf-8")
    typer.echo("\n".join(table(("", "took", "line"), rows)))
    counts = {name: list(outcomes.values()).count(name) for name in ("PASS", "FAIL", "SIGN")}
    typer.echo(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SIGN']} to be signed in {copy}")
    if counts["FAIL"]:
        raise typer.Exit(1)
