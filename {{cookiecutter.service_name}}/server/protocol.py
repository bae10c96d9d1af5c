"""A connection: what uvicorn leaves open between the socket and the first request that is one.

    bytes -> httptools -> complete head within time and limits -> uvicorn's cycle -> one piece of bytes
                       -> anything else: `_refuse` -> the application's problem document -> close

uvicorn's workers heed none of gunicorn's limits and wait for ever. Here every wait for a client has an end,
and what is kept of a request has a bound, for a few comparisons a request and a timer a connection.
It stands beside `api`, which knows no server.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.core.errors import ServiceError

MAX_HEAD_BYTES, MAX_URI_BYTES, MAX_HEADERS = 65_536, 8_192, 100
MAX_PIPELINED = 100  # requests that wait on one connection for those before them
LINGER_SECONDS = 1.0  # for what an idle connection may still bring while the server stops
WIRE_FACTOR = 2  # what a body may take with its chunks: those of a byte each would cost a second of work

_CLOSE = (b"connection", b"close")  # among the headers of every answer while the server stops
_TRAILERS: Any = deque(maxlen=0)  # takes in the fields after a body and keeps none: they are no headers


class Door:
    """A transport whose closing leaves the client the time to read what it was told: see `_hang_up`."""

    __slots__ = ("_closing", "_hang_up", "_transport")

    def __init__(self, transport: Any, hang_up: Callable[[], None]) -> None:
        self._transport, self._hang_up, self._closing = transport, hang_up, False

    def is_closing(self) -> bool:
        """See `asyncio.Transport`."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """See `asyncio.Transport`; the second call does not wait for the client any more."""
        if self._closing:
            self._transport.close()
        else:
            self._closing = True
            self._hang_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with an end to every wait, a bound on every size, and most answers in one piece."""

    # Beyond thirty attributes Python's dictionary for an instance gets slow; uvicorn's has nearly as many.
    __slots__ = (
        "_deaf", "_extensions", "_idle", "_idle_since", "_in_body", "_max_wire",
        "_patience", "_seconds", "_size", "_socket", "_stalled",
    )  # fmt: skip

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        settings = self.app_state["service"].settings
        self._seconds: float = settings.header_timeout_seconds
        self._max_wire: int = MAX_HEAD_BYTES + WIRE_FACTOR * settings.max_body_bytes
        self._socket = transport
        self.transport: Any = Door(transport, self._hang_up)
        self.url, self.headers = b"", _TRAILERS
        self._size = 0  # bytes since the last request or head was complete, as of the last packet
        self._in_body = self._deaf = False
        self._stalled: asyncio.TimerHandle | None = None  # rings when a client takes no answer
        self._patience: asyncio.TimerHandle | None = None  # rings when a client has not finished speaking
        self._extensions: Any = {"http.response.whole": self._write}
        self._be_patient()
        # One timer for all waits between requests: one for each, as uvicorn has it, costs more than a model.
        self._idle_since = self.loop.time()
        self._idle = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._be_patient(False)
        self._idle.cancel()
        self._extensions.clear()  # else this object would stay until the collector looks
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._deaf:
            return
        self._size += len(data)
        try:
            self.parser.feed_data(data)
        except HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ServiceError) else ServiceError("invalid_request"))
        except HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        else:
            if self._size:
                self._look()

    def on_headers_complete(self) -> None:
        """See httptools; raises ServiceError for what `_refuse` is to answer."""
        if self._patience is not None:
            self._be_patient(False)
        if len(self.headers) > MAX_HEADERS or len(self.url) > MAX_URI_BYTES or self._size > MAX_HEAD_BYTES:
            self._check_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ServiceError("invalid_request", "too many requests at once on one connection")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ServiceError("invalid_request")
            return  # httptools would lose the body: see `_decline`
        HttpToolsProtocol.on_headers_complete(self)
        self.scope["extensions"] = self._extensions
        self.headers, self._in_body, self._size = _TRAILERS, True, 0

    def on_message_complete(self) -> None:
        """See httptools."""
        if not self._in_body:  # another protocol was offered: the request is still to come
            return
        self._in_body, self._size, cycle = False, 0, self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        else:  # only the rest of the body was still to come
            self._idle_since = self.loop.time()
        if self._patience is not None:
            self._be_patient(False)

    def on_response_complete(self) -> None:
        """See uvicorn."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._idle_since = self.loop.time()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """See uvicorn; closing at once would reset a request that is on its way, so that one is answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self.leave)
        else:
            self.leave()

    def leave(self) -> None:
        """Close, or have the answer that is under way be the last."""
        super().shutdown()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`; who takes no answer for too long gets none."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self._seconds, self._socket.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _write(self, send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Answer in one piece; False, and nothing done, where `send` has to be called as ASGI says.

        So it is where the client is slow or gone, or somebody has put a `send` of his own in between.
        """
        cycle = getattr(send, "__self__", None)
        if not isinstance(cycle, RequestResponseCycle) or cycle.disconnected or self.flow.write_paused:
            return False
        headers = [*cycle.default_headers, *headers]
        if cycle.keep_alive:
            cycle.keep_alive = _CLOSE not in cycle.default_headers
        elif _CLOSE not in headers:
            headers.append(_CLOSE)
        parts = [STATUS_LINE[status]]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        self._socket.write(b"".join((*parts, b"\r\n", body)))
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def _close_if_idle(self) -> None:
        """Close a connection that has had no request for too long, or look again when it may have."""
        busy = self._size or (self.cycle is not None and not self.cycle.response_complete)
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left <= 0 and not busy:
            self.transport.close()
        else:
            self._idle = self.loop.call_later(max(left, 1.0), self._close_if_idle)

    def _look(self) -> None:
        """The packet ended within a request: is it still one we wait for?"""
        if self._patience is None:
            self._be_patient()
        try:
            if not self._in_body:
                self._check_head()
                if self._size > MAX_HEAD_BYTES:
                    raise ServiceError("headers_too_large")
            elif self._size > self._max_wire:
                raise ServiceError("body_too_large")
        except ServiceError as error:
            self._refuse(error)

    def _check_head(self) -> None:
        if len(self.url) > MAX_URI_BYTES:
            raise ServiceError("uri_too_long", f"at most {MAX_URI_BYTES} bytes")
        if len(self.headers) > MAX_HEADERS or (
            self._size > MAX_HEAD_BYTES  # nearly never: a packet with so much in it
            and sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES
        ):
            raise ServiceError("headers_too_large", f"at most {MAX_HEADERS} of {MAX_HEAD_BYTES} bytes in all")

    def _decline(self, rest: bytes) -> None:
        """Take the request as if it offered no other protocol, which is how HTTP says no."""
        version = self.parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        head += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.data_received(b"\r\n".join((*head, b"", rest)))

    def _refuse(self, error: ServiceError) -> None:
        """Listen no more; answer where an answer cannot be taken for that to another request."""
        self._deaf, cycle = True, self.cycle
        self._be_patient(False)
        if cycle is None or cycle.response_complete:
            if self._in_body:
                self.transport.close()
            else:
                self._answer(error)
        elif not self._in_body:
            cycle.keep_alive = False  # what was asked before is answered, and then the door closes
        elif cycle.response_started or self.pipeline:
            self._socket.abort()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            self._answer(error)

    def _answer(self, error: ServiceError) -> None:
        """Let the application say it, so that this, too, has its id, its log line and its count."""
        self.on_message_begin()
        scope: Any = self.scope
        scope |= {"method": "", "path": "", "raw_path": b"", "query_string": b"", "refused": error}
        scope["extensions"] = self._extensions
        self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self.cycle, self.app)

    def _hang_up(self) -> None:
        """Close; where the client still speaks, only after it had time to read what it was told.

        A socket closed with unread bytes sends a reset, which would overtake the answer.
        """
        if self._socket.is_closing():
            return
        if self._deaf or self._in_body:
            self._deaf = True
            self.flow.resume_reading()
            self._socket.write_eof()
            self._be_patient()
        else:
            self._socket.close()
            # Until the client has taken what is still to be sent; but not for ever.
            self._stalled = self._stalled or self.loop.call_later(self._seconds, self._socket.abort)

    def _be_patient(self, still: bool = True) -> None:
        """Wait for the client from now on; or, with `still` false, not any more."""
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(self._seconds, self._last_call) if still else None

    def _last_call(self) -> None:
        """What arrived while the loop was busy has arrived in time: let it be read first."""
        self._patience = self.loop.call_later(0.01, self._give_up)

    def _give_up(self) -> None:
        self._patience = None
        if self._deaf:
            self._socket.abort()
        elif self._in_body and not self.cycle.response_complete:
            self._be_patient()  # the route that reads the body has its own deadline
        elif self._size and not self._in_body:
            self._refuse(ServiceError("request_timeout", "the headers did not arrive in time"))
        else:
            self.transport.close()
