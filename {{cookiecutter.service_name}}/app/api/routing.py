"""A FastAPI route for JSON in, JSON out, without what a prediction does not need.

    body bytes -> one pydantic call -> endpoint(body, call) -> one orjson call -> bytes

FastAPI declares it: path, types, documentation, 405. But its own handler parses the body to a dict, solves
dependencies and opens exit stacks for every request, which costs more than a small model does.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from app.api.call import Call
from app.api.errors import from_validation
from app.core.errors import ServiceError

_SCALARS = (float, int, str, bool)


class JSONRoute(APIRoute):
    """A route whose endpoint takes the validated body and the `Call`, and returns what is written."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        (body,) = self.dependant.body_params
        kind: Any = body.field_info.annotation
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
        fields = list(kind.model_fields.values())
        flat = all(field.is_required() and field.annotation in _SCALARS for field in fields)
        self._colons = len(fields) if flat else -1  # in a body of this kind that is as it should be

    async def answer(self, call: Call, scope: Scope, receive: Receive) -> bytes:
        """The response body; raises ServiceError, or ClientDisconnect."""
        if call.content_type != b"application/json" or call.content_encoding:
            _check_media_type(call)
        service = call.service
        service.models.admission.check()
        call.body = body = await _read(call, scope, receive)
        with service.models.admission:
            document = self._validate(body)
            work = self.endpoint(document, call)
            if service.models.threaded:
                work = _unless_gone(work, receive)
            return orjson.dumps(await work)

    def _validate(self, body: bytes) -> Any:
        try:
            document = self._adapter.validate_json(body)
        except ValidationError as error:
            raise from_validation(error, body) from None
        # Every key has a colon: as many colons as fields means that no key came twice. Only where there are
        # more (a colon in a string, or a duplicate) is a closer look taken.
        if (colons := body.count(b":")) != self._colons and colons > _fields_set(document):
            json.loads(body, object_pairs_hook=_unique)
        return document

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook: the same `answer`, for requests that come through its router."""

        async def handle(request: Request) -> Response:
            body = await self.answer(request.scope["state"]["call"], request.scope, request.receive)
            return Response(body, self.status_code or 200, media_type="application/json")

        return handle


def _check_media_type(call: Call) -> None:
    essence = call.content_type.split(b";")[0].strip().lower()
    json_like = essence.startswith(b"application/") and essence.endswith((b"/json", b"+json"))
    if essence and not json_like:
        raise ServiceError("unsupported_media_type", "send application/json")
    if call.content_encoding.lower() not in (b"", b"identity"):
        raise ServiceError("unsupported_media_type", "send the body without Content-Encoding")


async def _read(call: Call, scope: Scope, receive: Receive) -> bytes:
    """The whole body, at most APP_MAX_BODY_BYTES of it; raises ServiceError, or ClientDisconnect."""
    limit = call.service.settings.max_body_bytes
    if call.content_length <= limit:
        # Nearly always the body has arrived with the headers; only if it has not, an alarm is set.
        whole = scope.get("extensions", {}).get("http.request.whole")
        body = whole(receive) if whole is not None else None
        if body is None:
            body = await _receive(call, receive, limit)
        if len(body) <= limit:
            return body
    raise ServiceError("body_too_large", f"at most {limit} bytes")


async def _receive(call: Call, receive: Receive, limit: int) -> bytes:
    """The body as ASGI gives it, until it exceeds `limit`; ServiceError at the deadline of the request."""
    chunks, size, more = [], 0, True
    try:
        async with asyncio.timeout(call.deadline - perf_counter()):
            while more and size <= limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunks.append(message.get("body", b""))
                size, more = size + len(chunks[-1]), message.get("more_body", False)
    except TimeoutError:
        call.service.recorder.count(call.service.metrics.shed, "deadline")
        raise ServiceError("model_timeout", "the body did not arrive in time") from None
    return b"".join(chunks)


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result, or ClientDisconnect and the work cancelled; a task too many unless the work takes long."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _fields_set(value: Any) -> int:
    if isinstance(value, BaseModel):
        nested = (one for one in value.__dict__.values() if isinstance(one, (list, BaseModel)))
        return len(value.model_fields_set) + sum(map(_fields_set, nested))
    return sum(map(_fields_set, value)) if isinstance(value, list) else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):  # parsers differ on which one counts, so neither does
        raise ServiceError("invalid_input", "a key appears twice in one object")
    return unique
