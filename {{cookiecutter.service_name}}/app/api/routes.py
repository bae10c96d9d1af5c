"""The calls of this service. A route reads as one sentence: take the request, ask the pipeline, answer."""

from typing import Any

from fastapi import APIRouter

from app.api.call import CurrentCall
from app.api.routing import JSONRoute
from app.core.errors import ServiceError
from app.schemas.predict import Features, Prediction
from app.schemas.service import (
    Accepted,
    Batch,
    Feedback,
    Health,
    Instances,
    Problem,
    Ready,
    ServedModel,
    Version,
)

_MEANING = {
    400: "The body is not JSON.",
    401: "No API key was sent.",
    403: "The API key is not accepted.",
    413: "The body is larger than this service takes.",
    415: "The body is not sent as plain JSON.",
    422: "The input breaks the contract; `errors` says where.",
    429: "The client's quota is used up; see Retry-After.",
    500: "The model failed on this input, or the service did.",
    503: "Overloaded, out of time, or the model is not ready; see Retry-After.",
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
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

inference = APIRouter(prefix="/v1", route_class=JSONRoute, tags=["inference"], responses=_ANSWERS)
operations = APIRouter(tags=["operations"])


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


@operations.get("/health", summary="Is the process alive?")
async def health() -> Health:
    """Liveness: touches nothing, not even the model."""
    return Health()


@operations.get("/ready", summary="Can it predict?", responses={503: _ANSWERS[503]})
async def ready(call: CurrentCall) -> Ready:
    """Readiness: 503 with the failing check named until a model is loaded and warm."""
    call.service.models.check_ready()
    return Ready(call.pipeline.version)


@operations.get("/version", summary="What is running?")
async def version(call: CurrentCall) -> Version:
    """The service, its API and the served model."""
    service, served = call.service, None
    if pipeline := service.models.serving:
        manifest = pipeline.artifact.manifest
        training = manifest.training.data_sha256 if manifest.training else None
        sha256, execution = pipeline.artifact.sha256, pipeline.execution
        served = ServedModel(
            manifest.version, sha256, manifest.runtime, training, manifest.libraries, execution
        )
    return Version(service.name, service.version, "v1", served)
