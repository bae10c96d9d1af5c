"""Answers of the service itself: several predictions, problems, and its operational endpoints."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.schemas.predict import Features, Label, Prediction

MAX_ERRORS = 20
Responses = dict[int | str, dict[str, Any]]


class Instances(BaseModel):
    """Several instances, validated as a whole."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instances: Annotated[list[Features], Field(min_length=1, description="At most APP_MAX_BATCH_ITEMS.")]


@dataclass(slots=True)
class Batch:
    """The answers to several instances."""

    model_version: str
    predictions: Annotated[list[Prediction], Field(description="In the order of the instances.")]


def _of_own_type(label: Any) -> Any:
    """Refuse `false` for 0 and 1 for `true`, which are equal in Python."""
    if label in (0, 1) and isinstance(label, bool) != isinstance(next(iter(get_args(Label)), 0), bool):
        raise ValueError("not of the type of a label")
    return label


class Feedback(BaseModel):
    """The truth about an earlier prediction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prediction_id: Annotated[
        str, Field(pattern=r"^[0-9a-f]{32}$", description="As the prediction's answer had it.")
    ]
    label: Annotated[Label, BeforeValidator(_of_own_type), Field(description="The true class, or value.")]


@dataclass(slots=True)
class Accepted:
    """The label counts; given again it counts no more."""

    status: Literal["accepted"] = "accepted"


@dataclass(slots=True)
class FieldError:
    """One violation of the contract, without the value."""

    loc: Annotated[list[str | int], Field(description="Where, with the original column name.")]
    msg: str
    type: str


@dataclass(slots=True)
class Problem:
    """The body of every error, RFC 9457; never holds the input."""

    type: Annotated[str, Field(examples=["urn:problem:invalid_input"])]
    title: str
    status: int
    detail: str
    code: Annotated[str, Field(examples=["invalid_input"])]
    request_id: str
    errors: Annotated[list[FieldError] | list[dict[str, Any]], Field(max_length=MAX_ERRORS)]
    error: Annotated[str, Field(description="`title: detail`, for clients that look for a string here.")]


@dataclass(slots=True)
class Health:
    """The process can answer."""

    status: Literal["ok"] = "ok"


@dataclass(slots=True)
class Ready:
    """A usable model is loaded and warm."""

    model_version: str
    status: Literal["ready"] = "ready"


@dataclass(slots=True)
class ServedModel:
    """The model that answers."""

    version: str
    sha256: Annotated[str, Field(description="Of the file that gives the answers.")]
    files: Annotated[dict[str, str], Field(description="sha256 of every model file; a split model has two.")]
    runtime: str
    training_data_id: Annotated[str | None, Field(description="sha256 of the training data; null for rules.")]
    libraries: dict[str, str]
    execution: Annotated[
        Literal["inline", "batch", "thread"],
        Field(description="How predictions run; chosen at start from what the model costs on this machine."),
    ]


@dataclass(slots=True)
class Version:
    """What is running; `model` is null while it loads."""

    service: str
    version: str
    api_version: Literal["v1"]
    model: ServedModel | None


def refusal(status: int, meaning: str) -> Responses:
    """How OpenAPI documents a status that comes with a problem."""
    return {status: {"model": Problem, "description": meaning}}


def _link(name: str, operation: str, body: Any, description: str) -> Responses:
    """OpenAPI's link: a further call that a client may make with a request or an answer."""
    link = {"operationId": operation, "requestBody": body, "description": description}
    return {200: {"links": {name: link}}}


ANSWERS = (
    refusal(400, "The body is not JSON.")
    | refusal(401, "No API key was sent, or one that is not accepted.")
    | refusal(413, "The body is larger than this service takes.")
    | refusal(415, "The body is not sent as plain JSON.")
    | refusal(422, "The input breaks the contract; `errors` says where.")
    | refusal(429, "The client's quota is used up; see Retry-After.")
    | refusal(500, "The model failed on this input, or the service did.")
    | refusal(503, "Overloaded, out of time, or the model is not ready; see Retry-After.")
)
AS_BATCH = _link(
    "InBatch",
    "predict_batch_v1_predict_batch_post",
    {"instances": ["$request.body"]},
    "The same instance as one of several gets the same answer.",
)
AS_SINGLE = _link(
    "Alone",
    "predict_v1_predict_post",
    "$request.body#/instances/0",
    "An instance of the batch by itself gets the same answer.",
)
