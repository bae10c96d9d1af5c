"""`python -m lifecycle COMMAND`: one command a function, its module imported when somebody asks for it."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

MODULES = {  # by command; some import training libraries, which takes seconds
    "train": "importing.train",
    "size": "operations.size",
    "sbom": "operations.sbom",
    "runbooks": "operations.runbooks",
    "drift": "operations.monitor",
    "quality": "operations.monitor",
    "gameday": "operations.gameday",
    "shadow": "release.rollout",
    "canary": "release.rollout",
    "compare": "release.rollout",
    "docs": "operations.docs",
    "evaluate": "release.evaluate",
    "promote": "release.promote",
    "rollback": "release.promote",
    "release-check": "release.checklist",
    "import-model": "importing.import_model",
}


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """See click."""
        return [*MODULES]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """See click."""
        if cmd_name not in MODULES:
            return None
        module, own = import_module(f"lifecycle.{MODULES[cmd_name]}"), typer.Typer(add_completion=False)
        own.command(cmd_name)(getattr(module, cmd_name.replace("-", "_")))
        return typer.main.get_command(own)


commands = typer.Typer(
    cls=_Commands, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)


@commands.callback()
def main() -> None:
    """What runs outside the service: versions in artifacts/ and their release, sizing, runbooks."""


if __name__ == "__main__":
    commands(prog_name="python -m lifecycle")
