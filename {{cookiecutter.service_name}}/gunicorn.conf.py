"""Configuration for the only start command: gunicorn --config gunicorn.conf.py "app.main:create_app()".

Everything adjustable comes from `APP_` variables. Timeouts nest, so that each inner one acts first:
request deadline < uvicorn's graceful shutdown < gunicorn's graceful shutdown < termination grace period.
"""

import os

# Before NumPy is imported: a process must have no threads when it forks.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from app.observability.logging import server_logging
from server.fleet import (  # noqa: F401  # gunicorn finds hooks by name
    child_exit,
    on_exit,
    on_reload,
    on_starting,
    pre_fork,
    prepare,
    when_ready,
)
from server.worker import Worker

fleet = prepare()
settings = fleet.settings

bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
workers = fleet.count
worker_class = Worker
timeout = 60
graceful_timeout = settings.drain_seconds
keepalive = settings.keep_alive_seconds
max_requests = 0  # uvicorn-worker drops fresh connections when it recycles
preload_app = False  # warmed models do not survive a fork
control_socket_disable = True
logconfig_dict = server_logging(settings.log_format)
