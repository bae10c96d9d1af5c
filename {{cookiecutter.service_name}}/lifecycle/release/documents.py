"""The two documents of evaluation/: thresholds.toml, and the verdict on a version."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lifecycle.errors import LifecycleError

THRESHOLDS = "thresholds.toml"

OfLabels = Literal["accuracy", "auc", "calibration"]
OfValues = Literal["r2", "rmse", "mae"]
Unit = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]
Rounded = Annotated[float, AfterValidator(lambda value: round(value, 6))]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Strict):
    """The labelled rows: a file in evaluation/ and its target column, by default the manifest's."""

    file: str = "holdout.csv"
    target: str | None = None
    minimum_rows: Count = 1
    training_rows: Literal["refuse", "accept"] = "refuse"


class Slice(_Strict):
    """Parts of the rows by one column, and what all parts must reach, or each part by its name."""

    column: str
    edges: list[float] | None = None
    minimum_rows: Count = 1
    accuracy: Unit | dict[str, Unit] | None = None
    rmse: Size | dict[str, Size] | None = None
    mae: Size | dict[str, Size] | None = None


class Thresholds(_Strict):
    """The conditions of a release, by metric; `against_served` is the loss that is allowed."""

    data: Source = Source()
    classification: dict[OfLabels, Unit] = {}
    regression: dict[OfValues, float] = {}
    against_served: dict[OfLabels | OfValues, Size] = {}
    slices: list[Slice] = []


class Rows(_Strict):
    """The rows of an evaluation; `file` is relative to the service's folder, or only a name."""

    file: str
    sha256: str
    rows: int
    target: str


class Verdict(_Strict):
    """`evaluation/<version>.json`: the result, and the bytes for which it is valid; no time, no machine."""

    version: str
    passed: bool
    failed: list[str]
    manifest_sha256: str
    thresholds_sha256: str
    data: Rows
    metrics: dict[str, Rounded]
    served: str | None
    served_metrics: dict[str, Rounded]


def read_thresholds(path: Path) -> Thresholds:
    """The thresholds in a file; raises LifecycleError."""
    try:
        return Thresholds.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part != "[key]")
        reason = f"{where}: {first['msg']}"
    except ValueError as error:  # no TOML, or not UTF-8
        reason = " ".join(str(error).split())[:160]
    raise LifecycleError(f"{path}: {reason}")
