"""A FastAPI route for JSON in, JSON out, that skips what a prediction does not need.

    body bytes -> one pydantic call -> endpoint(body, call) -> one orjson call -> bytes

FastAPI declares it: path, types, documentation, 405. But its own handler parses the body to a dict, solves
dependencies and opens exit stacks for every request, which costs more than a small model. `answer` does the
three steps above instead, and `get_route_handler` gives FastAPI's router the same function, so that both
ways to reach the route are one.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.api import errors
from app.api.call import Call
from app.core.errors import InvalidInput

JSON = "application/json"


class JSONRoute(APIRoute):
    """A route whose endpoint takes the validated body and the `Call`, and returns what is written."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        (body,) = self.dependant.body_params
        self._adapter: TypeAdapter[BaseModel] = TypeAdapter(body.field_info.annotation)

    async def answer(self, call: Call, receive: Receive) -> bytes:
        """The response body; raises ServiceError."""
        _check_media_type(call)
        call.body = body = await _read(call, receive)
        try:
            document = self._adapter.validate_json(body)
        except ValidationError as error:
            raise errors.from_validation(error, body) from None
        _refuse_duplicate_keys(document, body)
        return orjson.dumps(await self.endpoint(document, call))

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook: the same `answer`, for requests that come through its router."""

        async def handle(request: Request) -> Response:
            return Response(
                await self.answer(request.scope["state"]["call"], request.receive), media_type=JSON
            )

        return handle


def _check_media_type(call: Call) -> None:
    if call.content_type and call.content_type != b"application/json":
        essence = call.content_type.split(b";")[0].strip().lower()
        if essence != b"application/json" and not (
            essence.startswith(b"application/") and essence.endswith(b"+json")
        ):
            raise errors.UnsupportedMediaType("send application/json")
    if call.content_encoding and call.content_encoding.lower() != b"identity":
        raise errors.UnsupportedMediaType("send the body without Content-Encoding")


async def _read(call: Call, receive: Receive) -> bytes:
    """The whole body, at most APP_MAX_BODY_BYTES of it."""
    limit = call.service.settings.max_body_bytes
    if call.content_length > limit:
        raise errors.BodyTooLarge(f"at most {limit} bytes")
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body") or message["type"] == "http.disconnect":
        chunks, size = [body], len(body)
        while message.get("more_body"):
            if size > limit:
                break
            message = await receive()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body = b"".join(chunks)
    if len(body) > limit:
        raise errors.BodyTooLarge(f"at most {limit} bytes")
    return body


def _refuse_duplicate_keys(document: BaseModel, body: bytes) -> None:
    """Two values for one key: parsers differ on which one counts, so neither does.

    Every key has a colon. As many colons as fields that were set means that there is no second one; only
    otherwise (a colon in a string, or a duplicate) is a closer look taken.
    """
    if body.count(b":") > _fields_set(document):
        json.loads(body, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise InvalidInput("a key appears twice in one object")
    return unique


def _fields_set(value: Any) -> int:
    if isinstance(value, BaseModel):
        set_fields = value.model_fields_set
        nested = (getattr(value, name) for name in set_fields)
        return len(set_fields) + sum(_fields_set(one) for one in nested if isinstance(one, (list, BaseModel)))
    return sum(map(_fields_set, value)) if isinstance(value, list) else 0
