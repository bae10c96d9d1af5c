"""The inputs and the answer of a prediction. Yours to edit.

The order of `Features` is the order of the model's columns. A change that does not fit the model is
refused at start: every artifact has the signature of the contract that it was made for.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Literal["setosa", "versicolor", "virginica"]
Action = Literal["accept", "review"]


class Features(BaseModel):
    """One flower: four lengths in centimetres."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={
            "examples": [
                {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2},
                {"sepal_length": 6.3, "sepal_width": 3.3, "petal_length": 6.0, "petal_width": 2.5},
            ]
        },
    )

    sepal_length: Annotated[
        float, Field(ge=0, le=100, description="Length of the sepal.", json_schema_extra={"unit": "cm"})
    ]
    sepal_width: Annotated[
        float, Field(ge=0, le=100, description="Width of the sepal.", json_schema_extra={"unit": "cm"})
    ]
    petal_length: Annotated[
        float, Field(ge=0, le=100, description="Length of the petal.", json_schema_extra={"unit": "cm"})
    ]
    petal_width: Annotated[
        float, Field(ge=0, le=100, description="Width of the petal.", json_schema_extra={"unit": "cm"})
    ]


@dataclass(slots=True)
class Prediction:
    """One answer."""

    prediction_id: Annotated[str, Field(description="Names this prediction in logs and in feedback.")]
    model_version: Annotated[str, Field(description="The artifact that answered.", examples=["v1"])]
    label: Annotated[Label, Field(description="The most probable class.")]
    score: Annotated[
        float,
        Field(ge=0, le=1, description="The model's probability of `label`; not calibrated beyond training."),
    ]
    probabilities: Annotated[
        dict[str, float], Field(description="Every class with its probability; they sum to 1.")
    ]
    action: Annotated[
        Action,
        Field(
            description="`review`: a person should look, because the score is below the review threshold "
            "or a value lies outside the range seen in training."
        ),
    ]
