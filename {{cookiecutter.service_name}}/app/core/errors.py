"""What can go wrong with a request, as classes that know their status and code.

One handler (`api.errors`) writes them; nobody else turns an exception into an answer.
"""

from typing import Any, ClassVar


class ServiceError(Exception):
    """A failure a client is told about. `detail` is for people and never holds the input."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    retry_after: ClassVar[int | None] = None  # seconds

    def __init__(self, detail: str = "", *, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail or self.title
        self.errors = errors or []
        self.headers: dict[str, str] = {}
        if self.retry_after is not None:
            self.headers["retry-after"] = str(self.retry_after)


class InvalidInput(ServiceError):
    """The instance is well-formed JSON but breaks the contract."""

    status, code, title = 422, "invalid_input", "Invalid input"


class Overloaded(ServiceError):
    """The queue is full; nothing was read or run."""

    status, code, title, retry_after = 503, "overloaded", "Overloaded", 1


class ModelNotReady(ServiceError):
    """No usable model is loaded."""

    status, code, title, retry_after = 503, "model_not_ready", "Model not ready", 2

    def __init__(self, detail: str = "check 'model': still loading") -> None:
        super().__init__(detail)


class ModelTimeout(ServiceError):
    """The deadline passed before there was an answer."""

    status, code, title, retry_after = 503, "model_timeout", "Deadline exceeded", 1


class ModelError(ServiceError):
    """The model raised on this very row."""

    status, code, title = 500, "model_error", "Model error"


class NonFiniteOutput(ServiceError):
    """The model answered NaN or infinity for this row."""

    status, code, title = 500, "non_finite_output", "Non-finite model output"


class ArtifactError(Exception):
    """An artifact that must not be served; the message is one line that names file and reason."""
