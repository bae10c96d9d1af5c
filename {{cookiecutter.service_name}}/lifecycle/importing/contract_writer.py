"""Writes app/schemas/predict.py: the contract as Python code that people read and edit.

    features, labels, example -> source(...) -> text of the module

People add titles, descriptions, units and bounds; an import keeps them for columns that stay.
"""

import keyword
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

_TYPES = {"float64": "float", "int64": "int", "bool": "bool", "string": "str"}
# Names that the module itself uses.
_TAKEN = {*_TYPES.values(), "dict", "dataclass", "Annotated", "Literal", "BaseModel", "ConfigDict", "Field"}
LINE = 110

HEAD = '''"""The inputs and the answer of a prediction. Yours to edit.

Written by `make import-model`, which keeps this file while the inputs and labels are unchanged. You can add
details of a feature: `Annotated[float, Field(ge=0, description="Height.", json_schema_extra={"unit":
"cm"})]`. The order of `Features` is the order of the model's columns. A change that does not fit the model
is refused at start: every artifact has the signature of its contract. After such a change, run the import
again: it makes a version for the changed contract.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

'''

PREDICTION = '''@dataclass(slots=True)
class Prediction:
    """One answer."""

    prediction_id: Annotated[str, Field(description="Names this prediction in logs and in feedback.")]
    model_version: Annotated[str, Field(description="The artifact that answered.", examples=["v1"])]
ANSWER
    action: Annotated[
        Action,
        Field(
            description="`review`: a person should look, because REASON"
            "a value lies outside the range seen in training."
        ),
    ]
'''
CLASSIFIED = """    label: Annotated[Label, Field(description="The class that the model chooses.")]
    score: Annotated[
        float,
        Field(ge=0, le=1, description="The model's probability of `label`; not calibrated beyond training."),
    ]
    probabilities: Annotated[
        dict[str, float], Field(description="Every class with its probability; they sum to 1.")
    ]"""


@dataclass(frozen=True)
class Feature:
    """One column of the contract."""

    name: str
    dtype: str
    nullable: bool
    categories: list[str] | None = None
    unit: str | None = None
    title: str = ""
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None


def field_names(names: Sequence[str]) -> list[str]:
    """A Python name for each column: the column's own name if a field may have it."""
    found: list[str] = []
    for index, name in enumerate(names, 1):
        own = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_") or f"column_{index}"
        if own[0].isdigit():
            own = f"column_{own}"
        if keyword.iskeyword(own) or own in _TAKEN or hasattr(BaseModel, own) or own.startswith("model_"):
            own += "_"
        free, number = own, 2
        while free in found or (free != name and free in names):
            free, number = f"{own}_{number}", number + 1
        found.append(free)
    return found


def source(
    features: Sequence[Feature], labels: Sequence[Any], examples: Sequence[dict[str, Any]], target: str
) -> str:
    """The text of the module; `labels` is empty for a regressor."""
    names = [feature.name for feature in features]
    fields = [_field(own, one) for own, one in zip(field_names(names), features, strict=True)]
    value = repr(f"The model's estimate of {target}.")
    label = f"Literal[{', '.join(map(repr, labels))}]" if labels else "float"
    parts = [
        HEAD,
        f"Label = {label}\n",
        'Action = Literal["accept", "review"]\n\n\n',
        "class Features(BaseModel):\n",
        f'    """The {f"{len(names)} columns" if len(names) > 1 else "column"} that the model takes."""\n\n',
        '    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, '
        f'json_schema_extra={{"examples": {[*examples]!r}}})\n\n',
        *fields,
        "\n\n",
        PREDICTION.replace("REASON", "the score is below the review threshold or " if labels else "").replace(
            "ANSWER", CLASSIFIED if labels else f"    value: Annotated[float, Field(description={value})]"
        ),
    ]  # fmt: skip
    return formatted("".join(parts))


def _field(own: str, feature: Feature) -> str:
    kind = _TYPES[feature.dtype]
    if feature.categories:
        kind = f"Literal[{', '.join(map(repr, feature.categories))}]"
    if feature.nullable:
        kind += " | None"
    words = [f"alias={feature.name!r}"] if own != feature.name else []
    for name, bound in (("ge", feature.minimum), ("le", feature.maximum)):
        if bound is not None:
            words.append(f"{name}={bound:.17g}" if bound == int(bound) else f"{name}={bound!r}")
    words += [
        f"{name}={text!r}"
        for name, text in (("title", feature.title), ("description", feature.description))
        if text
    ]
    if feature.unit:
        words.append(f'json_schema_extra={{"unit": {feature.unit!r}}}')
    return f"    {own}: Annotated[{kind}, Field({', '.join(words)})]\n" if words else f"    {own}: {kind}\n"


def formatted(text: str) -> str:
    """Python code, formatted as by `make fix`."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", f"--line-length={LINE}"]
    done = subprocess.run(  # noqa: S603  # the formatter of this environment
        [*command, "--stdin-filename", "predict.py", "-"],
        input=text.encode(),
        capture_output=True,
        check=True,
    )
    return done.stdout.decode()
