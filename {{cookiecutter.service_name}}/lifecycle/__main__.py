"""`python -m lifecycle COMMAND`: the module of a command is imported when the command is called.

COMMAND -> its module -> function with Typer's annotations -> LifecycleError -> one line, exit 1
                                                           -> a result with lines in `failed` -> exit 1
"""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from app.core.errors import ArtifactError
from lifecycle.command import LifecycleError

RELEASE = (
    "evaluate", "promote", "rollback", "release-check", "new-key", "sign", "shadow", "canary", "compare",
)  # fmt: skip
MODULES = {  # by command; some import training libraries, which takes seconds
    "size": "operations.size",
    "sbom": "operations.sbom",
    **dict.fromkeys(("runbooks", "docs"), "operations.documents"),
    **dict.fromkeys(("drift", "quality"), "operations.monitor"),
    **dict.fromkeys(RELEASE, "release"),
    "import-model": "importing.importer",
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*MODULES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in MODULES:
            return None
        module, own = import_module(f"lifecycle.{MODULES[cmd_name]}"), typer.Typer(add_completion=False)
        own.command(cmd_name)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(own)

    def invoke(self, ctx: Any) -> Any:
        # Typer itself ends with 130 on Ctrl-C.
        try:
            found = super().invoke(ctx)
        except (LifecycleError, ArtifactError) as error:
            reason = str(error)
        except BrokenPipeError:  # the reader of the output went away; Typer ends quietly
            raise
        except OSError as error:
            words = error.strerror or type(error).__name__
            reason = f"{error.filename}: {words}" if error.filename else words
        else:
            if getattr(found, "failed", None):
                raise typer.Exit(1)
            return found
        typer.echo(f"{ctx.invoked_subcommand}: {reason}", err=True)
        raise typer.Exit(1)


commands = typer.Typer(
    cls=_Commands, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


@commands.callback()
def main() -> None:
    """What runs outside the service: versions in artifacts/ and their release, sizing, runbooks."""


if __name__ == "__main__":
    commands(prog_name="python -m lifecycle")
