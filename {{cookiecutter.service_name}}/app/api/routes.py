"""The calls for the model: JSON in, JSON out, without what a prediction does not need.

    body bytes -> one pydantic call -> endpoint(body, call) -> one orjson call -> bytes

FastAPI declares them: path, types, documentation, 405. But its own handler parses the body to a dict, solves
dependencies and opens exit stacks for every request, which costs more than a small model does. So the
middleware calls `JSONRoute.answer`.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from app.api.call import Call, CurrentCall
from app.api.errors import from_validation
from app.core.errors import ServiceError
from app.schemas.predict import Features, Prediction
from app.schemas.service import Accepted, Batch, Feedback, Instances, Problem

_SCALARS = (float, int, str, bool)


class JSONRoute(APIRoute):
    """A route whose endpoint takes the validated body and the `Call`, and returns what is written."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        (body,) = self.dependant.body_params
        kind: Any = body.field_info.annotation
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)
        fields = list(kind.model_fields.values())
        flat = all(field.is_required() and field.annotation in _SCALARS for field in fields)
        self._colons = len(fields) if flat else -1  # in a body of this kind that is as it should be

    async def answer(self, call: Call, scope: Scope, receive: Receive) -> bytes:
        """The response body; raises ServiceError, or ClientDisconnect."""
        if call.content_type != b"application/json" or call.content_encoding:
            _check_media_type(call)
        models, client = call.service.models, call.session or call.client
        admission = models.admission
        admission.check(models.wait_for(client))  # before the body is read; again once it is here
        call.body = body = await _read(call, scope, receive)
        admission.enter(models.wait_for(client), len(body))
        try:
            work = self.endpoint(self._validate(body), call)
            return orjson.dumps(await (_unless_gone(work, receive) if models.threaded else work))
        finally:
            admission.leave(len(body))

    def _validate(self, body: bytes) -> Any:
        try:
            document = self._adapter.validate_json(body)
        except ValidationError as error:
            raise from_validation(error, body) from None
        # Every key has a colon: as many colons as fields means that no key came twice. Only where there are
        # more (a colon in a string, or a duplicate) is a closer look taken.
        if (colons := body.count(b":")) != self._colons and colons > _fields_set(document):
            json.loads(body, object_pairs_hook=_unique)
        return document


def _check_media_type(call: Call) -> None:
    essence = call.content_type.split(b";")[0].strip().lower()
    json_like = essence.startswith(b"application/") and essence.endswith((b"/json", b"+json"))
    if essence and not json_like:
        raise ServiceError("unsupported_media_type", "send application/json")
    if call.content_encoding.lower() not in (b"", b"identity"):
        raise ServiceError("unsupported_media_type", "send the body without Content-Encoding")


async def _read(call: Call, scope: Scope, receive: Receive) -> bytes:
    """The whole body, at most APP_MAX_BODY_BYTES of it; raises ServiceError, or ClientDisconnect."""
    limit = call.service.settings.max_body_bytes
    if call.content_length <= limit:
        # Nearly always the body has arrived with the headers; only if it has not, an alarm is set.
        whole = scope.get("extensions", {}).get("http.request.whole")
        body = whole(receive) if whole is not None else None
        if body is None:
            body = await _receive(call, receive, limit)
        if len(body) <= limit:
            return body
    raise ServiceError("body_too_large", f"at most {limit} bytes")


async def _receive(call: Call, receive: Receive, limit: int) -> bytes:
    """The body as ASGI gives it, until it exceeds `limit`; ServiceError at the deadline of the request."""
    body, more, admission = bytearray(), True, call.service.models.admission
    try:
        async with asyncio.timeout(call.deadline - perf_counter()):
            while more and len(body) <= limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part = message.get("body", b"")
                body += part
                admission.bytes += len(part)
                admission.check(0.0)
                more = message.get("more_body", False)
    except TimeoutError:
        call.service.recorder.count(call.service.metrics.shed, "deadline")
        raise ServiceError("model_timeout", "the body did not arrive in time") from None
    finally:
        admission.bytes -= len(body)
    return bytes(body)


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result, or ClientDisconnect and the work cancelled; a task too many unless the work takes long."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _fields_set(value: Any) -> int:
    if isinstance(value, BaseModel):
        nested = (one for one in value.__dict__.values() if isinstance(one, (list, BaseModel)))
        return len(value.model_fields_set) + sum(map(_fields_set, nested))
    return sum(map(_fields_set, value)) if isinstance(value, list) else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):  # parsers differ on which one counts, so neither does
        raise ServiceError("invalid_input", "a key appears twice in one object")
    return unique


_MEANING = {
    400: "The body is not JSON.",
    401: "No API key was sent, or one that is not accepted.",
    413: "The body is larger than this service takes.",
    415: "The body is not sent as plain JSON.",
    422: "The input breaks the contract; `errors` says where.",
    429: "The client's quota is used up; see Retry-After.",
    500: "The model failed on this input, or the service did.",
    503: "Overloaded, out of time, or the model is not ready; see Retry-After.",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": meaning} for status, meaning in _MEANING.items()
}

# OpenAPI's links: further calls that a client may make with a request or an answer.
_AS_BATCH = {
    "InBatch": {
        "operationId": "predict_batch_v1_predict_batch_post",
        "requestBody": {"instances": ["$request.body"]},
        "description": "The same instance as one of several gets the same answer.",
    }
}
_ALONE = {
    "Alone": {
        "operationId": "predict_v1_predict_post",
        "requestBody": "$request.body#/instances/0",
        "description": "An instance of the batch by itself gets the same answer.",
    }
}

inference = APIRouter(prefix="/v1", route_class=JSONRoute, tags=["inference"], responses=ANSWERS)


@inference.post("/predict", summary="Predict one instance", responses={200: {"links": _AS_BATCH}})
async def predict(features: Features, call: CurrentCall) -> Prediction:
    """One instance in, one prediction out. `score` is the model's probability of `label`."""
    pipeline = call.pipeline
    predictions = await pipeline.predict([features], call.stems(1), call.deadline, single=True)
    call.record(predictions, pipeline.model.thresholds)
    return predictions[0]


@inference.post("/predict/batch", summary="Predict several instances", responses={200: {"links": _ALONE}})
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
    responses={
        404: {"model": Problem, "description": "This service made no prediction with this id."},
        409: {"model": Problem, "description": "Another label was given for it before."},
    },
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
