"""The documents that the import's processes exchange: one JSON file each, in the folder of the import.

import_model -> Conversion -> convert  -> Converted, answers.npy, model.*
import_model -> Assembly   -> assemble -> repository/
either step  -> Refusal, if it found a reason to stop
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from app.core.store import Input, Training

ANSWERS, SAMPLE = "answers.npy", "sample.arrow"  # the original's answers to the rows of the sample
Label = bool | int | str
Runtime = Literal["onnx", "skops"]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def path(cls, folder: Path) -> Path:
        """Where the document lies in the folder of the import."""
        return folder / f"{cls.__name__.lower()}.json"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The document that another process has written."""
        return cls.model_validate_json(cls.path(folder).read_bytes())

    def write(self, folder: Path) -> None:
        """Hand it to the next process."""
        self.path(folder).write_text(self.model_dump_json(), "utf-8")


class Conversion(_Document):
    """The model to open and convert, and the columns that it may take."""

    model: Path
    target: str
    runtime: Runtime
    trust: list[str]
    trust_listed: bool
    inputs: list[Input]
    unusable: dict[str, str]  # by column: why no model can take it


class Converted(_Document):
    """The model that was opened, and how its converted form was proven."""

    task: Literal["classification", "regression"]
    labels: list[Label]
    names: list[str]  # the model's columns, in order
    described: str
    runtime: Runtime
    form: str
    tolerance: float
    gap: float  # the largest difference from the original's answers
    trusted_types: list[str]
    libraries: dict[str, str]

    @property
    def file(self) -> str:
        """Name of the converted model."""
        return f"model.{self.runtime}"


class Assembly(_Document):
    """The version to make of the converted model."""

    version: str
    name: str
    target: str
    new_contract: bool
    rewritten: bool  # whether the import wrote the contract
    training: Training
    ranges: dict[str, tuple[float, float]]
    review_threshold: float
    feedback_tolerance: float
    holdout: str | None  # path in the repository
    words: dict[str, dict[str, Any]]  # by input, where an earlier making of the version said others


class Refusal(_Document):
    """Why a step stopped: one line."""

    reason: str
