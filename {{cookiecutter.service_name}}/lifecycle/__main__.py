"""`python -m lifecycle COMMAND`: one command a module."""

import typer

from lifecycle.sbom import sbom
from lifecycle.size import size
from lifecycle.train import train

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
commands.command()(train)
commands.command()(size)
commands.command()(sbom)


@commands.callback()
def main() -> None:
    """Make and look after the versions in artifacts/."""


if __name__ == "__main__":
    commands(prog_name="python -m lifecycle")
