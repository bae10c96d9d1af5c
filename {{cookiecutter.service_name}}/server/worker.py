"""gunicorn's worker: uvicorn with the protocol, the limits and the end that this service has."""

import asyncio
import faulthandler
import os
import signal
import sys
from typing import Any

from gunicorn.arbiter import Arbiter
from uvicorn_worker import UvicornWorker

from app.settings import GRACE_SECONDS
from server.drain import DrainingServer
from server.fleet import forking_fleet
from server.protocol import Protocol


class Worker(UvicornWorker):  # type: ignore[misc]  # which has no types
    """uvicorn-worker that drains as `DrainingServer` says, tells what it died of, and leaves out the rest."""

    @property
    def CONFIG_KWARGS(self) -> dict[str, Any]:  # read once, by the constructor
        """Arguments for uvicorn's Config, from the settings that the fleet has when the worker is made."""
        settings = forking_fleet().settings
        return {
            "loop": "auto",
            "http": Protocol,
            "ws": "none",
            "lifespan": "on",
            "access_log": False,
            "server_header": False,
            # For every answer, uvicorn's own to broken HTTP included: predictions are about somebody, so
            # nothing in between may keep or reinterpret them.
            "headers": [("cache-control", "no-store"), ("x-content-type-options", "nosniff")],
            # X-Forwarded-For is believed only from these. By default gunicorn and uvicorn believe their own
            # host.
            "proxy_headers": bool(settings.trusted_proxies),
            "forwarded_allow_ips": [str(network) for network in settings.trusted_proxies],
            "timeout_graceful_shutdown": settings.drain_seconds - GRACE_SECONDS + 1,  # `cut` comes first
        }

    def init_signals(self) -> None:
        """Have the stacks written when a signal ends this worker, also while a model holds Python's lock."""
        super().init_signals()
        faulthandler.enable(self.stacks)

    async def _serve(self) -> None:
        fleet = forking_fleet()
        self.config.app = self.wsgi
        answer_seconds = fleet.settings.drain_seconds - GRACE_SECONDS  # after SIGTERM, for what is inside
        self._server = DrainingServer(self.config, fleet, self.ppid, answer_seconds)
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
        if not self._server.should_exit:
            seconds = service.models.busy_seconds
            if seconds > self.cfg.timeout:  # as long as gunicorn would let the event loop be blocked
                service.log.error("blocked", model_version=service.models.serving.version, seconds=seconds)
                os.kill(os.getpid(), signal.SIGTERM)
