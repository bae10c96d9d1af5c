"""How the service is run, the same everywhere: gunicorn --config gunicorn.conf.py "app.main:create_app()".

Everything adjustable comes from `APP_` variables. Timeouts nest, so that each inner one can act first:
request deadline < uvicorn's graceful shutdown < gunicorn's graceful shutdown < termination grace period.
"""

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from socket import SOL_SOCKET
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from uvicorn.config import Config
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.core.errors import ArtifactError
from app.core.sizing import default_workers
from app.observability import flight
from app.observability.logging import server_logging
from server.protocol import Protocol
from app.settings import GRACE_SECONDS, SettingsError, load_settings

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a process must have no threads when it forks

HANDSHAKE_SECONDS = 0.05  # in a data centre: nobody waits longer before the door is closed
# A packet filter for a listening socket: where SYN, but not ACK, is among the flags, drop the packet.
SO_ATTACH_FILTER = 26
NO_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF))
CUT_SECONDS = 0.5  # between the attempts to get rid of a connection

running = sys.modules.get("app.main")  # there when SIGHUP has this file read again
try:
    settings = load_settings()
except SettingsError as problem:
    if running is None:
        sys.exit(f"cannot start: {problem}")
    logging.getLogger("gunicorn.error").error("the settings stay as they were: %s", problem)
    settings = running.inheritance.settings

answer_seconds = settings.drain_seconds - GRACE_SECONDS  # after SIGTERM, for what is inside


def inheritance() -> Any:
    """What master and workers share; imported late, because it brings in prometheus_client."""
    from app import main

    return main.inheritance


async def let_in(sockets: Any) -> None:
    """Let in who has connected, and nobody after them: to close a socket resets whom it has not let in."""
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in NO_SYN)
    memory = ctypes.create_string_buffer(program)
    for socket in sockets:
        with suppress(OSError):  # where the kernel cannot do it, somebody may be reset
            here = struct.pack("HP", len(NO_SYN), ctypes.addressof(memory))
            socket.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, here)
    await asyncio.sleep(HANDSHAKE_SECONDS)
    while any(socket.get_backlog() > 0 for socket in sockets):  # noqa: ASYNC110  # the kernel rings no bell
        await asyncio.sleep(HANDSHAKE_SECONDS)


class DrainingServer(Server):
    """uvicorn's server, with an end at which everybody gets an answer.

    SIGTERM -> a successor has loaded, if there is to be one -> no new connections; on open ones a last answer
    each -> after `answer_seconds`, or SIGQUIT, 503 for what is still inside -> lifespan
    """

    def __init__(self, config: Config, master: int) -> None:
        super().__init__(config)
        self._master, self._hurried = master, False

    async def startup(self, sockets: Any = None) -> None:
        """Tell the others that this worker takes connections now."""
        await super().startup(sockets)
        serving = inheritance().serving
        with serving:
            serving.value += 1

    async def main_loop(self) -> None:
        """Serve; and go on while those that take over are still loading."""
        await super().main_loop()
        while not (self._hurried or inheritance().relieved or os.getppid() != self._master):
            await asyncio.sleep(0.05)
            await self.on_tick(0)

    async def shutdown(self, sockets: Any = None) -> None:
        """See the class."""
        loop = asyncio.get_running_loop()
        heart = loop.create_task(self._beat())
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        if inheritance().stopping.value:  # else the other workers take whoever waits at the door
            await let_in(sockets)
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)
        alarm = loop.call_later(0 if self._hurried else answer_seconds, self.cut)
        await super().shutdown(sockets)
        alarm.cancel()
        heart.cancel()

    def cut(self) -> None:
        """Have everything that is inside answered now, and go."""
        self._hurried = True
        self.handle_exit(signal.SIGTERM, None)
        for connection in list(self.server_state.connections):
            connection.leave()
        for task in list(self.server_state.tasks):
            task.cancel()
        if self.server_state.connections:  # who does not read an answer is not waited for
            asyncio.get_running_loop().call_later(CUT_SECONDS, self.cut)

    async def _beat(self) -> None:
        """Uvicorn's heartbeat ends where draining begins, and gunicorn would take that for a hang."""
        while self.config.callback_notify is not None:
            await self.config.callback_notify()
            await asyncio.sleep(1)


class Worker(UvicornWorker):
    """uvicorn-worker that drains as `DrainingServer` says, tells what it died of, and leaves out the rest."""

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
        "timeout_graceful_shutdown": answer_seconds + 1,  # `cut` comes first
    }

    def init_signals(self) -> None:
        """Have the stacks written down when gunicorn aborts a worker that is blocked, or a crash ends it."""
        super().init_signals()
        if flight.inherited is not None:
            flight.inherited.watch()

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self._server = DrainingServer(self.config, self.ppid)
        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, self._server.cut)
        await self._server.serve(sockets=self.sockets)
        if not self._server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def callback_notify(self) -> None:
        """The heartbeat; a worker that is of no use any more makes room for another."""
        self.notify()
        if os.getppid() != self.ppid:  # its master was killed: it would keep the port for ever
            os.kill(os.getpid(), signal.SIGTERM)
        service = self._server.lifespan.state["service"]
        if service.pipeline and not self._server.should_exit:
            seconds = service.pipeline.batcher.busy_seconds
            if seconds > self.cfg.timeout:  # as long as gunicorn would let the event loop be blocked
                service.log.error("blocked", model_version=service.pipeline.version, seconds=seconds)
                os.kill(os.getpid(), signal.SIGTERM)


bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
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

if settings.metrics_enabled and running is None:
    # Set before anything imports prometheus_client; one folder per start, so that no old count survives.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")


def on_starting(server: Any) -> None:
    """Verify the artifact once, before any worker is forked; the workers inherit the verified bytes."""
    from app.main import prepare_workers

    if server.cfg.workers != workers:  # quotas and readiness count on it
        sys.exit("cannot start: APP_WORKERS says how many workers there are, not gunicorn's --workers")
    # When several workers cannot load the model, gunicorn fails twice and shows the second as a traceback.
    sys.excepthook = lambda kind, *rest: None if kind is HaltServer else sys.__excepthook__(kind, *rest)

    try:
        prepare_workers(settings, workers)
    except ArtifactError as problem:
        sys.exit(f"cannot start: {problem}")


def when_ready(server: Any) -> None:
    """SIGTERM once: drain. Twice: at once, which gunicorn would not hear."""

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != server.pid:  # a worker that has not begun yet
            os._exit(0)
        again = inheritance().stopping.value
        inheritance().stopping.value = 1
        server.signal(signal.SIGQUIT if again else number, frame)

    signal.signal(signal.SIGTERM, stop)


def on_reload(_server: Any) -> None:
    """SIGHUP: workers with the settings of now take over from those there are, once they have loaded."""
    from app.main import replace_workers

    replace_workers(settings, workers)


def pre_fork(_server: Any, worker: Any) -> None:
    """Give the worker what will tell, if it dies, what it was doing."""
    worker.flight = flight.inherited = flight.FlightRecorder()


def child_exit(server: Any, worker: Any) -> None:
    """Say what a worker was doing if it crashed, and take its live gauges out of /metrics."""
    from app.observability.metrics import forget_worker

    if fields := worker.flight.read():
        server.log.error("worker died", extra={"fields": {"pid": worker.pid, **fields}})
    forget_worker(worker.pid)


def on_exit(_server: Any) -> None:
    """Remove this start's metric files."""
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shutil.rmtree(folder, ignore_errors=True)
