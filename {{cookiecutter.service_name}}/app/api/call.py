"""The running service, and the state of one request, which the middleware makes for the route."""

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
AUDIT_ROWS = 100  # per log line; many log collectors cut lines at 16 KiB
_IDEMPOTENCY_KEY = re.compile(rb"[\x20-\x7e]{1,255}")
_ATTEMPT = re.compile(rb"[2-9]|[1-9][0-9]{1,2}")  # Envoy's count on a request that it retries
# A classifier decides on label and score, a regressor on a value.
_DECIDED = [one.name for one in fields(Prediction) if one.name in ("label", "score", "value", "degraded")]


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
    keyed: OrderedDict[str, None] = field(default_factory=OrderedDict)  # prediction ids, to recognise retries

    def count_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request; `route` is a path of this service, or `none`."""
        method = method if method in METHODS else "OTHER"
        self.recorder.count(self.metrics.requests, method, route, str(status))
        self.recorder.observe(self.metrics.duration, seconds, method, route)


@dataclass(slots=True, eq=False)
class Call:
    """State of one request, from its headers to its log line; times are of `perf_counter`."""

    service: Service
    headers: dict[bytes, bytes]  # names in lower case
    started: float
    deadline: float
    request_id: str
    trace_id: str | None = None
    client: str = ""  # hashed
    session: str = ""  # value of APP_CANARY_HEADER, in place of the client
    body: bytes = b""
    model_version: str | None = None
    canary: Canary | None = None  # the canary that counts this request
    prediction_id: str | None = None
    audit: dict[str, Any] = field(default_factory=dict)  # further fields of the log line
    error: BaseException | None = None  # for the log, not for the client
    status: int = 0  # of the answer, once it has begun
    counted: bool = False  # already, by the instrumentator in FastAPI's stack

    @property
    def pipeline(self) -> Pipeline:
        """The model that answers this client; raises ServiceError while none is loaded."""
        pipeline, self.canary = self.service.models.pipeline_for(self.session or self.client)
        self.model_version = pipeline.version
        return pipeline

    def stems(self, count: int) -> list[str]:
        """The first part of each prediction id: random, or with Idempotency-Key a hash of key and body."""
        if (key := self.headers.get(b"idempotency-key")) is None:
            return [os.urandom(STEM_DIGITS // 2).hex() for _ in range(count)]
        if not _IDEMPOTENCY_KEY.fullmatch(key):
            where, rule = ["header", "Idempotency-Key"], "must be 1 to 255 printable ASCII characters"
            error = {"loc": where, "msg": rule, "type": "idempotency_key"}
            raise ServiceError("invalid_input", f"Idempotency-Key {rule}", [error])
        seed = key + b"\0" + self.body
        stems = [
            hashlib.sha256(b"%d\0%s" % (index, seed)).hexdigest()[:STEM_DIGITS] for index in range(count)
        ]
        keyed = self.service.keyed
        if stems[0] in keyed:
            self.service.recorder.count(self.service.metrics.retried, "key")
        keyed[stems[0]] = None
        if len(keyed) > MAX_KEYED:
            keyed.popitem(last=False)
        return stems

    def record(self, predictions: Sequence[Prediction], thresholds: dict[str, Any]) -> None:
        """Complete the prediction ids, and log the decisions without the inputs."""
        service, entries = self.service, []
        for one in predictions:
            decided = {name: getattr(one, name) for name in _DECIDED}
            answer = decided[_DECIDED[0]]
            one.prediction_id = service.feedback.identify(one.prediction_id, one.model_version, answer)
            entries.append({"prediction_id": one.prediction_id, **decided, "action": one.action})
        self.prediction_id = predictions[0].prediction_id
        if len(entries) == 1:
            self.audit = {"thresholds": thresholds, "predictions": entries}
            return
        common = {"request_id": self.request_id, "model_version": self.model_version}
        for start in range(0, len(entries), AUDIT_ROWS):
            part = entries[start : start + AUDIT_ROWS]
            service.log.info("audit", **common, thresholds=thresholds, predictions=part)

    def finish(self, method: str, route: str, seconds: float) -> None:
        """Count the answer, unless FastAPI's stack has counted it, and write the log line of this request."""
        if not self.counted:
            self.service.count_answer(method, route, self.status, seconds)
        if self.canary is not None:
            self.canary.note(self.model_version == self.canary.pipeline.version, self.status, seconds)
        line = {
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
        if (key := self.headers.get(b"idempotency-key")) is not None:
            line["idempotency_key"] = hashlib.sha256(key).hexdigest()[:12]
        if (attempt := self.headers.get(b"x-envoy-attempt-count")) and _ATTEMPT.fullmatch(attempt):
            line["attempt"] = int(attempt)
            self.service.recorder.count(self.service.metrics.retried, "proxy")
        if self.error is not None:
            line["exc_info"] = self.error
        self.service.request_line(self.error is not None, line)


def _current(request: Request) -> Call:
    call: Call = request.scope["state"]["call"]
    return call


CurrentCall = Annotated[Call, Depends(_current)]
