"""The one ASGI middleware: everything that holds for every request.

    headers -> Call (id, trace, clock) -> key, quota -> slot -> route -> answer -> metrics -> log line

Requests for the model (`JSONRoute`) are dispatched here, by path: they skip FastAPI's middleware stack and
router, which know nothing about them that this module does not. All others go on to FastAPI.
"""

import asyncio
import os
import re
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.call import Call, Service
from app.api.errors import MEDIA_TYPE, problem
from app.api.routing import JSONRoute
from app.core.errors import ServiceError
from app.observability.flight import OTHER

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_ATTEMPT = re.compile(rb"[2-9]|[1-9][0-9]{1,2}")  # what Envoy says of a request that it sends again
_SHED = {"overloaded": "queue_full", "model_not_ready": "not_ready", "rate_limited": "rate_limit"}
_CLOSED_REQUEST = 499  # nginx's number for a client that has gone
_JSON = [(b"content-type", b"application/json")]


class ServiceMiddleware:
    """Wraps FastAPI; `direct` are the routes it dispatches itself, by path."""

    def __init__(
        self, app: ASGIApp, service: Service, direct: dict[str, JSONRoute], features: frozenset[str]
    ) -> None:
        self._app, self._service, self._direct, self._features = app, service, direct, features

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, method, path = self._service, scope["method"], scope["path"]
        call, key = self._open(scope)
        route = self._direct.get(path) if method == "POST" else None
        status, headers, body = (route and route.status_code) or 200, _JSON, b""
        passed_on = started = False

        async def send_marked(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                own = (b"x-request-id", call.request_id.encode())
                message["headers"] = [*message.get("headers", ()), own]
            await send(message)

        try:
            if "refused" in scope:  # by `protocol`: it never became a request
                raise scope["refused"]
            if path.startswith("/v1/"):
                guard, query = service.guard, scope["query_string"]
                address = scope["client"][0] if scope["client"] else ""
                call.client, known = guard.identify(key, query, address)
                if not known:
                    await guard.refuse(call.client, key, query)
                if guard.limited:
                    await guard.spend(call.client)
                if service.models.canary is not None:
                    call.session = _session(scope, service.settings.canary_header)
            service.fleet.flight.route(OTHER if route is None else route.label)
            if route is not None:
                body = await route.answer(call, receive)
            else:
                if path == "/metrics":
                    await service.recorder.settle()
                scope.setdefault("state", {})["call"] = call
                passed_on = True
                await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            service.recorder.count(service.metrics.disconnects)
            status = _CLOSED_REQUEST
        except asyncio.CancelledError:  # by the server, when the time to finish what is inside is over
            if started:
                raise
            service.recorder.count(service.metrics.shed, "draining")
            failure = ServiceError("model_timeout", "the service stops before this can be finished")
            status, headers, body = self._failed(call, failure)
        except Exception as error:
            status, headers, body = self._failed(call, error)
        if not started and status != _CLOSED_REQUEST:
            length, own = (b"content-length", b"%d" % len(body)), (b"x-request-id", call.request_id.encode())
            headers = [*headers, length, own]
            whole = scope.get("extensions", {}).get("http.response.whole") if method != "HEAD" else None
            if whole is None or not whole(send, status, headers, body):
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
        scope["route_path"] = getattr(scope.get("route"), "path", None) if route is None else route.path
        handler = scope["route_path"] or "none"
        seconds = perf_counter() - call.started
        # A request that was passed on is counted by the instrumentator, which FastAPI's stack holds.
        call.finish(method, handler, status, seconds, counted=passed_on)

    def _open(self, scope: Scope) -> tuple[Call, bytes | None]:
        """The call and the key it shows, from one pass over the headers."""
        started = perf_counter()
        call = Call(self._service, started, started + self._service.settings.request_deadline_seconds)
        key: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"content-type":
                call.content_type = value
            elif name == b"content-length":
                call.content_length = int(value) if value.isdigit() else 0
            elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                call.request_id = value.decode()
            elif name == b"traceparent" and (match := _TRACEPARENT.fullmatch(value)):
                call.trace_id = match[1].decode()
            elif name == b"x-api-key":
                key = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = key or value[7:].strip()
            elif name == b"idempotency-key":
                call.idempotency_key = value
            elif name == b"content-encoding" or (
                name == b"transfer-encoding" and value.lower() != b"chunked"
            ):
                call.content_encoding = value
            elif name == b"x-envoy-attempt-count" and _ATTEMPT.fullmatch(value):
                call.attempt = int(value)
                self._service.recorder.count(self._service.metrics.retried, "proxy")
        call.trace_id = scope.get("trace_id", call.trace_id)  # from a capability that wraps this middleware
        call.request_id = call.request_id or os.urandom(16).hex()
        return call, key

    def _failed(self, call: Call, error: Exception) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """The answer to a failure, counted; what a client must not see is kept for the log line."""
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


def _session(scope: Scope, header: str | None) -> str:
    """What the header says that keeps clients with a canary; nothing if there is none."""
    wanted = header.lower().encode() if header else b""
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


class CrossOrigin(CORSMiddleware):
    """Stands around the service, which therefore sees no preflight: those get their id here."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """See Starlette."""
        response, given = super().preflight_response(request_headers), request_headers.get("x-request-id", "")
        kept = _REQUEST_ID.fullmatch(given.encode("latin-1"))
        response.headers["x-request-id"] = given if kept else os.urandom(16).hex()
        return response
