"""The service that runs, and one request to it: made by the middleware, handed to the route."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.api.security import Guard
from app.core.admission import Admission
from app.core.errors import ServiceError
from app.core.pipeline import Pipeline
from app.observability.logging import Logger
from app.observability.metrics import Recorder
from app.settings import Settings


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
        if self.idempotency_key is None:
            ids = [os.urandom(16).hex() for _ in range(count)]
        else:
            seed = self.idempotency_key + b"\0" + self.body
            ids = [hashlib.sha256(b"%d\0%s" % (index, seed)).hexdigest()[:32] for index in range(count)]
        self.prediction_id = ids[0]
        return ids


def _current(request: Request) -> Call:
    call: Call = request.scope["state"]["call"]
    return call


CurrentCall = Annotated[Call, Depends(_current)]
