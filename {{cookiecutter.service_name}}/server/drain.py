"""uvicorn's server, with an end at which every request that is inside gets an answer.

    SIGTERM -> the successor serves, if there is to be one -> no new connections; on open ones a last answer
    each -> after `answer_seconds`, or SIGQUIT, 503 for requests that are still inside -> lifespan

Every step has an end of its own, so that gunicorn never has to kill a worker that stops.
"""

import asyncio
import ctypes
import os
import signal
import struct
from contextlib import suppress
from socket import SOL_SOCKET
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import Server

from server.fleet import ForkingFleet
from server.protocol import Protocol

HANDSHAKE_SECONDS = 0.05  # in a data centre: nobody waits longer before the door is closed
# A packet filter for a listening socket: where SYN, but not ACK, is among the flags, drop the packet.
SO_ATTACH_FILTER = 26
NO_SYN = ((0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF))
CUT_SECONDS = 0.5  # between the attempts to get rid of a connection


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
    """Ends as the module says; `master` is the process id of gunicorn's master."""

    def __init__(self, config: Config, fleet: ForkingFleet, master: int, answer_seconds: float) -> None:
        super().__init__(config)
        self._fleet, self._master, self._answer_seconds = fleet, master, answer_seconds
        self._hurried = False

    async def startup(self, sockets: Any = None) -> None:
        """Tell the others that this worker takes connections now."""
        await super().startup(sockets)
        self._fleet.note_serving()

    async def main_loop(self) -> None:
        """Serve; and go on while successors are still loading."""
        await super().main_loop()
        while not (self._hurried or self._fleet.may_leave or os.getppid() != self._master):
            await asyncio.sleep(0.05)
            await self.on_tick(0)

    async def shutdown(self, sockets: Any = None) -> None:
        """Answer what is inside, as the module says, then end the lifespan."""
        loop = asyncio.get_running_loop()
        heart = loop.create_task(self._beat())
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        if self._fleet.stopping:  # else the other workers take whoever waits at the door
            await let_in(sockets)
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)
        alarm = loop.call_later(0 if self._hurried else self._answer_seconds, self.cut)
        await super().shutdown(sockets)
        alarm.cancel()
        heart.cancel()

    def cut(self) -> None:
        """Have everything that is inside answered now, and go."""
        self._hurried = True
        self.handle_exit(signal.SIGTERM, None)
        for connection in cast("set[Protocol]", self.server_state.connections.copy()):
            connection.leave()
        for task in list(self.server_state.tasks):
            task.cancel()
        if self.server_state.connections:  # a client that does not read its answer is not waited for
            asyncio.get_running_loop().call_later(CUT_SECONDS, self.cut)

    async def _beat(self) -> None:
        """Uvicorn's heartbeat ends where draining begins, and gunicorn would take that for a hang."""
        while self.config.callback_notify is not None:
            await self.config.callback_notify()
            await asyncio.sleep(1)
