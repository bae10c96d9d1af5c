"""A connection: from the socket's bytes to a request, and from an answer to bytes.

    WAITING -> HEAD -> BODY -> WAITING -> ... requests, one after the other or pipelined
    any of them -> REFUSING: not HTTP, too large, too late -> the application's problem document -> CLOSING

uvicorn's workers ignore gunicorn's limits and wait forever. Here every wait for a client has a timeout and
every part of a request a size limit, at the cost of a few comparisons per request and a timer per connection.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.core.errors import ServiceError

MAX_HEAD_BYTES, MAX_URI_BYTES, MAX_HEADERS = 65_536, 8_192, 100
MAX_PIPELINED = 100  # requests of one connection that wait for earlier ones
LINGER_SECONDS = 1.0  # while the server stops, idle connections may still send a request
WIRE_FACTOR = 2  # limit for a body with chunk headers: chunks of one byte would cost a second of CPU

_CLOSE = (b"connection", b"close")  # among the headers of every answer while the server stops
_TRAILERS: Any = deque(maxlen=0)  # discards the fields after a body: they are not headers

# Phases of reading from a connection: before a request; request line and headers; body; no more reading,
# because the last answer is being sent; waiting for the client to close.
WAITING, HEAD, BODY, REFUSING, CLOSING = range(5)


def whole_request(receive: Any) -> bytes | None:
    """The body if it arrived completely with the headers; else None, and the caller must use `receive`."""
    cycle = getattr(receive, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.more_body or cycle.disconnected:
        return None
    cycle.flow.resume_reading()
    cycle.message_event.clear()
    body, cycle.body = bytes(cycle.body), bytearray()
    return body


class LingeringTransport:
    """A transport whose `close` gives the client time to read the answer: see `Protocol._hang_up`."""

    __slots__ = ("_closing", "_hang_up", "_transport")

    def __init__(self, transport: Any, hang_up: Callable[[], None]) -> None:
        self._transport, self._hang_up, self._closing = transport, hang_up, False

    def is_closing(self) -> bool:
        """Whether `close` was called, or the connection has ended."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Hang up; a second call no longer waits for the client."""
        if self._closing:
            self._transport.close()
        else:
            self._closing = True
            self._hang_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol with timeouts, size limits, and most answers written in one piece."""

    # An instance's dictionary gets slow beyond thirty attributes, and uvicorn's class has nearly as many.
    __slots__ = (
        "_extensions", "_max_wire", "_phase", "_seconds", "_since", "_size", "_socket", "_stalled", "_timer",
    )  # fmt: skip

    def connection_made(self, transport: Any) -> None:
        """Start the timer: a new connection must send a request's headers in time."""
        super().connection_made(transport)
        settings = self.app_state["service"].settings
        self._seconds: float = settings.header_timeout_seconds
        self._max_wire: int = MAX_HEAD_BYTES + WIRE_FACTOR * settings.max_body_bytes
        self._socket = transport
        self.transport: Any = LingeringTransport(transport, self._hang_up)
        self.url, self.headers = b"", _TRAILERS
        self._size = 0  # bytes received of the head or of the body
        self._stalled: Any = None  # timer while the client does not read its answer
        self._extensions: Any = {"http.response.whole": self._write, "http.request.whole": whole_request}
        self._phase, self._since = HEAD, self.loop.time()
        self._timer = self.loop.call_later(self._seconds, self._on_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers and everything else that waits for this client."""
        super().connection_lost(exc)
        self._timer.cancel()
        self._extensions.clear()  # breaks a reference cycle, so that this object is freed now
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse a packet, which may hold a part of a request or several requests."""
        if self._phase == REFUSING or self._phase == CLOSING:
            return
        self._size += len(data)
        try:
            self.parser.feed_data(data)
            if self._size:
                self._check_part()
        except HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ServiceError) else ServiceError("invalid_request"))
        except HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except ServiceError as error:
            self._refuse(error)

    def on_headers_complete(self) -> None:
        """Start the request; raises ServiceError, which httptools wraps and `data_received` answers."""
        self._check_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ServiceError("invalid_request", "too many requests at once on one connection")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ServiceError("invalid_request")
            return  # httptools would lose the body; `_decline` parses the request again
        HttpToolsProtocol.on_headers_complete(self)
        self.scope["extensions"] = self._extensions
        self.headers, self._phase, self._size = _TRAILERS, BODY, 0

    def on_message_complete(self) -> None:
        """The body is complete; a request that offers an upgrade is not started yet, and is parsed again."""
        if self._phase == BODY:
            self._phase, self._size = WAITING, 0
            if self.cycle.response_complete:  # the answer was sent before the body was complete
                self._since = self.loop.time()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was sent: start the next request if it has arrived, else wait for it."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._phase == WAITING:
            self._since = self.loop.time()
        elif self._phase == BODY and self.cycle.response_complete:
            self._hurry(BODY)
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def shutdown(self) -> None:
        """The server stops: still answer a request that is in transit; closing now would reset it."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self.leave)
        else:
            self.leave()

    def leave(self) -> None:
        """Close now, or after the current answer."""
        super().shutdown()

    def pause_writing(self) -> None:
        """The client does not read its answers: abort the connection after a timeout."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self._seconds, self._socket.abort)

    def resume_writing(self) -> None:
        """The client reads its answers again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _write(self, send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write the answer in one piece. Returns False, with no effect, if the caller must use `send`.

        This is so if the client is slow or gone, or if another layer has wrapped `send`.
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

    def _check_part(self) -> None:
        """The packet ended within a request: check the part so far; raises ServiceError."""
        if self._phase == BODY:
            if self._size > self._max_wire:
                raise ServiceError("body_too_large")
            return
        if self._phase == WAITING:
            self._hurry(HEAD)
        self._check_head()
        if self._size > MAX_HEAD_BYTES:
            raise ServiceError("headers_too_large")

    def _check_head(self) -> None:
        if len(self.url) > MAX_URI_BYTES:
            raise ServiceError("uri_too_long", f"at most {MAX_URI_BYTES} bytes")
        if len(self.headers) > MAX_HEADERS or (
            self._size > MAX_HEAD_BYTES  # rare: a packet this large
            and sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES
        ):
            raise ServiceError("headers_too_large", f"at most {MAX_HEADERS} of {MAX_HEAD_BYTES} bytes in all")

    def _decline(self, rest: bytes) -> None:
        """Handle the request as if it offered no upgrade, which is how HTTP declines an upgrade."""
        version = self.parser.get_http_version().encode()
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        head += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.data_received(b"\r\n".join((*head, b"", rest)))

    def _refuse(self, error: ServiceError) -> None:
        """Stop reading; answer, unless the client could match the answer to another request."""
        in_body, cycle, self._phase = self._phase == BODY, self.cycle, REFUSING
        if cycle is None or cycle.response_complete:
            if in_body:
                self.transport.close()
            else:
                self._answer(error)
        elif not in_body:
            cycle.keep_alive = False  # earlier requests are answered, then the connection closes
        elif cycle.response_started or self.pipeline:
            self._socket.abort()
        else:
            cycle.disconnected = cycle.response_complete = True  # ignore later output of its route
            cycle.message_event.set()
            self._answer(error)

    def _answer(self, error: ServiceError) -> None:
        """Let the application refuse the request, so that it has an id, a log line and a count."""
        self.on_message_begin()
        self.url, scope = b"/", self.scope
        HttpToolsProtocol.on_headers_complete(self)
        self.cycle.keep_alive = False
        unknown: Any = {"http_version": "1.1", "method": "", "path": "", "raw_path": b"", "query_string": b""}
        scope.update(unknown | {"extensions": self._extensions, "refused": error})

    def _hang_up(self) -> None:
        """Close; if the client is still sending, give it time to read the answer first.

        Closing a socket with unread bytes sends a reset, which could overtake the answer.
        """
        if self._socket.is_closing():
            return
        if self._phase == BODY or self._phase == REFUSING:
            self.flow.resume_reading()
            self._socket.write_eof()
        else:
            self._socket.close()  # after the rest of the answer is sent
        self._hurry(CLOSING)

    def _hurry(self, phase: int) -> None:
        """Enter a phase that the client must complete within `_seconds`."""
        self._phase, self._since = phase, self.loop.time()
        self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds, self._on_timer)

    def _on_timer(self, last_call: bool = False) -> None:
        """End a wait that took too long, or set the timer for the current wait.

        Each connection has one timer, which fires no later than the end of the current wait: a timer per
        request, as in uvicorn, costs more than a small model.
        """
        now, answered = self.loop.time(), self.cycle is None or self.cycle.response_complete
        if not answered and self._phase in (WAITING, BODY, REFUSING):
            self._since = now  # waiting for the application, which has its own deadline
        seconds = self.timeout_keep_alive if self._phase == WAITING else self._seconds
        left = self._since + seconds - now
        if left > 0:
            self._timer = self.loop.call_later(left, self._on_timer)
        elif not last_call:
            # Bytes that arrived while the loop was busy are in time: let the loop read them first.
            self._timer = self.loop.call_later(0.01, self._on_timer, True)
        elif self._phase == CLOSING:
            self._socket.abort()
        elif self._phase == HEAD and self._size:
            self._refuse(ServiceError("request_timeout", "the headers did not arrive in time"))
        else:
            self.transport.close()
