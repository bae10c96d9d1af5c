"""Opens a model file, in a process of its own: unpickling runs whatever code the file holds.

Conversion -> model -> ONNX, one form after the other, or skops -> the same answers on every row?
-> model.onnx or model.skops, answers.npy (of the original), Converted: or a Refusal
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from app.core.manifest import Input
from app.core.runtimes import OnnxRuntime, skops_types
from lifecycle.errors import LifecycleError
from lifecycle.importing import libraries
from lifecycle.importing.documents import ANSWERS, SAMPLE, Conversion, Converted
from lifecycle.importing.libraries import skops
from lifecycle.importing.original import (
    OPSET,
    SCORE_TOLERANCE,
    Answers,
    Form,
    Original,
    as_served,
    open_model,
    original_answers,
    parts,
)
from lifecycle.importing.steps import Progress, step
from lifecycle.tables import read_sample

ROWS_ALONE = 20  # asked one at a time, because an answer may not depend on the rows beside it
VALUE_TOLERANCE = 1e-4  # of the standard deviation of the values
# Types that estimators of these libraries are made of; anything else is for the person to trust.
KNOWN = ("sklearn.", "numpy.", "scipy.", "pandas.")
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
    if open_file := libraries.opener(request.model.suffix):
        original = open_file(request.model, inputs, request.unusable, table, request.target)
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
    form, content, gap, types = _converted(original, proof, request)
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
        libraries={name: metadata.version(name) for name in sorted(_packages(original, chosen, types))},
    )
    (folder / converted.file).write_bytes(content)
    converted.write(folder)


def _converted(
    original: Original, proof: "Proof", request: Conversion
) -> tuple[str, bytes, float, list[str]]:
    """Name, bytes, gap and, of skops, the types of the first form that answers as the original does."""
    tries: list[str] = []
    forms = original.forms
    if not forms and request.runtime == "onnx":
        forms = onnx_forms(original, proof.entries)
    if found := proven(proof, forms, tries):
        return *found, []
    if original.forms:
        raise LifecycleError(f"the model cannot be served as ONNX: {'; '.join(tries)}")
    content = skops.content(original.estimator)
    types = sorted(skops_types(content))
    strange = [one for one in types if not known(one)]
    if request.runtime == "onnx":
        trust = f" --trust {','.join(strange)}" if strange else ""
        raise LifecycleError(
            f"no ONNX form of this model answers as it does ({'; '.join(dict.fromkeys(tries))}). It can be "
            f"served by scikit-learn itself, some hundred times slower: repeat with --runtime skops{trust}"
        )
    untrusted = [one for one in strange if one not in request.trust and not request.trust_listed]
    if untrusted:
        raise LifecycleError(
            f"skops: the model is made of types that are not trusted: {', '.join(untrusted)}. "
            f"If you know them: --trust {','.join(untrusted)}"
        )
    return (
        "scikit-learn itself",
        content,
        proof.gap(skops.runtime(original, content, types, proof.entries)),
        types,
    )


def _packages(original: Original, entries: Sequence[Input], types: list[str]) -> set[str]:
    """The packages whose versions the manifest records."""
    if not types:
        return (
            original.libraries
            | {"numpy", "onnx", "onnxruntime"}
            | ({"skl2onnx"} if not original.forms else set())
        )
    pandas = {"pandas"} if any(entry.dtype != "float64" for entry in entries) else set()
    return original.libraries | pandas | {"numpy", "scikit-learn", "skops"}


def known(name: str) -> bool:
    """Whether a type may be loaded because it belongs to a library that models are made with."""
    return name.startswith((*KNOWN, *(f"{one}." for one in libraries.modules("convertible")))) or (
        name in KNOWN_BUILTINS
    )


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
        except Exception as error:  # whatever a converter or the runtime finds wrong with the model
            words = " ".join(str(error).split())
            tries.append(f"{name}: {type(error).__name__}: {words[:120]}{'...' if len(words) > 120 else ''}")
    return None


def onnx_forms(original: Original, entries: Sequence[Input]) -> list[Form]:
    """The forms to try, the fastest first: one tensor of floats, of doubles, then one for each column."""
    from skl2onnx.common import data_types as types

    estimator = libraries.convertible(original.estimator)
    classifier = original.task == "classification"
    forms: list[Form] = []
    for precise, single in (("float32", types.FloatTensorType), ("float64", types.DoubleTensorType)):
        if all(entry.dtype != "string" for entry in entries):
            declared = [("features", single([None, len(entries)]))]
            forms.append(
                (f"one {precise} tensor", partial(to_onnx, estimator, declared, classifier=classifier))
            )
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
                forms.append((name, partial(to_onnx, estimator, declared, classifier=classifier)))
    return forms


def to_onnx(estimator: Any, declared: list[tuple[str, Any]], *, classifier: bool) -> bytes:
    """One ONNX form; the same model and form give the same bytes."""
    import skl2onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = skl2onnx.to_onnx(
            estimator,
            initial_types=declared,
            options={id(estimator): {"zipmap": False}} if classifier else None,
            name="model",  # the default is a new random name each time
            target_opset=OPSET,
        )
    model.domain = ""
    return bytes(model.SerializeToString())


if __name__ == "__main__":
    step(convert)
