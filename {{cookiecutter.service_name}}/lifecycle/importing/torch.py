"""torch: an original torch module, if torch is installed.

    torch.save(module), torch.export.save -> answers to the data's rows
    all answers -> values, probabilities, or logits, which need a softmax or sigmoid
    -> ONNX by torch's own exporter, plus the softmax or sigmoid

The columns are those of the data without the target, in order; a missing value is NaN.
"""

import importlib
import logging
import warnings
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.core.store import Input
from lifecycle.command import LifecycleError
from lifecycle.importing.original import (
    OPSET,
    WITH_ONNX,
    Answers,
    Candidate,
    Original,
    as_labels,
    as_served,
    parts,
    unpickle,
)
from lifecycle.importing.steps import say

EXAMPLE_ROWS = 4  # the exporter takes a single row for a constant
SUM_TOLERANCE = 1e-4

Reading = Literal["value", "probabilities", "probability", "logits", "logit"]
WORDS = {
    "probabilities": "probabilities",
    "probability": "the probability",
    "logits": "logits, so a softmax is added at its end",
    "logit": "a logit, so a sigmoid is added at its end",
}


def open_torch(
    path: Path, inputs: dict[str, Input], unusable: dict[str, str], table: Any, target: str
) -> Original:
    """The module in a file of torch.save or torch.export; raises LifecycleError."""
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError:
        raise LifecycleError(
            f"{path.name}: is for torch, which is not installed here: install torch and onnxscript into "
            ".venv, or export the module to ONNX where torch is and import that file"
        ) from None
    logging.disable(logging.WARNING)  # the exporter warns about packages for other models
    text = {name: "holds text" for name, entry in inputs.items() if entry.dtype == "string"}
    for name, why in (unusable | text).items():
        raise LifecycleError(f"column {name!r} {why}, and a torch module takes all columns as numbers")
    columns = list(inputs.values())
    saved, module = load(torch, path)
    weights = {one.dtype for one in module.state_dict().values()}
    dtype = np.float64 if torch.float64 in weights and torch.float32 not in weights else np.float32

    def outputs(part: Any) -> Answers:
        """The module's answers, [rows, 1 or labels]."""
        rows = as_served(part, columns, dtype)
        found = ask(torch, path, module, rows)
        unknown = np.isnan(rows).any(axis=1)
        if unknown.any() and not np.isfinite(found[unknown]).all():
            name = columns[int(np.isnan(rows).any(axis=0).argmax())].name
            raise LifecycleError(
                f"column {name!r} has missing values, and {path.name} answers such rows with no number: "
                "fill them in the data, as in training, or in the module (torch.nan_to_num)"
            )
        return found

    raw = np.concatenate([outputs(part) for part in parts(table)])
    labels, reading = read_as(path, raw, table.column(target), target)
    if labels:
        tell(path, reading, labels, finished(raw, reading), table.column(target).to_pylist())
    example = torch.from_numpy(as_served(table.slice(0, EXAMPLE_ROWS), columns, dtype))
    form = Candidate(
        "ONNX torch.onnx makes it", "onnx", lambda: {"model.onnx": to_onnx(torch, saved, example, reading)},
        WITH_ONNX | {"torch"},
    )  # fmt: skip
    return Original(
        "classification" if labels else "regression",
        labels,
        list(inputs),
        type(module).__name__ if saved is module else "torch.export program",
        lambda part: finished(outputs(part), reading),
        {"torch"},
        forms=[form],
    )


def load(torch: Any, path: Path) -> tuple[Any, Any]:
    """The content of the file, and its callable module; raises LifecycleError."""
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.endswith("models/model.json") for name in names):
        program = unpickle(path, torch.export.load)
        return program, program.module()
    if any(name.endswith("/constants.pkl") for name in names):
        raise LifecycleError(
            f"{path.name}: holds TorchScript; save the module itself with torch.save(module, ...)"
        )
    module = unpickle(path, partial(torch.load, map_location="cpu", weights_only=False))
    if isinstance(module, dict):
        raise LifecycleError(
            f"{path.name}: holds weights, and not the module that they are for: load them into it and "
            "save that, with torch.save(module, ...)"
        )
    if not isinstance(module, torch.nn.Module):
        raise LifecycleError(f"{path.name}: holds a {type(module).__name__}, not a torch module")
    return module.eval(), module


def ask(torch: Any, path: Path, module: Any, rows: Any) -> Answers:
    """The module's answers to a matrix; raises LifecycleError."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = module(torch.from_numpy(rows))
    except Exception as error:  # a module may raise anything
        words = " ".join(str(error).split())[:160]
        raise LifecycleError(
            f"{path.name}: cannot be asked with {len(rows):,} rows of the data's {rows.shape[1]} columns "
            f"beside the target: {type(error).__name__}: {words} [a torch.export program needs "
            "dynamic_shapes for the rows]"
        ) from None
    if not isinstance(found, torch.Tensor) or found.ndim not in (1, 2) or len(found) != len(rows):
        given = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise LifecycleError(
            f"{path.name}: answers {len(rows):,} rows with {given}; one tensor [rows, labels], [rows, 1] or "
            "[rows] can be served"
        )
    answers: Answers = found.double().numpy().reshape(len(rows), -1)
    return answers


# --- the meaning of the answers -----------------------------------------------------------------------------


def read_as(path: Path, raw: Answers, truth: Any, target: str) -> tuple[list[Any], Reading]:
    """The labels in the order of their columns, and the meaning of the numbers; raises LifecycleError."""
    values = sorted(truth.drop_null().unique().to_pylist())
    width, within = raw.shape[1], bool(((raw >= 0) & (raw <= 1)).all())
    if width == 1 and (len(values) != 2 or (set(values) - {0, 1} and isinstance(values[0], float))):
        if isinstance(values[0], str | bool):
            raise LifecycleError(
                f"{path.name}: answers with one number, and {target!r} has {len(values)} labels"
            )
        return [], "value"
    if len(values) != max(width, 2):
        raise LifecycleError(
            f"{path.name}: answers with {width} numbers, and {target!r} has {len(values)} labels"
        )
    labels = as_labels(path, values)
    if width == 1:
        return labels, "probability" if within else "logit"
    if within and np.abs(raw.sum(axis=1) - 1).max() <= SUM_TOLERANCE:
        return labels, "probabilities"
    if within:
        raise LifecycleError(
            f"{path.name}: all its answers are within 0 and 1 and do not add up to 1, so they are neither "
            "probabilities of one label nor logits; end the module with a softmax, or with nothing"
        )
    return labels, "logits"


def finished(raw: Answers, reading: Reading) -> Answers:
    """Probabilities [rows, labels], or values [rows, 1]."""
    if reading == "logits":
        powers = np.exp(raw - raw.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
    if reading == "logit":
        raw = np.exp(-np.logaddexp(0, -raw))
    return np.hstack([1 - raw, raw]) if reading in ("logit", "probability") else raw


def tell(path: Path, reading: Reading, labels: list[Any], scores: Answers, truth: Sequence[Any]) -> None:
    """Report how the answers are interpreted, and how often they are then right."""
    right = np.mean([labels[at] == value for at, value in zip(scores.argmax(axis=1), truth, strict=True)])
    listed = ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")
    say(
        f"{path.name} answers with {WORDS[reading]}; for {listed}, in this order, it is right in "
        f"{right:.1%} of the rows"
    )


def to_onnx(torch: Any, saved: Any, example: Any, reading: Reading) -> bytes:
    """The module with the missing softmax or sigmoid; the same bytes each time, on any machine."""
    from onnx import TensorProto, helper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(
            saved, (example,), input_names=["features"], output_names=["answers"], opset_version=OPSET[""],
            dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},), verbose=False,
        ).model_proto  # fmt: skip
    forget(model)
    graph = model.graph
    if reading in ("value", "probabilities"):
        return bytes(model.SerializeToString())
    (output,) = graph.output
    kind = output.type.tensor_type.elem_type
    if reading == "logits":
        graph.node.append(helper.make_node("Softmax", [output.name], ["probabilities"], axis=1))
    else:
        graph.initializer.append(helper.make_tensor("probabilities/shape", TensorProto.INT64, [2], [-1, 1]))
        graph.initializer.append(helper.make_tensor("probabilities/sum", kind, [], [1]))
        for operator, taken, given in (
            ("Reshape", [output.name, "probabilities/shape"], "probabilities/column"),
            ("Sigmoid" if reading == "logit" else "Identity", ["probabilities/column"], "probabilities/1"),
            ("Sub", ["probabilities/sum", "probabilities/1"], "probabilities/0"),
        ):
            graph.node.append(helper.make_node(operator, taken, [given]))
        both = ["probabilities/0", "probabilities/1"]
        graph.node.append(helper.make_node("Concat", both, ["probabilities"], axis=1))
    output.CopyFrom(helper.make_tensor_value_info("probabilities", kind, ["rows", None]))
    return bytes(model.SerializeToString())


def forget(part: Any) -> None:
    """Remove the exporter's notes: lines of source code with paths."""
    for name in ("metadata_props", "doc_string"):
        if name in part.DESCRIPTOR.fields_by_name:
            part.ClearField(name)
    for field, value in part.ListFields():
        if field.message_type:
            for inner in value if field.is_repeated else [value]:
                forget(inner)
