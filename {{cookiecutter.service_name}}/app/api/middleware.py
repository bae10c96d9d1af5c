"""The only ASGI middleware: everything that applies to every request.

    headers -> Call (id, trace, clock) -> admit: key, quota -> answer: route -> finish: send, count, log

Requests for the model (`JSONRoute`) are dispatched here, by path: they skip FastAPI's middleware stack and
router, which would add nothing. All other requests go to FastAPI.
"""

import asyncio
import os
import re
from time import perf_counter
from typing import Any

from opentelemetry.trace import format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.call import Call, Service
from app.api.errors import MEDIA_TYPE, problem
from app.api.routes import JSONRoute, inference
from app.core.errors import ServiceError
from app.schemas.contract import contract_inputs
from app.settings import Settings

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_SHED = {"overloaded": "queue_full", "model_not_ready": "not_ready", "rate_limited": "rate_limit"}
# Allowed in cross-origin requests: headers of the contract, and those that OpenTelemetry adds in browsers.
_OWN_HEADERS = ("authorization", "content-type", "idempotency-key", "x-api-key", "x-request-id")
_TRACE_HEADERS = ("traceparent", "tracestate", "baggage", "b3")
_CLOSED_REQUEST = 499  # nginx's number for a client that has gone
_PROPAGATOR = TraceContextTextMapPropagator()
_JSON = [(b"content-type", b"application/json")]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, body


class ServiceMiddleware:
    """Wraps FastAPI; admits, answers and finishes requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._direct = {route.path: route for route in inference.routes if isinstance(route, JSONRoute)}
        self._prefix = f"{service.settings.root_path}/" if service.settings.root_path else ""
        self._canary_header = (service.settings.canary_header or "").lower().encode()
        self._features = frozenset(entry["name"] for entry in contract_inputs())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, from its headers to its log line, however it ends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, call, prefix = self._service, self._open(scope), self._prefix
        if prefix and scope["path"].startswith(prefix) and scope["path"] not in self._direct:
            scope["path"] = scope["path"][len(prefix) - 1 :]  # the proxy did not strip the prefix
        route = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
        answer: Answer | None = None
        try:
            await self._admit(call, scope)
            answer = await self._answer(call, route, scope, receive, send)
        except ClientDisconnect:
            service.recorder.count(service.metrics.disconnects)
            call.status = _CLOSED_REQUEST
        except asyncio.CancelledError:  # by the server, when the time for open requests is over
            if call.status:
                raise
            service.recorder.count(service.metrics.shed, "draining")
            stops = ServiceError("model_timeout", "the service stops before this can be finished")
            answer = self._failed(call, stops)
        except Exception as error:
            answer = self._failed(call, error)
        await self._finish(call, route, answer, scope, send)

    async def _admit(self, call: Call, scope: Scope) -> None:
        """Raise ServiceError if the headers decide to refuse the request: not HTTP, no key, no quota."""
        if "refused" in scope:  # by the server: the bytes were not a valid request
            raise scope["refused"]
        if scope["path"].startswith("/v1/"):
            guard, query, headers = self._service.guard, scope["query_string"], call.headers
            address = scope["client"][0] if scope["client"] else ""
            key = headers.get(b"x-api-key")
            if not key and (bearer := headers.get(b"authorization", b""))[:7].lower() == b"bearer ":
                key = bearer[7:].strip()
            call.client, known = guard.identify(key, query, address)
            if not known:
                await guard.refuse(call.client, key, query)
            if guard.quota is not None:
                await guard.spend(guard.quota, call.client)
            if self._service.models.canary is not None:
                call.session = headers.get(self._canary_header, b"").decode("latin-1")

    async def _answer(
        self, call: Call, route: JSONRoute | None, scope: Scope, receive: Receive, send: Send
    ) -> Answer | None:
        """The answer of a JSONRoute; None if FastAPI's stack has sent the answer."""
        if route is not None:
            return route.status_code or 200, _JSON, await route.answer(call, scope, receive)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                own = (b"x-request-id", call.request_id.encode())
                message["headers"] = [*message.get("headers", ()), own]
            await send(message)

        if scope["path"] == "/metrics":
            await self._service.recorder.settle()
        scope.setdefault("state", {})["call"] = call
        call.counted = True  # by the instrumentator in FastAPI's stack
        # HEAD is answered as GET; the server sends no body, because its own scope still says HEAD.
        inner = {**scope, "method": "GET", "head": True} if scope["method"] == "HEAD" else scope
        await self._app(inner, receive, send_marked)
        scope["route"] = inner.get("route")
        return None

    async def _finish(
        self, call: Call, route: JSONRoute | None, answer: Answer | None, scope: Scope, send: Send
    ) -> None:
        """Send the answer, unless an answer has begun; count it and write its log line."""
        begun = call.status
        if answer is not None:
            call.status, headers, body = answer
            headers = [
                *headers,
                (b"content-length", b"%d" % len(body)),
                (b"x-request-id", call.request_id.encode()),
            ]
            # In one piece, if the server supports it.
            whole = scope.get("extensions", {}).get("http.response.whole")
            in_one = whole is not None and scope["method"] != "HEAD"
            if not begun and not (in_one and whole(send, call.status, headers, body)):
                await send({"type": "http.response.start", "status": call.status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
        scope["route_path"] = getattr(route or scope.get("route"), "path", None)
        call.finish(scope["method"], scope["route_path"] or "none", perf_counter() - call.started)

    def _open(self, scope: Scope) -> Call:
        """A Call with the ids from the request's headers."""
        started, headers = perf_counter(), dict(scope["headers"])
        deadline = started + self._service.settings.request_deadline_seconds
        request_id = _request_id(headers.get(b"x-request-id", b""))
        call = Call(self._service, headers, started, deadline, request_id)
        if "trace_id" in scope:  # from a capability that wraps this middleware
            call.trace_id = scope["trace_id"]
        elif b"traceparent" in headers:
            parents = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
            carrier = {"traceparent": parents if len(parents) == 1 else []}  # two headers are invalid
            caller = get_current_span(_PROPAGATOR.extract(carrier)).get_span_context()
            call.trace_id = format_trace_id(caller.trace_id) if caller.is_valid else None
        return call

    def _failed(self, call: Call, error: Exception) -> Answer:
        """The answer to a failure, counted; details that clients must not see are kept for the log line."""
        call.error = error.__cause__ if isinstance(error, ServiceError) else error
        failure = error if isinstance(error, ServiceError) else ServiceError("internal_error")
        recorder, metrics = self._service.recorder, self._service.metrics
        if reason := _SHED.get(failure.code):
            recorder.count(metrics.shed, reason)
        elif failure.status == 500:
            recorder.count(metrics.failures, failure.code)
        for one in failure.errors:
            # Labels come from closed sets: a name the client made up is `other`.
            field = next((part for part in reversed(one["loc"]) if part in self._features), "other")
            recorder.count(metrics.violations, field, one["type"])
        headers: dict[str, Any] = {"content-type": MEDIA_TYPE, **failure.headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        return failure.status, encoded, problem(failure, call.request_id)


def _request_id(given: bytes) -> str:
    """The request's own id if it is well-formed, else a new one."""
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


class CrossOrigin(CORSMiddleware):
    """CORS around the service. The service sees no preflights, so they get their request id here."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        canary = [settings.canary_header] if settings.canary_header else []
        headers = [*_OWN_HEADERS, *_TRACE_HEADERS, *canary, *settings.cors_headers]
        exposed = ("retry-after", "x-request-id")
        super().__init__(app, settings.cors_origins, ("GET", "POST"), headers, expose_headers=exposed)

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight, with the request's id or a new id."""
        response, given = super().preflight_response(request_headers), request_headers.get("x-request-id", "")
        response.headers["x-request-id"] = _request_id(given.encode("latin-1"))
        return response
