"""Runs the service or another program for the duration of a block: for load tests and `make size`.

command -> ready -> the block -> SIGTERM, or SIGKILL if it does not end
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil

from app.core.store import read_artifact, read_release
from lifecycle.command import ROOT

START_SECONDS, END_SECONDS = 60.0, 60.0
T = TypeVar("T")


def wait_for(condition: Callable[[], T], seconds: float) -> T | None:
    """The first true result of `condition`, or None after `seconds`; a failed connection counts as false."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with suppress(OSError, httpx2.TransportError):
            if found := condition():
                return found
        time.sleep(0.1)
    return None


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    ready: Callable[[], object],
    environment: Mapping[str, str] | None = None,
) -> Iterator[psutil.Popen]:
    """Run a program in the service's folder, and wait until `ready` is true; its output goes to `log`.

    Raises SystemExit, with the end of the log, if the program ends or is not ready in time.
    """
    with log.open("wb") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: process.poll() is not None or ready(), START_SECONDS)
        if process.poll() is not None or not ready():
            said = log.read_text("utf-8", errors="replace")[-4000:]
            raise SystemExit(f"{said}\n{log.stem} did not become ready")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def golden_rows() -> tuple[str, list[dict[str, Any]]]:
    """The served version, and the rows of its golden set."""
    version = read_release(ROOT / "artifacts").serving
    lines = read_artifact(ROOT / "artifacts", version).files["golden.jsonl"].splitlines()
    return version, [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Running:
    """A service that is ready: its address, and the process that started its workers."""

    address: str
    process: psutil.Process

    def workers(self) -> list[psutil.Process]:
        """Its worker processes."""
        return list(self.process.children())

    def model(self) -> dict[str, Any]:
        """The `model` part of /version: version, runtime, execution."""
        return dict(httpx2.get(f"{self.address}/version").raise_for_status().json()["model"])


@contextmanager
def service(**settings: str) -> Iterator[Running]:
    """Run the service on a free port, with these `APP_` variables; SystemExit if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gunicorn", "--config", "gunicorn.conf.py", "app.main:create_app()"]
    environment = {**os.environ, **settings, "APP_HOST": "127.0.0.1", "APP_PORT": str(port)}

    def ready() -> bool:
        return httpx2.get(f"{address}/ready", timeout=2).status_code == 200

    with (
        tempfile.TemporaryDirectory() as folder,
        started(command, Path(folder, "service.log"), ready, environment) as process,
    ):
        yield Running(address, process)
