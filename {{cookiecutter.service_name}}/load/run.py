"""`python -m load.run`: start the service on a free port, load it, stop it; the exit code is the gate's.

gunicorn -> /ready -> locust (load/locustfile.py) -> percentiles, verdict, load/report.html
                   -> load/profile.py -> load/profile.md, load/profile.svg
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from load import profile

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60.0


@dataclass(frozen=True)
class Running:
    """A service that is ready: its address, and the process that started its workers."""

    address: str
    pid: int


@contextmanager
def service(**environment: str) -> Iterator[Running]:
    """A service on a free port, started as everywhere else and ended on leaving."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"],
            cwd=ROOT,
            env={**os.environ, **environment, "APP_HOST": "127.0.0.1", "APP_PORT": str(port)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            if not _ready(process, address):
                log.seek(0)
                sys.stderr.write(log.read().decode(errors="replace")[-4000:])
                raise SystemExit("load: the service did not become ready")
            yield Running(address, process.pid)
        finally:
            process.terminate()
            process.wait()


def _ready(process: subprocess.Popen[bytes], address: str) -> bool:
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        try:
            with urllib.request.urlopen(f"{address}/ready", timeout=2):  # noqa: S310  # our own http address
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def main() -> int:
    """The command; what it does not know goes to locust, such as --p95-ms or --error-ratio."""
    parser = argparse.ArgumentParser(prog="python -m load.run", description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=20, help="clients at once (20)")
    parser.add_argument("--seconds", type=int, default=15, help="how long (15)")
    parser.add_argument("--report", type=Path, default=ROOT / "load" / "report.html", help="HTML report")
    parser.add_argument(
        "--profile", type=Path, default=ROOT / "load" / "profile.md", help="profile, Markdown"
    )
    parser.add_argument(
        "--step-seconds", type=float, default=3, help="for each number of connections; 0 leaves it out (3)"
    )
    options, more = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the usual way, which ends the service
    report = options.report.resolve()
    report.unlink(missing_ok=True)
    with service(APP_METRICS_ENABLED="true") as running:
        print(f"load: {options.users} clients for {options.seconds} s", flush=True)
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "load" / "locustfile.py"), "--headless"]
        command += ["--host", running.address, "--users", str(options.users)]
        command += ["--spawn-rate", str(options.users)]
        command += ["--run-time", f"{options.seconds}s", "--html", str(report), "--only-summary"]
        code = subprocess.run(command + more, cwd=ROOT, check=False).returncode  # noqa: S603  # as typed by the user
        if options.step_seconds:
            profile.write(running.address, running.pid, options.profile.resolve(), options.step_seconds)
            print(f"load: profile in {options.profile.resolve()}")
    if report.exists():
        print(f"load: report in {report}")
    return code


if __name__ == "__main__":
    sys.exit(main())
