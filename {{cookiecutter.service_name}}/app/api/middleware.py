"""The one ASGI middleware: everything that holds for every request, released in `finally`.

    headers -> Call (request id, trace, clock) -> key, quota -> [slot] -> route -> answer -> metrics -> log line

Requests for the model (`JSONRoute`) are dispatched here, by path: they skip FastAPI's middleware stack and
router, which know nothing about them that this module does not. All others go on to FastAPI.
"""

import os
import re
from collections.abc import MutableMapping
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.call import Call
from app.api.errors import problem, safe_field, safe_reason
from app.api.routing import JSONRoute
from app.api.service import Service
from app.core.errors import InvalidInput, ModelNotReady, Overloaded, ServiceError

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_IDEMPOTENCY_KEY = re.compile(rb"[\x21-\x7e]{1,255}")

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})
_JSON_HEADERS = [(b"content-type", b"application/json")]
_SHED_REASONS: dict[type[ServiceError], str] = {Overloaded: "queue_full", ModelNotReady: "not_ready"}
# Predictions are about somebody: nothing in between may keep or reinterpret them.
_COMMON_HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]


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
        call, key = self._open(scope)
        route = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
        if route is None:
            await self._pass_on(call, key, scope, receive, send)
        else:
            await self._dispatch(route, call, key, scope, receive, send)

    async def _dispatch(
        self, route: JSONRoute, call: Call, key: bytes | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        service, inside = self._service, False
        status, headers = 200, _JSON_HEADERS
        try:
            await self._identify(call, key, scope)
            pipeline = service.pipeline
            service.admission.enter(0 if pipeline is None else pipeline.batcher.abandoned)
            inside = True
            body = await route.answer(call, receive)
        except ClientDisconnect:
            service.recorder.disconnect()
            status, body, headers = 499, b"", []  # nginx's number for it; nobody will read it
        except Exception as error:
            status, body, headers = self._failed(call, error)
        finally:
            if inside:
                service.admission.leave()
        if status != 499:
            length = (b"content-length", b"%d" % len(body))
            own = (b"x-request-id", call.request_id.encode())
            start = {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, length, own, *_COMMON_HEADERS],
            }
            await send(start)
            await send({"type": "http.response.body", "body": body})
        service.recorder.request("POST", route.path, status, perf_counter() - call.started)
        self._log(call, "POST", route.path, status)

    async def _pass_on(
        self, call: Call, key: bytes | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """FastAPI answers, and the instrumentator in its stack counts; here it gets its id and its log line."""
        status = 500
        refused = False

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", call.request_id.encode()), *_COMMON_HEADERS
                ]  # fmt: skip
            await send(message)

        scope.setdefault("state", {})["call"] = call
        path = scope["path"]
        try:
            if path.startswith("/v1/"):
                await self._identify(call, key, scope)
            if path == "/metrics":
                await self._service.recorder.settle()
            await self._app(scope, receive, send_marked)
        except Exception as error:
            refused = isinstance(error, ServiceError)
            status, body, headers = self._failed(call, error)
            start = {"type": "http.response.start", "status": status, "headers": headers}
            await send_marked(start | {"headers": [*headers, (b"content-length", b"%d" % len(body))]})
            await send({"type": "http.response.body", "body": body})
        route = getattr(scope.get("route"), "path", "none")
        if refused:  # the instrumentator has not seen it
            self._service.recorder.request(scope["method"], route, status, perf_counter() - call.started)
        self._log(call, scope["method"], route, status)

    def _open(self, scope: Scope) -> tuple[Call, bytes | None]:
        """The call and the key it shows, from one pass over the headers."""
        started = perf_counter()
        service = self._service
        call = Call(service, "", started, started + service.settings.request_deadline_seconds)
        key: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"content-type":
                call.content_type = value
            elif name == b"content-length":
                call.content_length = int(value) if value.isdigit() else 0
            elif name == b"x-request-id":
                if _REQUEST_ID.fullmatch(value):
                    call.request_id = value.decode()
            elif name == b"traceparent":
                if match := _TRACEPARENT.fullmatch(value):
                    call.trace_id = match[1].decode()
            elif name == b"x-api-key":
                key = value
            elif name == b"authorization" and key is None:
                scheme, _, credentials = value.partition(b" ")
                key = credentials.strip() if scheme.lower() == b"bearer" else None
            elif name == b"idempotency-key":
                call.idempotency_key = value.decode() if _IDEMPOTENCY_KEY.fullmatch(value) else None
            elif name == b"content-encoding":
                call.content_encoding = value
        if not call.request_id:
            call.request_id = os.urandom(16).hex()
        return call, key

    async def _identify(self, call: Call, key: bytes | None, scope: Scope) -> None:
        guard = self._service.guard
        client = scope["client"]
        call.client = guard.authenticate(key, client[0] if client else "")
        if guard.limits:
            await guard.spend(call.client)

    def _failed(self, call: Call, error: Exception) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """The answer to a failure, counted; what a client must not see is kept for the log line."""
        recorder = self._service.recorder
        if not isinstance(error, ServiceError):
            call.error = error
            error = ServiceError("the traceback is in the log under the request id")
        elif error.__cause__ is not None:
            call.error = error.__cause__
        if reason := _SHED_REASONS.get(type(error)):
            recorder.shed(reason)
        elif error.status == 429:
            recorder.shed("rate_limit")
        elif isinstance(error, InvalidInput):
            for one in error.errors:
                recorder.violation(safe_field(one["loc"], self._features), safe_reason(one["type"]))
        status, body, headers = problem(error, call.request_id)
        return status, body, [(name.encode(), value.encode()) for name, value in headers.items()]

    def _log(self, call: Call, method: str, route: str, status: int) -> None:
        fields: MutableMapping[str, Any] = {
            "request_id": call.request_id,
            "trace_id": call.trace_id,
            "method": method,
            "route": route,
            "status": status,
            "duration_ms": round((perf_counter() - call.started) * 1000, 3),
            "model_version": call.model_version,
            "prediction_id": call.prediction_id,
            "client": call.client,
        }
        if call.error is None:
            self._service.log.info("request", **fields)
        else:
            self._service.log.error("request", **fields, exc_info=call.error)
