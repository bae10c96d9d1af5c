"""Opens a model file, in a process of its own: unpickling runs whatever code the file holds.

Conversion -> model -> ONNX, one form after the other, or skops -> the same answers on every row?
-> model.onnx or model.skops, answers.npy (of the original), Converted: or a Refusal
"""

import copy
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.core.runtimes import OnnxRuntime, SkopsRuntime, skops_types
from app.core.store import Input
from lifecycle.command import LifecycleError
from lifecycle.importing.onnx_rewriting.graph import (
    Frame,
    Graph,
    Numbers,
    Unsupported,
    Words,
    answer,
    to_onnx,
    transform,
    unwrapped,
)
from lifecycle.importing.original import (
    BOOSTERS,
    SCORE_TOLERANCE,
    Answers,
    Form,
    Original,
    as_served,
    describe,
    open_model,
    open_onnx,
    original_answers,
    parts,
)
from lifecycle.importing.steps import ANSWERS, SAMPLE, Conversion, Converted, Progress, step
from lifecycle.tables import read_sample

ROWS_ALONE = 20  # asked one at a time, because an answer may not depend on the rows beside it
VALUE_TOLERANCE = 1e-4  # of the standard deviation of the values
# Types that estimators of these libraries are made of; anything else is for the person to trust.
KNOWN = tuple(f"{name}." for name in ("sklearn", "numpy", "scipy", "pandas", *BOOSTERS))
KNOWN_BUILTINS = {
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "slice", "str",
                                      "tuple", "type", "complex", "frozenset", "range", "bytearray")),
    "collections.OrderedDict", "collections.defaultdict", "functools.partial",
}  # fmt: skip


def convert(folder: Path) -> None:
    """Open, convert, prove; writes the converted model and a `Converted`. Raises LifecycleError."""
    request = Conversion.read(folder)
    table = read_sample(folder / SAMPLE)
    inputs = {entry.name: entry for entry in request.inputs}
    if request.model.suffix == ".onnx":
        original = open_onnx(request.model, inputs, table, request.target)
    elif request.model.suffix in (".pt", ".pth", ".pt2"):
        from lifecycle.importing.torch import open_torch

        original = open_torch(request.model, inputs, request.unusable, table, request.target)
    else:
        original = open_model(request.model, inputs, request.unusable)
    chosen = [inputs[name] for name in original.names]
    rows = table.select(original.names)
    answers = original_answers(original, rows, chosen)
    np.save(folder / ANSWERS, answers)
    tolerance = SCORE_TOLERANCE
    if original.task == "regression":
        tolerance = VALUE_TOLERANCE * float(answers.std()) or 1e-6 * max(1.0, float(np.abs(answers).max()))
    proof = Proof(rows, chosen, answers, tolerance)
    tries: list[str] = []
    types: list[str] = []
    packages = {"numpy", *original.libraries}
    forms = original.forms or (onnx_forms(original, chosen) if request.runtime == "onnx" else ())
    if found := proven(proof, forms, tries):
        packages |= {"onnx", "onnxruntime"} if original.forms else {"onnx", "onnxruntime", "skl2onnx"}
    elif original.forms:
        raise LifecycleError(f"the model cannot be served as ONNX: {'; '.join(tries)}")
    else:
        content, types = trusted(original.estimator, request, tries)
        import skops.io

        runtime = SkopsRuntime(skops.io, content, types, chosen, original.labels)
        found = "scikit-learn itself", content, proof.gap(runtime)
        packages |= {"skops", "pandas"} if any(one.dtype != "float64" for one in chosen) else {"skops"}
    form, content, gap = found
    converted = Converted(
        task=original.task,
        labels=original.labels,
        names=original.names,
        described=original.described,
        runtime="skops" if types else "onnx",
        form=form,
        tolerance=tolerance,
        gap=gap,
        trusted_types=types,
        libraries={name: metadata.version(name) for name in sorted(packages)},
    )
    (folder / converted.file).write_bytes(content)
    converted.write(folder)


@dataclass
class Proof:
    """The rows and the answers that a converted model has to give."""

    table: Any
    entries: list[Input]
    answers: Answers
    tolerance: float

    def gap(self, runtime: Any) -> float:
        """How far its answers are from the original's at most; raises LifecycleError beyond the tolerance."""
        worst, row, progress = 0.0, 0, Progress("asking the converted model")
        alone = [self.table.slice(at, 1) for at in range(min(ROWS_ALONE, self.table.num_rows))]
        for part in chain(alone, parts(self.table.slice(len(alone)))):
            given = np.asarray(runtime.infer(as_served(part, self.entries, runtime.dtype)), np.float64)
            wanted = self.answers[row : row + len(given)]
            if given.shape != wanted.shape:
                raise LifecycleError(
                    f"answers {given.shape[1]} numbers a row where the original gives {wanted.shape[1]}"
                )
            gaps = np.nan_to_num(np.abs(given - wanted).max(axis=1), nan=np.inf)
            if gaps.max() > self.tolerance:
                at = int(np.argmax(gaps > self.tolerance))
                raise LifecycleError(
                    f"row {row + at + 1} is {gaps[at]:.2g} away from the original, allowed is "
                    f"{self.tolerance:.2g}"
                )
            worst, row = max(worst, float(gaps.max())), row + len(given)
            progress(row)
        return worst


def proven(proof: Proof, forms: Sequence[Form], tries: list[str]) -> tuple[str, bytes, float] | None:
    """The first form that answers as the original does: name, bytes, gap. `tries` tells what failed."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    for name, make in forms:
        try:
            content = make()
            return name, content, proof.gap(OnnxRuntime(onnxruntime, content, len(proof.entries)))
        except LifecycleError as refusal:
            tries.append(f"{name}: {refusal}")
        except Exception as error:  # converters and the runtime raise many types
            words = " ".join(str(error).split())
            tries.append(f"{name}: {type(error).__name__}: {words[:120]}{'...' if len(words) > 120 else ''}")
    return None


def onnx_forms(original: Original, entries: Sequence[Input]) -> list[Form]:
    """The forms to try, the fastest first: one tensor of floats, of doubles, then one for each column."""
    from skl2onnx.common import data_types as types

    classifier = original.task == "classification"
    make = partial(
        to_onnx, convertible(original.estimator), options={"zipmap": False} if classifier else None
    )
    tensors = {"float32": types.FloatTensorType, "float64": types.DoubleTensorType}
    exact = {"int64": types.Int64TensorType, "bool": types.BooleanTensorType}
    forms: list[Form] = []
    if all(entry.dtype != "string" for entry in entries):
        for precise, tensor in tensors.items():
            forms.append(
                (f"one {precise} tensor", partial(make, [("features", tensor([None, len(entries)]))]))
            )
    some_exact = any(entry.dtype in exact and not entry.nullable for entry in entries)
    for precise, tensor in tensors.items():
        name = f"a tensor for each column, numbers as {precise}"
        for suffix, kept in [("", {}), (", integers as int64", exact)][: 1 + some_exact]:
            kinds = [
                types.StringTensorType
                if entry.dtype == "string"
                else tensor
                if entry.nullable
                else kept.get(entry.dtype, tensor)
                for entry in entries
            ]
            declared = [(entry.name, kind([None, 1])) for entry, kind in zip(entries, kinds, strict=True)]
            forms.append((name + suffix, partial(make, declared)))
    return forms


def convertible(estimator: Any) -> Any:
    """The estimator as skl2onnx can take it, with the converters that onnxmltools has for boosters."""
    from skl2onnx import update_registered_converter as register
    from skl2onnx.common import shape_calculator as shapes

    scores = shapes.calculate_linear_classifier_output_shapes
    values = shapes.calculate_linear_regressor_output_shapes
    options = {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    if "lightgbm" in sys.modules:
        import lightgbm
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm as convert_lgbm

        register(lightgbm.LGBMClassifier, "ImportedLgbmClassifier", scores, convert_lgbm, options=options)
        register(
            lightgbm.LGBMRegressor, "ImportedLgbmRegressor", values, convert_lgbm, options={"split": None}
        )
    if "xgboost" in sys.modules:
        import xgboost
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost

        register(xgboost.XGBClassifier, "ImportedXgbClassifier", scores, convert_xgboost, options=options)
        register(xgboost.XGBRegressor, "ImportedXgbRegressor", values, convert_xgboost)
        estimator = copy.deepcopy(estimator)
        for part in (estimator, *(one for _, one in getattr(estimator, "steps", ()))):
            if hasattr(part, "get_booster"):  # the converter wants columns called f0, f1
                part.get_booster().feature_names = part.get_booster().feature_types = None
    return estimator


def trusted(estimator: Any, request: Conversion, tries: Sequence[str]) -> tuple[bytes, list[str]]:
    """The model as skops saves it and the types in it; raises LifecycleError unless all may be loaded."""
    content = normalised(estimator)
    types = sorted(skops_types(content))
    strange = [one for one in types if not one.startswith(KNOWN) and one not in KNOWN_BUILTINS]
    if request.runtime == "onnx":
        trust = f" --trust {','.join(strange)}" if strange else ""
        raise LifecycleError(
            f"no ONNX form of this model answers as it does ({'; '.join(dict.fromkeys(tries))}). It can be "
            f"served by scikit-learn itself, some hundred times slower: repeat with --runtime skops{trust}"
        )
    if untrusted := [one for one in strange if one not in request.trust and not request.trust_listed]:
        raise LifecycleError(
            f"skops: the model is made of types that are not trusted: {', '.join(untrusted)}. "
            f"If you know them: --trust {','.join(untrusted)}"
        )
    return content, types


# --- the forms, the fastest first ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One form of the model; `make` gives its files by name."""

    form: str
    runtime: Literal["onnx", "skops"]
    make: Callable[[], dict[str, bytes]]  # may raise anything; Unsupported gives a short reason
    libraries: set[str]  # distributions whose versions decide on its answers
    advice: str = ""  # what keeps the model from being ONNX
    manifest: dict[str, Any] = field(default_factory=dict)  # what its manifest says beyond the usual


def candidates(original: Original, entries: Sequence[Input], table: Any) -> Iterator[Candidate]:
    """The forms of an estimator; `table` tells the words that its columns of text know."""
    estimator = unwrapped(original.estimator)
    output = "value" if original.task == "regression" else "probabilities"
    libraries = {"numpy", *original.libraries}
    whole = libraries | {"onnx", "onnxruntime"}
    mixed = whole | {"scikit-learn", "skops"}
    reasons: list[str] = []

    def onnx() -> dict[str, bytes]:
        graph = Graph()
        try:
            scores = answer(graph, estimator, declared(graph, entries, table))
        except Exception as error:  # what a model that was changed by hand makes of it can be anything
            named = isinstance(error, Unsupported)
            reasons.append(str(error) if named else f"its ONNX form fails ({type(error).__name__})")
            raise
        return {"model.onnx": graph.finish(scores, output)}

    yield Candidate("ONNX", "onnx", onnx, whole)
    advice = f"{reasons[0]}; with another step there, all of it would be" if reasons else ""
    steps = [step for step in getattr(estimator, "steps", []) if not hasattr(step[1], "fit_resample")]
    for at in range(1, len(steps) if reasons else 1):
        head, tail = _pipeline(steps[:at]), _pipeline(steps[at:])
        graph = Graph()
        with suppress(Exception):  # this split is not one
            width = int(steps[at][1].n_features_in_)
            features = Numbers(graph.input("features", width), width)
            later = graph.finish(answer(graph, tail, [features]), output)
            yield Candidate(
                f"{describe(head)} in scikit-learn, then {describe(tail)} in ONNX", "skops",
                partial(_split, head, later),
                mixed, advice, {"stages": ["model.skops", "model.onnx"]},
            )  # fmt: skip
            break
    for at in range(len(steps) - 1 if reasons else 0, 0, -1):
        head, tail = _pipeline(steps[:at]), _pipeline(steps[at:])
        graph = Graph()
        with suppress(Exception):  # this split is not one
            first = graph.finish(
                graph.matrix(transform(graph, head, declared(graph, entries, table))), "features"
            )
            yield Candidate(
                f"{describe(head)} in ONNX, then {describe(tail)} in scikit-learn", "skops",
                partial(_split, tail, first),
                mixed, advice, {"stages": ["model.onnx", "model.skops"]},
            )  # fmt: skip
            break
    yield Candidate(
        "scikit-learn itself", "skops", lambda: {"model.skops": normalised(estimator)},
        libraries | {"scikit-learn", "skops"}, advice,
    )  # fmt: skip


def _split(estimator: Any, model: bytes) -> dict[str, bytes]:
    return {"model.skops": normalised(estimator), "model.onnx": model}


def _pipeline(steps: Sequence[Any]) -> Any:
    from sklearn.pipeline import Pipeline

    return Pipeline(list(steps))


def declared(graph: Graph, entries: Sequence[Input], table: Any) -> Frame:
    """The contract's columns as inputs of a graph: neighbours of one type in one tensor."""
    frame: Frame = []
    runs = [(text, list(run)) for text, run in groupby(entries, lambda entry: entry.dtype == "string")]
    for number, (text, run) in enumerate(runs):
        name = graph.input("features" if len(runs) == 1 else f"features_{number}", len(run), words=text)
        if not text:
            frame.append(Numbers(name, len(run)))
            continue
        for at, entry in enumerate(run):
            column = name
            if len(run) > 1:
                column = graph.node("Gather", name, graph.constant([at], np.int64), axis=1)
            known = entry.categories or table.column(entry.name).drop_null().unique().to_pylist()
            frame.append(Words(column, tuple(map(str, known))))
    return frame


def normalised(estimator: Any) -> bytes:
    """The model as skops saves it, ids and names in order and without times: the same bytes every time."""
    import skops.io

    with zipfile.ZipFile(io.BytesIO(skops.io.dumps(estimator))) as archive:
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
    step(convert)
