"""Shows the service that the template makes: `make demo`.

render with defaults -> its locked environment -> its server on a free port -> predictions, printed
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.render import ROOT, render

START_SECONDS = 60
SETOSA = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
VIRGINICA = {"sepal_length": 6.7, "sepal_width": 3.0, "petal_length": 5.2, "petal_width": 2.3}
INCOMPLETE = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4}
CALLS = [
    ("One flower", "/v1/predict", json.dumps(SETOSA)),
    ("Two flowers in one call", "/v1/predict/batch", json.dumps({"instances": [SETOSA, VIRGINICA]})),
    ("A measurement is missing", "/v1/predict", json.dumps(INCOMPLETE)),
    ("NaN, which JSON does not have", "/v1/predict", json.dumps({**SETOSA, "petal_width": float("nan")})),
]


def say(text: str) -> None:
    """Prints at once, also into a pipe, so that nobody wonders what takes so long."""
    print(f"\n== {text}", flush=True)


def free_port() -> int:
    """Asks the system for a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def call(url: str, body: str | None = None) -> tuple[int, Any]:
    """Gives status and parsed answer; an error status is an answer like any other."""
    data = None if body is None else body.encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextlib.contextmanager
def serving(service: Path) -> Iterator[str]:
    """Runs the service on a free port, ready when this yields its address; stops it as a platform would."""
    port = free_port()
    scripts = "Scripts" if os.name == "nt" else "bin"
    gunicorn = service / ".venv" / scripts / "gunicorn"
    # What another program set for a service of its own must not configure this one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("APP_")}
    settings = {"APP_HOST": "127.0.0.1", "APP_PORT": str(port), "APP_WORKERS": "1"}
    log = service.with_suffix(".log")
    with log.open("w") as output:
        # In a session of its own, so that Ctrl-C reaches only us and we stop it in order.
        server = subprocess.Popen(
            [gunicorn, "--config", "gunicorn.conf.py", "app.main:create_app()"],
            cwd=service,
            env={**inherited, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=START_SECONDS)


def wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Returns when the service takes predictions; a server that ended or hangs ends the demo with its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if call(f"{address}/ready")[0] == 200:
                return
        time.sleep(0.05)
    sys.exit(f"The service did not start; its log:\n{log.read_text()}")


def show_predictions(address: str) -> None:
    """Sends the calls and prints what came back, as it came."""
    for title, path, body in CALLS:
        status, answer = call(address + path, body)
        print(f"\n{title}\n  POST {path} {body}\n  {status}", end=" ")
        print(json.dumps(answer, indent=2).replace("\n", "\n  "), flush=True)


def main() -> None:
    """Runs the demo; keeps serving when a person watches."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    service = ROOT / "build" / "iris-classifier"
    say("Rendering the template with its defaults")
    render(ROOT / "build")
    say("Installing the service's locked dependencies (about a minute the first time)")
    subprocess.run(["make", ".venv/runtime.stamp"], cwd=service, check=True)
    say("Starting the service")
    with serving(service) as address:
        show_predictions(address)
        say(f"Documentation to try it in: {address}/docs")
        print(f"   The code: {service}\n   The log:  {service.with_suffix('.log')}", flush=True)
        if sys.stdin.isatty() and sys.stdout.isatty():
            print("   Serving until Ctrl-C ...", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    say("Stopped")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
