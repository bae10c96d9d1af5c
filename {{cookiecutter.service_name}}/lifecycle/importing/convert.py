"""Opens a model file, in a process of its own: unpickling runs whatever code the file holds.

    request.json -> model -> ONNX, one form after the other, or skops -> the same answers on every row?
    -> model.onnx or model.skops, answers.npy (of the original), result.json: or why not, in a line

`python -m lifecycle.importing.convert FOLDER`, started by `make import-model`. Nothing comes back but these files.
"""

import copy
import io
import json
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from app.core.manifest import Input
from app.core.runtimes import OnnxRuntime, SkopsRuntime, skops_types
from lifecycle.importing.original import (
    OPSET,
    SCORE_TOLERANCE,
    Answers,
    Form,
    Original,
    as_served,
    open_model,
    open_onnx,
    original_answers,
    parts,
    tell,
)
from lifecycle.tables import Refusal, read_sample
from lifecycle.importing.torch_module import SUFFIXES, open_torch

REQUEST, RESULT, ANSWERS, SAMPLE = "request.json", "result.json", "answers.npy", "sample.arrow"
ROWS_ALONE = 20  # asked one at a time, because an answer may not depend on the rows beside it
VALUE_TOLERANCE = 1e-4  # of the standard deviation of the values
# Types that estimators of these libraries are made of; anything else is for the person to trust.
KNOWN = ("sklearn.", "numpy.", "scipy.", "xgboost.", "lightgbm.", "pandas.")
KNOWN_BUILTINS = {
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "slice", "str",
                                      "tuple", "type", "complex", "frozenset", "range", "bytearray")),
    "collections.OrderedDict", "collections.defaultdict", "functools.partial",
}  # fmt: skip


def main(folder: Path) -> None:
    """Do what request.json says; whatever is wrong with the model ends as a line in result.json."""
    sys.stdout = sys.stderr  # whatever the model's own code prints
    request = json.loads((folder / REQUEST).read_bytes())
    try:
        result = convert(folder, request)
    except Refusal as refusal:
        result = {"refused": str(refusal)}
    except MemoryError:
        result = {"refused": "there is not enough memory for this model"}
    (folder / RESULT).write_text(json.dumps(result), "utf-8")


def convert(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Open, convert, prove; raises Refusal."""
    table = read_sample(folder / SAMPLE)
    inputs = {entry["name"]: Input(**entry) for entry in request["inputs"]}
    path = Path(request["model"])
    if path.suffix == ".onnx":
        original = open_onnx(path, inputs, table, request["target"])
    elif path.suffix in SUFFIXES:
        original = open_torch(path, inputs, request["unusable"], table, request["target"])
    else:
        original = open_model(path, inputs, request["unusable"])
    chosen = [inputs[name] for name in original.names]
    rows = table.select(original.names)
    answers = original_answers(original, rows, chosen)
    np.save(folder / ANSWERS, answers)
    tolerance = SCORE_TOLERANCE
    if original.task == "regression":
        tolerance = VALUE_TOLERANCE * float(answers.std()) or 1e-6 * max(1.0, float(np.abs(answers).max()))
    proof = Proof(rows, chosen, answers, tolerance, bool(original.labels))
    tries: list[str] = []
    found = None
    if original.forms:
        found = proven(proof, original.forms, tries)
    elif request["runtime"] != "skops":
        found = proven(proof, onnx_forms(original, chosen), tries)
    result: dict[str, Any] = {
        "task": original.task, "labels": original.labels, "names": original.names,
        "described": original.described, "tolerance": tolerance, "tried": tries, "trusted_types": [],
        "runtime": "onnx",
    }  # fmt: skip
    libraries = {"numpy", "onnx", "onnxruntime", *original.libraries}
    if found:
        content, result["form"], result["gap"] = found
        if not original.forms:
            libraries |= {"skl2onnx"}
    elif original.forms:
        raise Refusal(f"the model cannot be served as ONNX: {'; '.join(tries)}")
    else:
        content = skops_content(original)
        types = sorted(skops_types(content))
        strange = [one for one in types if not known(one)]
        untrusted = (
            [one for one in strange if one not in request["trust"]] if not request["trust_all"] else []
        )
        if request["runtime"] != "skops":
            raise Refusal(_offer(tries, strange))
        if untrusted:
            raise Refusal(
                f"skops: the model is made of types that are not trusted: {', '.join(untrusted)}. "
                f"If you know them: --trust {','.join(untrusted)}"
            )
        runtime = SkopsRuntime(_skops(), content, types, chosen, original.labels)
        result |= {"runtime": "skops", "form": "scikit-learn itself", "gap": proof.gap(runtime)}
        result["trusted_types"] = types
        libraries = {"numpy", "scikit-learn", "skops", *original.libraries}
        if any(entry.dtype != "float64" for entry in chosen):
            libraries.add("pandas")
    (folder / f"model.{result['runtime']}").write_bytes(content)
    result["libraries"] = {name: metadata.version(name) for name in sorted(libraries)}
    return result


def _skops() -> Any:
    import skops.io

    return skops.io


def _offer(tries: list[str], strange: list[str]) -> str:
    trust = f" --trust {','.join(strange)}" if strange else ""
    return (
        f"no ONNX form of this model answers as it does ({'; '.join(dict.fromkeys(tries))}). It can be "
        f"served by scikit-learn itself, some hundred times slower: repeat with --runtime skops{trust}"
    )


def known(name: str) -> bool:
    """Whether a type may be loaded because it belongs to a library that models are made with."""
    return name.startswith(KNOWN) or name in KNOWN_BUILTINS


@dataclass
class Proof:
    """The rows and the answers that a converted model has to give."""

    table: Any
    entries: list[Input]
    answers: Answers
    tolerance: float
    labelled: bool

    def gap(self, runtime: Any) -> float:
        """How far its answers are from the original's at most; raises Refusal beyond the tolerance."""
        worst, row, began = 0.0, 0, time.monotonic()
        alone = [self.table.slice(at, 1) for at in range(min(ROWS_ALONE, self.table.num_rows))]
        for part in chain(alone, parts(self.table.slice(len(alone)))):
            given = np.asarray(runtime.infer(as_served(part, self.entries, runtime.dtype)), np.float64)
            wanted = self.answers[row : row + len(given)]
            if given.shape != wanted.shape:
                raise Refusal(
                    f"answers {given.shape[1]} numbers a row where the original gives {wanted.shape[1]}"
                )
            gaps = np.nan_to_num(np.abs(given - wanted).max(axis=1), nan=np.inf)
            if gaps.max() > self.tolerance:
                at = int(np.argmax(gaps > self.tolerance))
                raise Refusal(
                    f"row {row + at + 1} is {gaps[at]:.2g} away from the original, allowed is "
                    f"{self.tolerance:.2g}"
                )
            worst, row = max(worst, float(gaps.max())), row + len(given)
            began = tell(began, f"the converted model agrees on {row:,} of {self.table.num_rows:,} rows")
        return worst


def proven(proof: Proof, forms: Sequence[Form], tries: list[str]) -> tuple[bytes, str, float] | None:
    """The first form that answers as the original does: bytes, name, gap. `tries` tells what failed."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    for name, make in forms:
        try:
            content = make()
            return content, name, proof.gap(OnnxRuntime(onnxruntime, content, len(proof.entries)))
        except Refusal as refusal:
            tries.append(f"{name}: {refusal}")
        except Exception as error:  # whatever a converter or the runtime finds wrong with the model
            words = " ".join(str(error).split())
            tries.append(f"{name}: {type(error).__name__}: {words[:120]}{'...' if len(words) > 120 else ''}")
    return None


def onnx_forms(original: Original, entries: Sequence[Input]) -> list[Form]:
    """The forms to try, the fastest first: one tensor of floats, of doubles, then one for each column."""
    from skl2onnx.common import data_types as types

    register_boosters()
    original = replace(original, estimator=nameless(original.estimator))
    forms: list[Form] = []
    for precise, single in (("float32", types.FloatTensorType), ("float64", types.DoubleTensorType)):
        if all(entry.dtype != "string" for entry in entries):
            declared = [("features", single([None, len(entries)]))]
            forms.append((f"one {precise} tensor", partial(to_onnx, original, declared)))
    for precise, single in (("float32", types.FloatTensorType), ("float64", types.DoubleTensorType)):
        for whole in (False, True):
            kinds = {
                "string": types.StringTensorType,
                "int64": types.Int64TensorType if whole else single,
                "bool": types.BooleanTensorType if whole else single,
                "float64": single,
            }
            declared = [
                (
                    entry.name,
                    (single if entry.nullable and entry.dtype != "string" else kinds[entry.dtype])([None, 1]),
                )
                for entry in entries
            ]
            name = f"a tensor for each column, numbers as {precise}{', integers as int64' if whole else ''}"
            if not whole or any(entry.dtype in ("int64", "bool") and not entry.nullable for entry in entries):
                forms.append((name, partial(to_onnx, original, declared)))
    return forms


def to_onnx(original: Original, declared: list[tuple[str, Any]]) -> bytes:
    """One ONNX form; the same model and form give the same bytes."""
    import skl2onnx

    options: dict[Any, Any] = {}
    if original.task == "classification":
        options = {id(original.estimator): {"zipmap": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = skl2onnx.to_onnx(
            original.estimator,
            initial_types=declared,
            options=options or None,
            name="model",
            target_opset=OPSET,
        )
    model.domain = ""
    return bytes(model.SerializeToString())


def register_boosters() -> None:
    """Teach skl2onnx the estimators of XGBoost and LightGBM, where the model brought them along."""
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes as classes,
    )
    from skl2onnx.common.shape_calculator import (
        calculate_linear_regressor_output_shapes as values,
    )

    options = {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    if lightgbm := sys.modules.get("lightgbm"):
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        update_registered_converter(
            lightgbm.LGBMClassifier, "ImportedLgbmClassifier", classes, convert_lightgbm, options=options
        )
        update_registered_converter(
            lightgbm.LGBMRegressor, "ImportedLgbmRegressor", values, convert_lightgbm, options={"split": None}
        )
    if xgboost := sys.modules.get("xgboost"):
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        update_registered_converter(
            xgboost.XGBClassifier, "ImportedXgbClassifier", classes, convert_xgboost, options=options
        )
        update_registered_converter(xgboost.XGBRegressor, "ImportedXgbRegressor", values, convert_xgboost)


def nameless(estimator: Any) -> Any:
    """The estimator, or a copy whose boosters forgot their columns' names: the converter wants f0, f1."""
    if "xgboost" not in sys.modules:
        return estimator
    twin = copy.deepcopy(estimator)
    for step in (twin, *(one for _, one in getattr(twin, "steps", ()))):
        if hasattr(step, "get_booster"):
            step.get_booster().feature_names = step.get_booster().feature_types = None
    return twin


def skops_content(original: Original) -> bytes:
    """The model as skops saves it, ids and names in order and without times: the same bytes every time."""
    with zipfile.ZipFile(io.BytesIO(_skops().dumps(original.estimator))) as archive:
        schema = json.loads(archive.read("schema.json"))
        files = {name: archive.read(name) for name in archive.namelist() if name != "schema.json"}
    ids: dict[int, int] = {}
    names: dict[str, str] = {}

    def renumber(node: Any) -> None:
        if isinstance(node, dict):
            if "__id__" in node:
                node["__id__"] = ids.setdefault(node["__id__"], len(ids))
            if node.get("file") in files:
                name = node["file"]
                node["file"] = names.setdefault(name, f"{len(names)}{Path(name).suffix}")
            for value in node.values():
                renumber(value)
        elif isinstance(node, list):
            for value in node:
                renumber(value)

    renumber(schema)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        ordered = {"schema.json": json.dumps(schema, sort_keys=False).encode()}
        ordered |= {names[name]: files[name] for name in names}
        for name, content in ordered.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return target.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
