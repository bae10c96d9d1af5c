"""The running service, and one request to it: made by the middleware, handed to the route."""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from app.api.security import Guard
from app.core.errors import ServiceError
from app.core.pipeline import Pipeline
from app.monitoring.feedback import STEM_DIGITS, Feedback
from app.observability.logging import Logger, RequestLine
from app.observability.metrics import Metrics, Recorder
from app.rollout.canary import Canary
from app.rollout.fleet import Fleet
from app.rollout.models import Models
from app.schemas.predict import Prediction
from app.settings import Settings

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_KEYED = 10_000  # predictions with an Idempotency-Key that one worker remembers
AUDIT_ROWS = 100  # a line; many collectors of logs cut lines at 16 KiB
_IDEMPOTENCY_KEY = re.compile(rb"[\x20-\x7e]{1,255}")


def decision(prediction: Any) -> dict[str, Any]:
    """A classifier's label and score, or a regressor's value."""
    try:
        return {"label": prediction.label, "score": prediction.score}
    except AttributeError:
        return {"value": prediction.value}


@dataclass(slots=True, eq=False)
class Service:
    """The parts of the running service, for routes, middleware and capabilities."""

    name: str
    version: str
    settings: Settings
    fleet: Fleet
    log: Logger
    request_line: RequestLine
    metrics: Metrics
    recorder: Recorder
    guard: Guard
    feedback: Feedback
    models: Models
    keyed: OrderedDict[str, None] = field(default_factory=OrderedDict)  # ids of predictions with a key

    def count_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request; `route` is a path of this service's, or `none`."""
        method = method if method in METHODS else "OTHER"
        self.recorder.count(self.metrics.requests, method, route, str(status))
        self.recorder.observe(self.metrics.duration, seconds, method, route)

    def count_retry(self, prediction_id: str) -> None:
        """A prediction with an Idempotency-Key; one seen lately in this worker is a retry."""
        if prediction_id in self.keyed:
            self.recorder.count(self.metrics.retried, "key")
        self.keyed[prediction_id] = None
        if len(self.keyed) > MAX_KEYED:
            self.keyed.popitem(last=False)


@dataclass(slots=True, eq=False)
class Call:
    """State of one request, from its headers to its log line; times are of `perf_counter`."""

    service: Service
    started: float
    deadline: float
    request_id: str = ""
    trace_id: str | None = None
    client: str = ""  # hashed
    session: str = ""  # value of APP_CANARY_HEADER, in place of the client
    idempotency_key: bytes | None = None
    attempt: int = 1  # number of this attempt, from a retrying proxy
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int = 0
    body: bytes = b""
    model_version: str | None = None
    canary: Canary | None = None  # the one it is counted for
    prediction_id: str | None = None
    audit: dict[str, Any] = field(default_factory=dict)  # further fields of the log line
    error: BaseException | None = None  # for the log, not for the client
    status: int = 0  # of the answer, once it has begun
    counted: bool = False  # by the instrumentator in FastAPI's stack

    @property
    def pipeline(self) -> Pipeline:
        """The model that answers this client; raises ServiceError while there is none."""
        pipeline, self.canary = self.service.models.pipeline_for(self.session or self.client)
        self.model_version = pipeline.version
        return pipeline

    def stems(self, count: int) -> list[str]:
        """How ids begin: at random, or with Idempotency-Key as key and body say, for retries."""
        key = self.idempotency_key
        if key is None:
            return [os.urandom(STEM_DIGITS // 2).hex() for _ in range(count)]
        if not _IDEMPOTENCY_KEY.fullmatch(key):
            where, rule = ["header", "Idempotency-Key"], "must be 1 to 255 printable ASCII characters"
            error = {"loc": where, "msg": rule, "type": "idempotency_key"}
            raise ServiceError("invalid_input", f"Idempotency-Key {rule}", [error])
        seed = key + b"\0" + self.body
        stems = [
            hashlib.sha256(b"%d\0%s" % (index, seed)).hexdigest()[:STEM_DIGITS] for index in range(count)
        ]
        self.service.count_retry(stems[0])
        return stems

    def record(self, predictions: Sequence[Prediction], thresholds: dict[str, Any]) -> None:
        """Complete the ids, and put the decisions on record, never the inputs."""
        service, entries = self.service, []
        for one in predictions:
            decided = decision(one)
            answer = next(iter(decided.values()))
            one.prediction_id = service.feedback.identify(one.prediction_id, one.model_version, answer)
            entries.append({"prediction_id": one.prediction_id, **decided, "action": one.action})
        self.prediction_id = predictions[0].prediction_id
        common: dict[str, Any] = {"thresholds": thresholds, "predictions": entries}
        if len(entries) == 1:
            self.audit = common
            return
        common |= {"request_id": self.request_id, "model_version": self.model_version}
        for start in range(0, len(entries), AUDIT_ROWS):
            service.log.info("audit", **common | {"predictions": entries[start : start + AUDIT_ROWS]})

    def finish(self, method: str, route: str, seconds: float) -> None:
        """Count the answer, unless FastAPI's stack has counted it, and write the one line of this request."""
        if not self.counted:
            self.service.count_answer(method, route, self.status, seconds)
        if self.canary is not None:
            self.canary.note(self.model_version == self.canary.pipeline.version, self.status, seconds)
        fields = {
            "event": "request",
            "request_id": self.request_id,
            "trace_id": self.trace_id,
            "method": method,
            "route": route,
            "status": self.status,
            "duration_ms": round(seconds * 1000, 3),
            "model_version": self.model_version,
            "prediction_id": self.prediction_id,
            "client": self.client,
            **self.audit,
        }
        if self.idempotency_key is not None:
            fields["idempotency_key"] = hashlib.sha256(self.idempotency_key).hexdigest()[:12]
        if self.attempt > 1:
            fields["attempt"] = self.attempt
        if self.error is not None:
            fields["exc_info"] = self.error
        self.service.request_line(self.error is not None, fields)


def _current(request: Request) -> Call:
    call: Call = request.scope["state"]["call"]
    return call


CurrentCall = Annotated[Call, Depends(_current)]
