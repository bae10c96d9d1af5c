"""One request's own facts, and the service it came to: made by the middleware, handed to the route."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from app.core.errors import ModelNotReady

if TYPE_CHECKING:
    from app.api.service import Service
    from app.core.pipeline import Pipeline


@dataclass(slots=True, eq=False)
class Call:
    """What one request carries from the door to the log line."""

    service: Service
    request_id: str
    started: float  # perf_counter
    deadline: float  # perf_counter
    trace_id: str | None = None
    client: str = ""  # hashed
    idempotency_key: str | None = None
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int = 0
    body: bytes = b""
    model_version: str | None = None
    prediction_id: str | None = None
    error: BaseException | None = field(default=None)

    @property
    def pipeline(self) -> Pipeline:
        """The model that answers; raises ModelNotReady while there is none."""
        pipeline = self.service.pipeline
        if pipeline is None:
            raise ModelNotReady
        self.model_version = pipeline.version
        return pipeline

    def prediction_ids(self, count: int) -> list[str]:
        """32 hex digits each: random, or a function of Idempotency-Key and body, so that a retry is recognisable."""
        if self.idempotency_key is None:
            ids = [os.urandom(16).hex() for _ in range(count)]
        else:
            seed = hashlib.sha256(self.idempotency_key.encode() + b"\0" + self.body)
            ids = []
            for index in range(count):
                own = seed.copy()
                own.update(b"\0%d" % index)
                ids.append(own.hexdigest()[:32])
        self.prediction_id = ids[0]
        return ids


def current_call(request: Request) -> Call:
    """FastAPI dependency for `CurrentCall`."""
    call: Call = request.scope["state"]["call"]
    return call


CurrentCall = Annotated[Call, Depends(current_call)]
