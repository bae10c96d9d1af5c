"""How the service is run, the same everywhere: gunicorn --config gunicorn.conf.py "app.main:create_app()".

Everything adjustable comes from `APP_` variables. Timeouts nest, so that each inner one can act first:
request deadline < uvicorn's graceful shutdown < gunicorn's graceful shutdown < termination grace period.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer
from uvicorn_worker import UvicornWorker

from app.core.errors import ArtifactError
from app.core.sizing import default_workers
from app.observability.logging import server_logging
from app.protocol import Protocol
from app.settings import GRACE_SECONDS, SettingsError, load_settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process must have no threads when it forks

try:
    settings = load_settings()
except SettingsError as problem:
    sys.exit(f"cannot start: {problem}")


class Worker(UvicornWorker):
    """uvicorn-worker with a graceful timeout, which it never sets itself, and without what is not needed."""

    CONFIG_KWARGS: dict[str, Any] = {  # noqa: RUF012  # the name and kind are uvicorn-worker's
        "loop": "auto",
        "http": Protocol,
        "ws": "none",
        "lifespan": "on",
        "access_log": False,
        "server_header": False,
        # For every answer, uvicorn's own to broken HTTP included: predictions are about somebody, so nothing
        # in between may keep or reinterpret them.
        "headers": [("cache-control", "no-store"), ("x-content-type-options", "nosniff")],
        # X-Forwarded-For is believed only from these. By default gunicorn and uvicorn believe their own host.
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": [str(network) for network in settings.trusted_proxies],
        "timeout_graceful_shutdown": settings.drain_seconds - GRACE_SECONDS,
    }

    async def callback_notify(self) -> None:
        """The heartbeat; a worker whose master was killed ends too, instead of keeping the port for ever."""
        self.notify()
        if os.getppid() != self.ppid:
            os.kill(os.getpid(), signal.SIGTERM)


bind = f"{settings.host}:{settings.port}"
workers = settings.workers or default_workers(Path(settings.artifacts_dir))
worker_class = Worker
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  # heartbeats must not wait for a disk
timeout = 60
graceful_timeout = settings.drain_seconds
keepalive = 75  # longer than the usual load balancer's 60, so that it never writes to a closed connection
max_requests = 0  # uvicorn-worker drops fresh connections when it recycles
preload_app = False  # warmed models do not survive a fork
control_socket_disable = True
logconfig_dict = server_logging(settings.log_format)

if settings.metrics_enabled:
    # Set before anything imports prometheus_client; one folder per start, so that no old count survives.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")


def on_starting(_server: Any) -> None:
    """Verify the artifact once, before any worker is forked; the workers inherit the verified bytes."""
    from app.main import prepare_workers

    # When several workers cannot load the model, gunicorn fails twice and shows the second as a traceback.
    sys.excepthook = lambda kind, *rest: None if kind is HaltServer else sys.__excepthook__(kind, *rest)

    try:
        prepare_workers(settings, workers)
    except ArtifactError as problem:
        sys.exit(f"cannot start: {problem}")


def child_exit(_server: Any, worker: Any) -> None:
    """Take a worker's live gauges out of /metrics."""
    from app.observability.metrics import forget_worker

    forget_worker(worker.pid)


def on_exit(_server: Any) -> None:
    """Remove this start's metric files."""
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shutil.rmtree(folder, ignore_errors=True)
