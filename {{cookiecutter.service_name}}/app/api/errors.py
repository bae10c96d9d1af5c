"""The one place where a failure becomes an answer: ServiceError -> problem document.

HTTP's own failures are ServiceErrors here too, so that routing, validation and the model are told alike.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.core.errors import InvalidInput, ServiceError
from app.schemas.problem import MAX_ERRORS, Problem

MAX_NAME = 64  # a name in `loc` may be the client's own: 20 of them must stay under 8 KiB
MAX_MSG = 160  # likewise, a long list of categories
MEDIA_TYPE = "application/problem+json"


class InvalidJSON(ServiceError):
    """The body is not one JSON document as RFC 8259 has it."""

    status, code, title = 400, "invalid_json", "Invalid JSON"


class Unauthorized(ServiceError):
    """No key."""

    status, code, title = 401, "unauthorized", "Unauthorized"


class Forbidden(ServiceError):
    """A key that is not accepted."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(ServiceError):
    """No such path."""

    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(ServiceError):
    """The path has other methods."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class BodyTooLarge(ServiceError):
    """More bytes than APP_MAX_BODY_BYTES."""

    status, code, title = 413, "body_too_large", "Body too large"


class UnsupportedMediaType(ServiceError):
    """Not JSON, or encoded."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class RateLimited(ServiceError):
    """The client's quota is used up."""

    status, code, title, retry_after = 429, "rate_limited", "Rate limited", 1


_BY_STATUS = {401: Unauthorized, 403: Forbidden, 404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}


def problem(error: ServiceError, request_id: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of the answer to `error`."""
    document = Problem(
        type=f"urn:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=request_id,
        errors=error.errors[:MAX_ERRORS],
        error=f"{error.title}: {error.detail}",
    )
    return error.status, orjson.dumps(document), {"content-type": MEDIA_TYPE, **error.headers}


def from_validation(error: ValidationError, body: bytes) -> ServiceError:
    """400 where `body` is not JSON at all, 422 with the violations where it is."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return InvalidJSON("the body is not a JSON document")
    try:
        orjson.loads(body)  # stricter than the validator: NaN, Infinity and lone surrogates are no JSON
    except orjson.JSONDecodeError:
        return InvalidJSON("the body is not a JSON document: NaN, Infinity or text that is not UTF-8")
    return violations(
        {"loc": ["body", *one["loc"]], "msg": one["msg"], "type": one["type"]} for one in details
    )


def violations(errors: Iterable[dict[str, Any]]) -> InvalidInput:
    """422 with one entry per violation, their names cut to a sane length."""
    entries = [
        {
            **one,
            "msg": one["msg"][:MAX_MSG],
            "loc": [part[:MAX_NAME] if isinstance(part, str) else part for part in one["loc"]],
        }
        for one in errors
    ]
    count = f"{len(entries)} violation{'s' if len(entries) > 1 else ''} of the contract"
    more = f", the first {MAX_ERRORS} are listed" if len(entries) > MAX_ERRORS else ""
    return InvalidInput(count + more, errors=entries)


def from_http(error: HTTPException) -> ServiceError:
    """Starlette's own failures: unknown path, wrong method."""
    kind = _BY_STATUS.get(error.status_code)
    known = kind() if kind else ServiceError(HTTPStatus(error.status_code).phrase)
    known.headers.update({name.lower(): value for name, value in (error.headers or {}).items()})
    return known


async def http_exception_handler(request: Request, error: Exception) -> Response:
    """FastAPI's hook for the failures of its router."""
    assert isinstance(error, HTTPException)
    return await service_error_handler(request, from_http(error))


async def validation_handler(request: Request, error: Exception) -> Response:
    """FastAPI's hook for violations found by its own validation, in routes that are no `JSONRoute`."""
    assert isinstance(error, RequestValidationError)
    details = [{key: one[key] for key in ("loc", "msg", "type")} for one in error.errors()]
    not_json = any(one["type"] == "json_invalid" for one in details)
    return await service_error_handler(request, InvalidJSON() if not_json else violations(details))


async def service_error_handler(request: Request, error: Exception) -> Response:
    """FastAPI's hook for our own."""
    assert isinstance(error, ServiceError)
    status, body, headers = problem(error, request.scope["state"]["call"].request_id)
    return Response(body, status, headers)


def safe_field(loc: list[Any], names: frozenset[str]) -> str:
    """The contract's name for where a violation is; names the client made up are all `other`."""
    return next((part for part in reversed(loc) if part in names), "other")


def safe_reason(kind: str) -> str:
    """A violation's type as a metric label."""
    return kind if re.fullmatch(r"[a-z_]{1,40}", kind) else "other"
