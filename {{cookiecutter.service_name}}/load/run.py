"""`python -m load.run`: start the service on a free port, load it, stop it; the exit code is the gate's.

service -> locust (load/locustfile.py) -> percentiles, verdict, load/report.html
        -> load/profile.py -> load/profile.md, load/profile.svg
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from load import profile
from load.service import ROOT, service

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    users: Annotated[int, typer.Option(help="Clients at once.")] = 20,
    seconds: Annotated[int, typer.Option(help="How long locust loads the service.")] = 15,
    report: Annotated[Path, typer.Option(help="The HTML report.")] = ROOT / "load" / "report.html",
    profile_: Annotated[Path, typer.Option("--profile", help="The profile, Markdown.")] = ROOT
    / "load"
    / "profile.md",
    step_seconds: Annotated[
        float, typer.Option(help="For each number of connections of the profile; 0 leaves it out.")
    ] = 3,
) -> None:
    """Load the service and judge it. Other options go to locust, such as --p95-ms or --error-ratio."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the service is stopped too
    report, target = report.resolve(), profile_.resolve()
    report.unlink(missing_ok=True)
    with service(APP_METRICS_ENABLED="true") as running:
        print(f"load: {users} clients for {seconds} s", flush=True)
        locust = [sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--only-summary"]
        locust += ["--host", running.address, "--users", str(users), "--spawn-rate", str(users)]
        locust += ["--run-time", f"{seconds}s", "--html", str(report), *context.args]
        code = subprocess.run(locust, cwd=ROOT, check=False).returncode  # noqa: S603  # as typed by the user
        if step_seconds:
            profile.write(running, target, step_seconds)
            print(f"load: profile in {target}")
    if report.exists():
        print(f"load: report in {report}")
    raise typer.Exit(code)


if __name__ == "__main__":
    command(prog_name="python -m load.run")
