"""The routes for predictions and feedback, without the parts of FastAPI that cost too much.

    body bytes -> one pydantic call -> endpoint(body, call) -> one orjson call -> bytes

FastAPI declares them: path, types, documentation, 405. But its handler parses the body to a dict, solves
dependencies and opens exit stacks for every request, which costs more than a small model. So the middleware
calls `JSONRoute.answer` directly.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from app.api.call import Call, CurrentCall
from app.api.errors import from_validation
from app.core.errors import ServiceError
from app.schemas.predict import Features, Prediction
from app.schemas.service import ANSWERS, AS_BATCH, AS_SINGLE, Accepted, Batch, Feedback, Instances, refusal


class JSONRoute(APIRoute):
    """A route whose endpoint takes the validated body and the `Call`, and returns the object to send."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        (body,) = self.dependant.body_params
        self._kind: Any = body.field_info.annotation

    async def answer(self, call: Call, scope: Scope, receive: Receive) -> bytes:
        """The response body; raises ServiceError, or ClientDisconnect."""
        headers = call.headers
        coded = b"content-encoding" in headers or b"transfer-encoding" in headers
        if coded or headers.get(b"content-type") != b"application/json":
            _check_media_type(headers)
        models, client = call.service.models, call.session or call.client
        admission = models.admission
        call.body = body = await _read(call, client, scope, receive)
        admission.enter(models.wait_for(client), len(body))
        try:
            work = self.endpoint(self._validate(body), call)
            return orjson.dumps(await (_unless_gone(work, receive) if models.threaded else work))
        finally:
            admission.leave(len(body))

    def _validate(self, body: bytes) -> Any:
        try:
            document = self._kind.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error, body) from None
        # Each key has a colon. No more colons than fields means no duplicate keys. More colons (in a string,
        # or after a duplicate key) need a second parse.
        keys = len(document.model_fields_set)
        if isinstance(document, Instances):
            keys += sum([len(one.model_fields_set) for one in document.instances])
        if body.count(b":") > keys:
            json.loads(body, object_pairs_hook=_unique)
        return document


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    essence = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if essence and not (essence.startswith(b"application/") and essence.endswith((b"/json", b"+json"))):
        raise ServiceError("unsupported_media_type", "send application/json")
    plain = headers.get(b"content-encoding", b"").lower() in (b"", b"identity")
    if not plain or headers.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        raise ServiceError("unsupported_media_type", "send the body without Content-Encoding")


async def _read(call: Call, client: str, scope: Scope, receive: Receive) -> bytes:
    """The whole body; raises ClientDisconnect, or ServiceError: too large, too late, overloaded."""
    limit, announced = call.service.settings.max_body_bytes, int(call.headers.get(b"content-length", b"0"))
    whole = scope.get("extensions", {}).get("http.request.whole")
    body: bytes | None = whole(receive) if whole is not None else None
    if body is None:  # the rare case: it did not arrive together with the headers
        parts, more, admission = bytearray(), announced <= limit, call.service.models.admission
        admission.check(call.service.models.wait_for(client))  # before reading more
        try:
            async with asyncio.timeout(call.deadline - perf_counter()):
                while more and len(parts) <= limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part = message.get("body", b"")
                    parts += part
                    admission.bytes += len(part)
                    admission.check(0.0)
                    more = message.get("more_body", False)
        except TimeoutError:
            call.service.recorder.count(call.service.metrics.shed, "deadline")
            raise ServiceError("model_timeout", "the body did not arrive in time") from None
        finally:
            admission.bytes -= len(parts)
        body = bytes(parts)
    if max(len(body), announced) > limit:
        raise ServiceError("body_too_large", f"at most {limit} bytes")
    return body


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of `work`; if the client disconnects, cancel it and raise ClientDisconnect."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):  # parsers differ on which value counts
        raise ServiceError("invalid_input", "a key appears twice in one object")
    return unique


inference = APIRouter(prefix="/v1", route_class=JSONRoute, tags=["inference"], responses=ANSWERS)


@inference.post("/predict", summary="Predict one instance", responses=AS_BATCH)
async def predict(features: Features, call: CurrentCall) -> Prediction:
    """One instance in, one prediction out. `score` is the model's probability of `label`."""
    pipeline = call.pipeline
    predictions = await pipeline.predict([features], call.stems(1), call.deadline, single=True)
    call.record(predictions, pipeline.model.thresholds)
    return predictions[0]


@inference.post("/predict/batch", summary="Predict several instances", responses=AS_SINGLE)
async def predict_batch(batch: Instances, call: CurrentCall) -> Batch:
    """Predictions in the order of the instances; an invalid one fails the request and is named by index."""
    count, limit = len(batch.instances), call.service.settings.max_batch_items
    if count > limit:
        error = {"loc": ["body", "instances"], "msg": f"at most {limit} instances", "type": "too_long"}
        raise ServiceError("invalid_input", "too many instances", [error])
    pipeline = call.pipeline
    predictions = await pipeline.predict(batch.instances, call.stems(count), call.deadline)
    call.record(predictions, pipeline.model.thresholds)
    return Batch(pipeline.version, predictions)


@inference.post(
    "/feedback",
    status_code=202,
    summary="Say what was right",
    responses=refusal(404, "This service made no prediction with this id.")
    | refusal(409, "Another label was given for it before."),
)
async def feedback(truth: Feedback, call: CurrentCall) -> Accepted:
    """The true label of an earlier prediction; the same again changes nothing, another one is refused."""
    version, correct, news = call.service.feedback.judge(truth.prediction_id, truth.label)
    if news:
        outcome = "correct" if correct else "incorrect"
        call.service.recorder.count(call.service.metrics.feedback, version, outcome)
    call.model_version, call.prediction_id = version, truth.prediction_id
    call.audit = {"feedback": truth.label, "correct": correct, "news": news}
    return Accepted()
