"""`python -m lifecycle COMMAND`: one command a module."""

import typer

from lifecycle.checklist import release_check
from lifecycle.docs import docs
from lifecycle.evaluate import evaluate
from lifecycle.gameday import gameday
from lifecycle.import_model import import_model
from lifecycle.monitor import drift, quality
from lifecycle.promote import promote, rollback
from lifecycle.rollout import canary, compare, shadow
from lifecycle.runbooks import runbooks
from lifecycle.sbom import sbom
from lifecycle.size import size
from lifecycle.train import train

commands = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
commands.command()(train)
commands.command()(size)
commands.command()(sbom)
commands.command()(runbooks)
commands.command()(drift)
commands.command()(quality)
commands.command()(gameday)
commands.command()(shadow)
commands.command()(canary)
commands.command()(compare)
commands.command()(docs)
commands.command()(evaluate)
commands.command()(promote)
commands.command()(rollback)
commands.command()(release_check)
commands.command()(import_model)


@commands.callback()
def main() -> None:
    """What runs outside the service: versions in artifacts/ and their release, sizing, runbooks."""


if __name__ == "__main__":
    commands(prog_name="python -m lifecycle")
