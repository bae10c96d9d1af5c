"""The manifest of a model version: its inputs and outputs, its origin, the hashes of its files.

artifacts/<version>/manifest.json -> Manifest
"""

import operator
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION_PATTERN = r"^v[0-9]{1,9}$"
_EXACT = re.compile(r"[0-9]+(\.[0-9]+)+[0-9A-Za-z.+-]*")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file of the version folder."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, description="bytes")]


class Input(_Strict):
    """One feature, in the model's order."""

    name: str
    dtype: Literal["float64", "int64", "string", "bool"]
    unit: str | None = None
    description: str = ""
    nullable: bool = False
    minimum: float | None = None
    maximum: float | None = None
    training_range: tuple[float, float] | None = None
    categories: list[bool | int | str] | None = None
    example: Any = None


class Outputs(_Strict):
    """Answers of the model."""

    labels: list[bool | int | str] = []
    score: str = ""  # its meaning, in a sentence
    value: Annotated[str, Field(exclude_if=operator.not_)] = ""  # a regressor's: meaning, unit
    review_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    # How far a regressor's value may be from the truth that feedback gives, to count as correct.
    feedback_tolerance: Annotated[float, Field(ge=0, exclude_if=operator.not_)] = 0.0


class Training(_Strict):
    """Where the model came from. `time` is the time of the data, so that a re-run gives the same bytes."""

    data_sha256: Sha256
    rows: int
    date_range: tuple[str, str] | None = None
    query: str | None = None
    target: str
    code_revision: str
    time: str | None = None


class Manifest(_Strict):
    """`manifest.json`."""

    name: str
    version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    task: Literal["classification", "regression"]
    runtime: Literal["onnx", "skops", "rules"]
    files: dict[str, FileEntry]
    inputs: list[Input]
    outputs: Outputs
    training: Training | None
    libraries: dict[str, str]
    # Types that a skops model may be made of; serving loads no other.
    trusted_types: Annotated[list[str], Field(exclude_if=lambda types: not types)] = []
    contract_sha256: Sha256

    @property
    def unpinned(self) -> str:
        """The part that is missing to trace or rebuild the model; a rules model is its own source."""
        if self.runtime == "rules":
            return ""
        if self.training is None:
            return "`training`"
        exact = bool(self.libraries) and all(_EXACT.fullmatch(one) for one in self.libraries.values())
        return "" if exact else "`libraries`, each of one exact version"
