"""gunicorn's worker: uvicorn with the protocol and the limits of this service, and a graceful drain.

    SIGTERM -> wait for the successor, if any -> refuse new connections; send a last answer on each open one
    -> GRACE_SECONDS before the end of the drain, or at SIGQUIT: 503 for open requests -> end of lifespan

Every step has a timeout, so that gunicorn never has to kill a worker that stops.
"""

import asyncio
import faulthandler
import os
import signal
import sys
from typing import Any, cast

from gunicorn.arbiter import Arbiter
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

from app.settings import GRACE_SECONDS
from server.fleet import forking_fleet
from server.protocol import Protocol

BACKLOG_SECONDS = 1.0  # for accepting the backlog of the listening socket
CUT_SECONDS = 0.5  # between attempts to close a connection


class DrainingServer(Server):
    """A server that drains as described at the top of this module."""

    def __init__(self, worker: "Worker") -> None:
        super().__init__(worker.config)
        self._worker, self._fleet, self._hurried = worker, forking_fleet(), False

    async def startup(self, sockets: Any = None) -> None:
        """Tell the other workers that this worker accepts connections."""
        await super().startup(sockets)
        self._fleet.note_serving()

    async def main_loop(self) -> None:
        """Serve, and continue while successors are still loading."""
        await super().main_loop()
        while not (self._hurried or self._fleet.may_leave or os.getppid() != self._worker.ppid):
            await asyncio.sleep(0.05)
            await self.on_tick(0)

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer the open requests, then end the lifespan."""
        loop = asyncio.get_running_loop()
        heart = loop.create_task(self._beat())
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        # Closing a listener resets connections that are not accepted yet; other workers, if any, accept them.
        end = loop.time() + BACKLOG_SECONDS
        while self._fleet.stopping and loop.time() < end and any(one.get_backlog() for one in sockets):  # noqa: ASYNC110  # no event tells
            await asyncio.sleep(0)  # the loop accepts them
        for listener in (*self.servers, *sockets):  # no await in between: it would reset new connections
            listener.close()
        await asyncio.sleep(0)  # lets the server register a connection that was just accepted
        answer_seconds = self._fleet.settings.drain_seconds - GRACE_SECONDS
        alarm = loop.call_later(0 if self._hurried else answer_seconds, self.cut)
        await super().shutdown(sockets)
        alarm.cancel()
        heart.cancel()

    def cut(self) -> None:
        """Answer all open requests now, with 503, and close."""
        self._hurried = True
        self.handle_exit(signal.SIGTERM, None)
        for connection in cast("set[Protocol]", self.server_state.connections.copy()):
            connection.leave()
        for task in list(self.server_state.tasks):
            task.cancel()
        if self.server_state.connections:  # a client that does not read its answer is cut off
            asyncio.get_running_loop().call_later(CUT_SECONDS, self.cut)

    async def _beat(self) -> None:
        """Send heartbeats: uvicorn's own stop when draining begins, and gunicorn would assume a hang."""
        while True:
            await self._worker.callback_notify()
            await asyncio.sleep(1)


class Worker(UvicornWorker):  # type: ignore[misc]  # which has no types
    """uvicorn-worker with `DrainingServer`, limits from the settings, and stack traces after a crash."""

    @property
    def CONFIG_KWARGS(self) -> dict[str, Any]:  # read once, by the constructor
        """Arguments for uvicorn's Config, from the fleet's settings when the worker is created."""
        settings = forking_fleet().settings
        proxies = settings.trusted_proxies
        mapped = [f"::ffff:{one.network_address}/{96 + one.prefixlen}" for one in proxies if one.version == 4]
        return {
            "loop": "auto",
            "http": Protocol,
            "ws": "none",
            "lifespan": "on",
            "access_log": False,
            "server_header": False,
            # For every answer, also uvicorn's to broken HTTP: predictions may be personal data, so proxies
            # must not store or reinterpret them.
            "headers": [("cache-control", "no-store"), ("x-content-type-options", "nosniff")],
            # X-Forwarded-For is trusted only from these; uvicorn's default also trusts this host. Dual-stack
            # sockets and some proxies write IPv4 addresses as IPv6.
            "proxy_headers": bool(proxies),
            "forwarded_allow_ips": [*map(str, proxies), *mapped],
            "timeout_graceful_shutdown": settings.drain_seconds - GRACE_SECONDS + 1,  # `cut` comes first
            "timeout_notify": 0,  # at most once a second
        }

    def load_wsgi(self) -> None:
        """Before loading the application: open the metric files, and let fatal signals write the stacks."""
        forking_fleet().metric_files.begin(self.slot)
        faulthandler.enable(self.stacks)  # works even while a model holds Python's lock
        super().load_wsgi()

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        self._server = DrainingServer(self)
        asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, self._server.cut)
        await self._server.serve(sockets=self.sockets)
        if not self._server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)

    async def callback_notify(self) -> None:
        """The heartbeat, once a second; it also ends a worker whose master is gone or whose model hangs."""
        self.notify()
        forking_fleet().metric_files.restore()
        if os.getppid() != self.ppid:  # the master was killed; this worker would keep the port
            os.kill(os.getpid(), signal.SIGTERM)
        service = self._server.lifespan.state["service"]
        if not self._server.should_exit:
            seconds = service.models.busy_seconds
            if seconds > self.cfg.timeout:  # gunicorn's limit for a blocked event loop
                service.log.error("blocked", model_version=service.models.serving.version, seconds=seconds)
                os.kill(os.getpid(), signal.SIGTERM)
