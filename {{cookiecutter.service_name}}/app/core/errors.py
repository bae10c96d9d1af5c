"""Errors that know their status; only `api.errors` turns them into answers."""

from typing import Any

_STATUS = {
    "invalid_json": 400,
    "invalid_request": 400,  # not HTTP, or HTTP that two parsers could read differently
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "conflict": 409,
    "body_too_large": 413,
    "uri_too_long": 414,
    "unsupported_media_type": 415,
    "invalid_input": 422,
    "rate_limited": 429,
    "headers_too_large": 431,
    "internal_error": 500,
    "model_error": 500,  # the model raised on this row
    "non_finite_output": 500,
    "overloaded": 503,
    "features_unavailable": 503,  # a look-up failed
    "model_not_ready": 503,
    "model_timeout": 503,
}


class ServiceError(Exception):
    """A failure that is reported to the client; `detail` is for people and never holds the input."""

    def __init__(self, code: str, detail: str = "", errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(code)
        self.code, self.status = code, _STATUS[code]
        self.title = code.replace("_", " ").capitalize().replace("json", "JSON").replace("Uri", "URI")
        self.detail, self.errors = detail or self.title, errors or []
        self.headers = {"retry-after": "1"} if self.status in (429, 503) else {}


class ArtifactError(Exception):
    """An artifact that must not be served; the message is one line that names file and reason."""

    def __init__(self, message: str) -> None:
        # Names of files and keys may hold any character, also control characters of a terminal.
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


def reason_of(error: Exception) -> str:
    """Why a version is not used, without messages of libraries."""
    return str(error) if isinstance(error, ArtifactError) else type(error).__name__
