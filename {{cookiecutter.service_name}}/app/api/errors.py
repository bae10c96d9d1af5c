"""The one place where a failure becomes an answer: ServiceError -> problem document (RFC 9457)."""

from itertools import islice
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app.core.errors import ServiceError
from app.schemas.service import MAX_ERRORS, Problem

MAX_BYTES, MAX_NAME, MAX_MSG = 8192, 64, 160
MEDIA_TYPE = "application/problem+json"
_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def problem(error: ServiceError, request_id: str) -> bytes:
    """The body of the answer to `error`; `request_id` must be well-formed."""
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
    while len(body := orjson.dumps(document)) > MAX_BYTES:
        document.errors.pop()
    return body


def from_validation(error: ValidationError, body: bytes) -> ServiceError:
    """400 if `body` is not JSON, else 422 with the violations."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    try:
        orjson.loads(body)  # stricter than pydantic: refuses NaN, Infinity and lone surrogates
    except orjson.JSONDecodeError:
        return ServiceError(
            "invalid_json", "the body is not one JSON document in UTF-8, or holds NaN or Infinity"
        )
    return violations([{**one, "loc": ("body", *one["loc"])} for one in details])


def violations(details: list[Any]) -> ServiceError:
    """422 with an entry for each of pydantic's `details`."""
    errors = []
    for one in details:
        loc = list(one["loc"])
        if one["type"] == "extra_forbidden":  # the client chose this name: any text of any length
            loc[-1] = "".join(islice(filter(str.isprintable, loc[-1]), MAX_NAME))
        errors.append({"loc": loc, "msg": one["msg"][:MAX_MSG], "type": one["type"]})
    return ServiceError("invalid_input", f"{len(errors)} violation(s) of the contract", errors)


async def handle(request: Request, error: Exception) -> Response:
    """FastAPI's handler for errors of its router, of its validation, and of this service."""
    if isinstance(error, RequestValidationError):
        failure = violations([one for one in error.errors() if one["type"] != "json_invalid"])
        failure = failure if failure.errors else ServiceError("invalid_json")
    elif isinstance(error, HTTPException):
        failure = ServiceError(_CODES.get(error.status_code, "internal_error"))
        failure.headers |= {name.lower(): value for name, value in (error.headers or {}).items()}
        if "GET" in failure.headers.get("allow", ""):  # the middleware answers HEAD as GET
            failure.headers["allow"] += ", HEAD"
    else:
        failure = error if isinstance(error, ServiceError) else ServiceError("internal_error")
    body = problem(failure, request.scope["state"]["call"].request_id)
    return Response(body, failure.status, {"content-type": MEDIA_TYPE, **failure.headers})
