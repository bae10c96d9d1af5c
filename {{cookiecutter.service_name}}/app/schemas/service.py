"""What the operational endpoints answer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from app.schemas.predict import Prediction


@dataclass(slots=True)
class Batch:
    """The answers to several instances."""

    model_version: str
    predictions: Annotated[list[Prediction], Field(description="In the order of the instances.")]


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
    sha256: str
    runtime: str
    training_data_id: Annotated[str | None, Field(description="sha256 of the training data; null for rules.")]
    libraries: dict[str, str]
    execution: Annotated[
        Literal["inline", "batch", "thread"],
        Field(description="How predictions run; chosen at start from what the model costs on this machine."),
    ]


@dataclass(slots=True)
class Version:
    """What is running."""

    service: str
    version: Annotated[str, Field(description="Version of the service's code.")]
    api_version: Literal["v1"]
    model: Annotated[ServedModel | None, Field(description="null while it loads.")]
