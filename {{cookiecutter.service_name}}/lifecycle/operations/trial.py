"""Models that misbehave on purpose under whatever contract is served: for the game day and for tests.

    manifest -> a graph that answers by one of the features -> slow, failing or hanging -> a version folder

They are no copies of the served model, which may be of a kind that cannot be taken apart. Their golden set
has the rows of the served one with their own answers, so that they can be released like any other version.
"""

import json
import math
import shutil
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from app.core.manifest import Input, Manifest
from app.core.runtimes import load_runtime
from app.core.store import MANIFEST, read_artifact
from lifecycle.package import canonical_json

MODEL, GOLDEN, BASELINE = "model.onnx", "golden.jsonl", "baseline.json"
SURE, SPREAD = 0.9, 0.05  # the first label's probability where the feature is least, and how much it grows
FLOAT, INT64, BOOL, STRING = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING
)  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a model; by default nothing."""

    sines: int = 0  # for each row, `width` at a time
    width: int = 4096
    fails_above: float = math.inf  # where the feature is beyond this, the answer is no number
    loops: int = 0  # for each call
    hangs_at: float = math.inf  # where the feature is as large as this, the call never ends


SOUND = Trouble()


def number_of(inputs: list[Input]) -> Input | None:
    """The feature that a trial model looks at: a number with a range to it, one without nulls if there is."""
    ranged = [one for one in inputs if one.training_range and one.training_range[0] < one.training_range[1]]
    numbers = [one for kind in ("float64", "int64") for one in ranged if one.dtype == kind]
    return min(numbers, key=lambda one: one.nullable, default=None)


def trial_model(manifest: Manifest, trouble: Trouble) -> bytes:
    """An ONNX file that takes what the contract gives: a matrix, or where there is text a tensor a column."""
    node, value, array = (
        onnx.helper.make_node,
        onnx.helper.make_tensor_value_info,
        onnx.numpy_helper.from_array,
    )
    inputs, feature = manifest.inputs, number_of(manifest.inputs)
    constants: dict[str, Any] = {}
    if any(one.dtype == "string" for one in inputs):
        taken = [
            value(f"column{at}", STRING if one.dtype == "string" else FLOAT, [None, 1])
            for at, one in enumerate(inputs)
        ]
        source = taken[inputs.index(feature)].name if feature else "none"
        nodes = [node("Identity", [source], ["given"])]
    else:
        taken = [value("features", FLOAT, [None, len(inputs)])]
        constants["which"] = np.array([inputs.index(feature) if feature else 0], np.int64)
        nodes = [node("Gather", ["features", "which"], ["given"], axis=1)]
    low, high = (feature and feature.training_range) or (0.0, 1.0)
    if feature:
        constants["low"] = np.array([low], np.float32)
        nodes += [node("IsNaN", ["given"], ["null"]), node("Where", ["null", "low", "given"], ["x"])]
    else:
        nodes = [node("Shape", [taken[0].name], ["shape"]), node("ConstantOfShape", ["shape"], ["zeros"])]
        nodes.append(node("ReduceMax", ["zeros"], ["x"], axes=[1], keepdims=1))
        constants.clear()
    if trouble.loops or trouble.hangs_at < math.inf:
        nodes += _loop(trouble, constants)
    else:
        nodes.append(node("Identity", ["x"], ["looped"]))
    width = max(len(manifest.outputs.labels), 1)
    nodes += _answer(low, high, width, constants) if manifest.outputs.labels else [
        node("Identity", ["looped"], ["right"])
    ]  # fmt: skip
    last = "right"
    if trouble.sines:
        names = [f"sine{step}" for step in range(trouble.sines + 1)]
        constants["widen"] = np.zeros((width, trouble.width), np.float32)
        constants["narrow"] = np.zeros((trouble.width, width), np.float32)
        nodes.append(node("MatMul", [last, "widen"], [names[0]]))
        nodes += [node("Sin", [one], [other]) for one, other in pairwise(names)]
        nodes += [node("MatMul", [names[-1], "narrow"], ["zero"]), node("Add", [last, "zero"], ["late"])]
        last = "late"
    if trouble.fails_above < math.inf:
        constants["limit"] = np.array([trouble.fails_above], np.float32)
        constants["no_number"] = np.array([math.nan], np.float32)
        nodes += [node("Greater", ["x", "limit"], ["beyond"])]
        nodes += [node("Where", ["beyond", "no_number", last], ["failed"])]
        last = "failed"
    nodes.append(node("Identity", [last], ["answer"]))
    answer = value("answer", FLOAT, [None, width])
    tensors = [array(np.asarray(one), name) for name, one in constants.items()]
    graph = onnx.helper.make_graph(nodes, "trial", taken, [answer], tensors)
    opset = [onnx.helper.make_opsetid("", 17)]
    return bytes(onnx.helper.make_model(graph, ir_version=8, opset_imports=opset).SerializeToString())


def _answer(low: float, high: float, width: int, constants: dict[str, Any]) -> list[onnx.NodeProto]:
    """The first label is likely, and the more so the larger the feature; the others share what is left."""
    node, share = onnx.helper.make_node, 1 / max(width - 1, 1)
    constants["scale"] = np.array([1 / (high - low)], np.float32)
    constants["spread"] = np.array([[SPREAD] + [-SPREAD * share] * (width - 1)], np.float32)
    constants["base"] = np.array([[SURE] + [(1 - SURE) * share] * (width - 1)], np.float32)
    return [
        node("Sub", ["looped", "low"] if "low" in constants else ["looped", "looped"], ["above"]),
        node("Mul", ["above", "scale"], ["scaled"]),
        node("Tanh", ["scaled"], ["bounded"]),
        node("MatMul", ["bounded", "spread"], ["more"]),
        node("Add", ["more", "base"], ["right"]),
    ]


def _loop(trouble: Trouble, constants: dict[str, Any]) -> list[onnx.NodeProto]:
    """Turns that do nothing: so many, or without an end where the feature says so."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [node("Less", ["turn", "last"], ["again"]), node("Identity", ["nothing"], ["still_nothing"])],
        "turn",
        [value("turn", INT64, []), value("go", BOOL, []), value("nothing", FLOAT, [])],
        [value("again", BOOL, []), value("still_nothing", FLOAT, [])],
    )
    constants |= {
        "turns": np.int64(trouble.loops or 1), "endless": np.int64(2**62), "yes": np.bool_(True),
        "forever": np.float32(trouble.hangs_at), "nothing_yet": np.float32(0),
    }  # fmt: skip
    return [
        node("ReduceMax", ["x"], ["largest"], keepdims=0),
        node("Less", ["largest", "forever"], ["ends"]),
        node("Where", ["ends", "turns", "endless"], ["last"]),
        node("Loop", ["", "yes", "nothing_yet"], ["result"], body=body),
        node("Add", ["x", "result"], ["looped"]),
    ]


def make_trial(folder: Path, trouble: Trouble = SOUND, *, golden: bool = True) -> None:
    """Make the version in `folder` one of a trial model: golden answers of its own, if any, no baseline."""
    document = json.loads((folder / MANIFEST).read_bytes())
    for name in [name for name in document["files"] if name.startswith("model.")] + [BASELINE]:
        document["files"].pop(name, None)
        (folder / name).unlink(missing_ok=True)
    document |= {"runtime": "onnx"}
    document.pop("trusted_types", None)
    manifest = Manifest.model_validate(document)
    _write(folder, document, MODEL, trial_model(manifest, SOUND))
    rows = [json.loads(line) for line in (folder / GOLDEN).read_bytes().splitlines()]
    runtime = load_runtime(read_artifact(folder.parent, folder.name))
    values = [[row["features"][one.name] for one in manifest.inputs] for row in rows]
    labels = list(manifest.outputs.labels)
    for row, answer in zip(rows, runtime.infer(np.array(values, runtime.dtype)), strict=True):
        if labels:
            row["label"] = labels[int(np.argmax(answer))]
            row["probabilities"] = dict(zip(row["probabilities"], answer, strict=True))
        else:
            row["value"] = answer[0]
            row["tolerance"] = max(row["tolerance"], 1e-5 * abs(answer[0]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(folder, document, GOLDEN, lines.encode())
    if not golden:
        document["files"].pop(GOLDEN)
        (folder / GOLDEN).unlink()
    _write(folder, document, MODEL, trial_model(manifest, trouble))


def add_trial(root: Path, source: str, version: str, trouble: Trouble, *, golden: bool = True) -> None:
    """A new version folder beside `source`, of its contract, with a trial model."""
    folder = Path(shutil.copytree(root / source, root / version))
    document = json.loads((folder / MANIFEST).read_bytes()) | {"version": version}
    (folder / MANIFEST).write_bytes(canonical_json(document))
    make_trial(folder, trouble, golden=golden)


def _write(folder: Path, manifest: dict[str, Any], name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    (folder / MANIFEST).write_bytes(canonical_json(manifest))
