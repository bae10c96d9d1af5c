"""A connection: from the socket's bytes to a request, and from an answer to bytes.

    WAITING -> HEAD -> BODY -> WAITING -> ... requests, one after the other or sent ahead
    any of them -> REFUSING: not HTTP, too large, too late -> the application's problem document -> CLOSING

uvicorn's workers heed none of gunicorn's limits and wait for ever. Here every wait for a client has an end
and everything kept of a request has a bound, for a few comparisons a request and one timer a connection.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.core.errors import ServiceError

MAX_HEAD_BYTES, MAX_URI_BYTES, MAX_HEADERS = 65_536, 8_192, 100
MAX_PIPELINED = 100  # requests that wait on one connection for those before them
LINGER_SECONDS = 1.0  # for a request on its way over an idle connection while the server stops
WIRE_FACTOR = 2  # bytes of a body with its chunk sizes: chunks of one byte each would cost a second of work

_CLOSE = (b"connection", b"close")  # among the headers of every answer while the server stops
_TRAILERS: Any = deque(maxlen=0)  # takes the fields after a body and keeps none: they are no headers

# What is read from a connection: nothing, because the next request has not begun; a request line and headers;
# a body; nothing any more, because the last answer is under way; only the client's end.
WAITING, HEAD, BODY, REFUSING, CLOSING = range(5)


def whole_request(receive: Any) -> bytes | None:
    """The body if all of it has arrived with the headers; else None, and `receive` gives it as ASGI says."""
    cycle = getattr(receive, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or cycle.more_body or cycle.disconnected:
        return None
    cycle.flow.resume_reading()
    cycle.message_event.clear()
    body, cycle.body = bytes(cycle.body), bytearray()
    return body


class LingeringTransport:
    """A transport whose closing leaves the client time to read the answer: see `Protocol._hang_up`."""

    __slots__ = ("_closing", "_hang_up", "_transport")

    def __init__(self, transport: Any, hang_up: Callable[[], None]) -> None:
        self._transport, self._hang_up, self._closing = transport, hang_up, False

    def is_closing(self) -> bool:
        """Whether `close` was called, or the connection has ended."""
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        """Hang up; the second call does not wait for the client any more."""
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
        "_extensions", "_max_wire", "_phase", "_seconds", "_since", "_size", "_socket", "_stalled", "_timer",
    )  # fmt: skip

    def connection_made(self, transport: Any) -> None:
        """A new connection has to bring a head, in time."""
        super().connection_made(transport)
        settings = self.app_state["service"].settings
        self._seconds: float = settings.header_timeout_seconds
        self._max_wire: int = MAX_HEAD_BYTES + WIRE_FACTOR * settings.max_body_bytes
        self._socket = transport
        self.transport: Any = LingeringTransport(transport, self._hang_up)
        self.url, self.headers = b"", _TRAILERS
        self._size = 0  # bytes of the head, or of the body, as of the last packet
        self._stalled: Any = None  # timer: the client takes no answer
        self._extensions: Any = {"http.response.whole": self._write, "http.request.whole": whole_request}
        self._phase, self._since = HEAD, self.loop.time()
        self._timer = self.loop.call_later(self._seconds, self._on_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """End everything that waits for this client."""
        super().connection_lost(exc)
        self._timer.cancel()
        self._extensions.clear()  # else this object would stay until the collector looks
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse a packet; it may hold a part of a request, or several."""
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
        """Start the request; raises ServiceError for `_refuse` to answer, which httptools wraps."""
        self._check_head()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ServiceError("invalid_request", "too many requests at once on one connection")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ServiceError("invalid_request")
            return  # httptools would lose the body: see `_decline`
        HttpToolsProtocol.on_headers_complete(self)
        self.scope["extensions"] = self._extensions
        self.headers, self._phase, self._size = _TRAILERS, BODY, 0

    def on_message_complete(self) -> None:
        """The body is complete; where another protocol was offered, the request is still to come."""
        if self._phase == BODY:
            self._phase, self._size = WAITING, 0
            if self.cycle.response_complete:  # only the rest of the body was still to come
                self._since = self.loop.time()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was sent: begin with the next request if it is here, else wait for it."""
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
        """The server stops: a request that is on its way is still answered; closing now would reset it."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_SECONDS, self.leave)
        else:
            self.leave()

    def leave(self) -> None:
        """Close, or have the answer that is under way be the last."""
        super().shutdown()

    def pause_writing(self) -> None:
        """The client does not take its answers: in a while the connection is cut."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self._seconds, self._socket.abort)

    def resume_writing(self) -> None:
        """The client takes its answers again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _write(self, send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bool:
        """Answer in one piece; False, and nothing done, where `send` has to be called as ASGI says.

        So it is where the client is slow or gone, or another layer has put a `send` of its own in between.
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
        """The packet ended within a request: check what is there of it; raises ServiceError."""
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
        """Read no more; answer, unless the client could take the answer for that to another request."""
        in_body, cycle, self._phase = self._phase == BODY, self.cycle, REFUSING
        if cycle is None or cycle.response_complete:
            if in_body:
                self.transport.close()
            else:
                self._answer(error)
        elif not in_body:
            cycle.keep_alive = False  # requests from before are answered, and then the connection ends
        elif cycle.response_started or self.pipeline:
            self._socket.abort()
        else:
            cycle.disconnected = cycle.response_complete = True  # whatever its route still sends
            cycle.message_event.set()
            self._answer(error)

    def _answer(self, error: ServiceError) -> None:
        """Let the application refuse, so that this, too, has its id, its log line and its count."""
        self.on_message_begin()
        self.url, scope = b"/", self.scope
        HttpToolsProtocol.on_headers_complete(self)
        self.cycle.keep_alive = False
        unknown: Any = {"http_version": "1.1", "method": "", "path": "", "raw_path": b"", "query_string": b""}
        scope.update(unknown | {"extensions": self._extensions, "refused": error})

    def _hang_up(self) -> None:
        """Close; where the client still speaks, only after it had time to read the answer.

        A socket closed with unread bytes sends a reset, which would overtake the answer.
        """
        if self._socket.is_closing():
            return
        if self._phase == BODY or self._phase == REFUSING:
            self.flow.resume_reading()
            self._socket.write_eof()
        else:
            self._socket.close()  # once the client has taken the rest of the answer
        self._hurry(CLOSING)

    def _hurry(self, phase: int) -> None:
        """From now on the client has `_seconds` to complete this phase."""
        self._phase, self._since = phase, self.loop.time()
        self._timer.cancel()
        self._timer = self.loop.call_later(self._seconds, self._on_timer)

    def _on_timer(self, last_call: bool = False) -> None:
        """End a wait that took too long, or look again when the current one may have.

        There is one timer a connection, never later than the end of the current wait: to set one for each
        request, as uvicorn does, costs more than a small model.
        """
        now, answered = self.loop.time(), self.cycle is None or self.cycle.response_complete
        if not answered and self._phase in (WAITING, BODY, REFUSING):
            self._since = now  # we wait for the application, whose routes have a deadline of their own
        seconds = self.timeout_keep_alive if self._phase == WAITING else self._seconds
        left = self._since + seconds - now
        if left > 0:
            self._timer = self.loop.call_later(left, self._on_timer)
        elif not last_call:
            # Bytes that arrived while the loop was busy have arrived in time: let them be read first.
            self._timer = self.loop.call_later(0.01, self._on_timer, True)
        elif self._phase == CLOSING:
            self._socket.abort()
        elif self._phase == HEAD and self._size:
            self._refuse(ServiceError("request_timeout", "the headers did not arrive in time"))
        else:
            self.transport.close()
