"""From the Python types in predict.py to the signature that every artifact carries.

    Features, Prediction -> inputs, outputs -> canonical JSON -> sha256

Descriptions and examples may change freely; names, order, types, bounds, categories, units and labels may
not: a model trained for other inputs must never be served under this contract.
"""

import hashlib
import json
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le
from pydantic import BaseModel

from app.schemas.predict import Features, Prediction

_DTYPES: dict[Any, str] = {float: "float64", int: "int64", str: "string", bool: "bool"}
# Fields that clients send for look-ups in own code; they are not inputs of the model.
KEYS = {name for name, field in Features.model_fields.items() if field.exclude}
_BINDING = ("name", "dtype", "unit", "nullable", "minimum", "maximum", "categories")


def contract_inputs(features: type[BaseModel] = Features) -> list[dict[str, Any]]:
    """The inputs in the model's order: name, dtype, unit, nullable, minimum, maximum, categories."""
    fields = features.model_fields.items()
    return [_describe(field.alias or name, field) for name, field in fields if not field.exclude]


def contract_outputs(prediction: type = Prediction) -> dict[str, Any]:
    """Task and labels, the labels in the order of the model's probabilities; a regressor has none."""
    hints = get_type_hints(prediction)
    if "value" in hints:
        return {"task": "regression", "labels": []}
    return {"task": "classification", "labels": list(get_args(hints["label"]))}


def label_key(label: Any) -> str:
    """A label as a key in JSON and in metrics: text unchanged, other types as JSON."""
    return label if isinstance(label, str) else json.dumps(label)


def contract_sha256(inputs: list[dict[str, Any]], outputs: dict[str, Any]) -> str:
    """Signature (sha256, hex) of a contract, without descriptions and examples."""
    canonical: dict[str, Any] = {"inputs": [{key: entry.get(key) for key in _BINDING} for entry in inputs]}
    canonical["outputs"] = {key: outputs[key] for key in ("task", "labels")}
    return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()


def served_contract_sha256() -> str:
    """Signature of the contract this code serves."""
    return contract_sha256(contract_inputs(), contract_outputs())


def _describe(name: str, field: Any) -> dict[str, Any]:
    kind, nullable = field.annotation, False
    if get_origin(kind) in (Union, UnionType):
        nullable = NoneType in get_args(kind)
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
    categories = list(get_args(kind)) if get_origin(kind) is Literal else None
    bounds: dict[type, Any] = {type(one): one for one in field.metadata}
    minimum = float(bounds[Ge].ge) if Ge in bounds else None
    maximum = float(bounds[Le].le) if Le in bounds else None
    unit = (field.json_schema_extra or {}).get("unit")
    dtype = _DTYPES[type(categories[0]) if categories else kind]
    return dict(zip(_BINDING, (name, dtype, unit, nullable, minimum, maximum, categories), strict=True))
