"""The service that runs, and one request to it: made by the middleware, handed to the route."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from app.api.security import Guard
from app.core.admission import Admission
from app.core.errors import ServiceError
from app.core.pipeline import Pipeline
from app.observability.logging import Logger
from app.observability.metrics import Recorder
from app.settings import Settings

if TYPE_CHECKING:
    from app.observability.tracing import Tracing

_IDEMPOTENCY_KEY = re.compile(rb"[\x20-\x7e]{1,255}")


@dataclass(slots=True, eq=False)
class Service:
    """What a process holds; `pipeline` is None until the lifespan has loaded and warmed the model."""

    name: str
    version: str
    settings: Settings
    log: Logger
    admission: Admission
    guard: Guard
    recorder: Recorder
    all_loaded: Callable[[], bool]  # this worker and all others
    tracing: "Tracing | None" = None
    pipeline: Pipeline | None = None


@dataclass(slots=True, eq=False)
class Call:
    """What one request carries from the door to the log line; times are of `perf_counter`."""

    service: Service
    started: float
    deadline: float
    request_id: str = ""
    trace_id: str | None = None
    client: str = ""  # hashed
    idempotency_key: bytes | None = None
    attempt: int = 1  # which one this is, as a retrying proxy says
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int = 0
    body: bytes = b""
    model_version: str | None = None
    prediction_id: str | None = None
    error: BaseException | None = None  # for the log, not for the client

    @property
    def pipeline(self) -> Pipeline:
        """The model that answers; raises ServiceError while there is none."""
        pipeline = self.service.pipeline
        if pipeline is None:
            raise ServiceError("model_not_ready", "check `model` fails: it is still loading")
        self.model_version = pipeline.version
        return pipeline

    def prediction_ids(self, count: int) -> list[str]:
        """32 hex digits each: random, or with Idempotency-Key a function of key and body, for retries."""
        key = self.idempotency_key
        if key is None:
            ids = [os.urandom(16).hex() for _ in range(count)]
        elif not _IDEMPOTENCY_KEY.fullmatch(key):
            where, rule = ["header", "Idempotency-Key"], "must be 1 to 255 printable ASCII characters"
            error = {"loc": where, "msg": rule, "type": "idempotency_key"}
            raise ServiceError("invalid_input", f"Idempotency-Key {rule}", [error])
        else:
            seed = key + b"\0" + self.body
            ids = [hashlib.sha256(b"%d\0%s" % (index, seed)).hexdigest()[:32] for index in range(count)]
            self.service.recorder.keyed(ids[0])
        self.prediction_id = ids[0]
        return ids

    @property
    def marks(self) -> dict[str, Any]:
        """What only some log lines have: the signs of a retry, and what went wrong."""
        marks: dict[str, Any] = {}
        if self.idempotency_key is not None:
            marks["idempotency_key"] = hashlib.sha256(self.idempotency_key).hexdigest()[:12]
        if self.attempt > 1:
            marks["attempt"] = self.attempt
        if self.error is not None:
            marks["exc_info"] = self.error
        return marks


def _current(request: Request) -> Call:
    call: Call = request.scope["state"]["call"]
    return call


CurrentCall = Annotated[Call, Depends(_current)]
