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

from app.core.runtimes import OnnxRuntime
from app.core.store import Input
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
    tries: list[str] = []
    types: list[str] = []
    packages = {"numpy", *original.libraries}
    forms = original.forms or (onnx_forms(original, chosen) if request.runtime == "onnx" else ())
    if found := proven(proof, forms, tries):
        packages |= {"onnx", "onnxruntime"} if original.forms else {"onnx", "onnxruntime", "skl2onnx"}
    elif original.forms:
        raise LifecycleError(f"the model cannot be served as ONNX: {'; '.join(tries)}")
    else:
        content, types = skops.trusted(original.estimator, request, tries)
        runtime = skops.runtime(content, types, chosen, original.labels)
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
    make = partial(to_onnx, libraries.convertible(original.estimator), classifier=classifier)
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
