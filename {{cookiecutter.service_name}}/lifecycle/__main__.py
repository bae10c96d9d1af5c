"""`python -m lifecycle COMMAND`: the module of a command is imported when the command is called.

COMMAND -> its module -> function with Typer's annotations -> LifecycleError -> one line, exit 1
                                                           -> a result with lines in `failed` -> exit 1
any other exception -> one line, and the full message in build/COMMAND.log -> exit 1
"""

import re
import tempfile
import traceback
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from app.core.errors import ArtifactError
from lifecycle.command import ROOT, LifecycleError, write_file

MODULES = {  # by command; some take seconds to import
    "size": "operations.size",
    "sbom": "operations.sbom",
    **dict.fromkeys(("runbooks", "docs"), "operations.documents"),
    **dict.fromkeys(("drift", "quality"), "operations.monitor"),
    "evaluate": "release.evaluation",
    **dict.fromkeys(("promote", "rollback", "release-check", "new-key", "sign"), "release.promotion"),
    **dict.fromkeys(("shadow", "canary", "compare"), "release.rollout"),
    "import-model": "importing.importer",
}
LONGEST = 300  # characters of an error line


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """As in Typer, but refuse options with an empty value: make passes these for unset variables."""
        empty = [
            one.rstrip("=").removeprefix("--").upper()
            for one, after in pairwise([*args, "-"])
            if one.startswith("--") and (one.endswith("=") or not after)
        ]
        if empty:
            raise LifecycleError(_wanted(ctx.info_name, empty))
        return super().parse_args(ctx, args)


def _wanted(command: str | None, names: list[str]) -> str:
    return f"give {', '.join(names)}: make {command} {' '.join(f'{name}=...' for name in names)}"


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*MODULES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in MODULES:
            return None
        module, own = import_module(f"lifecycle.{MODULES[cmd_name]}"), typer.Typer(add_completion=False)
        own.command(cmd_name, cls=_Command)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(own)

    def invoke(self, ctx: Any) -> Any:
        status = 1
        try:
            found = super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # Typer handles these
            raise
        except TyperException as error:  # a wrong command line
            reason, status = error.format_message(), getattr(error, "exit_code", 2)
            if lacking := re.match(r"Missing \w+ '(?:--)?([\w-]+)", reason):
                reason = _wanted(ctx.invoked_subcommand, [lacking[1].upper()])
        except (LifecycleError, ArtifactError) as error:
            reason = str(error)
        except OSError as error:
            words = error.strerror or type(error).__name__
            reason = f"{error.filename}: {words}" if error.filename else words
        except Exception as error:  # the boundary: a person gets no traceback
            reason = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        else:
            if getattr(found, "failed", None):
                raise typer.Exit(1)
            return found
        typer.echo(one_line(ctx.invoked_subcommand or "lifecycle", reason), err=True)
        raise typer.Exit(status)


def one_line(command: str, reason: str) -> str:
    """The error line of a command; if the reason is longer than a line, the full text goes to a file."""
    first, _, more = reason.strip().partition("\n")
    line = f"{command}: {' '.join(first.split())}"
    if not more and len(line) <= LONGEST:
        return line
    for folder in (ROOT / "build", Path(tempfile.gettempdir())):
        log = folder / f"{command}.log"
        with suppress(OSError):
            write_file(log, f"{reason}\n".encode("utf-8", "replace"))
            said = f"; the whole story: {log.relative_to(ROOT) if folder.parent == ROOT else log}"
            return f"{line[: LONGEST - len(said)]}{said}"
    return line[:LONGEST]


commands = typer.Typer(
    cls=_Commands, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


@commands.callback()
def main() -> None:
    """Commands that run outside the service: versions in artifacts/ and their release, sizing, runbooks."""


if __name__ == "__main__":
    commands(prog_name="python -m lifecycle")
