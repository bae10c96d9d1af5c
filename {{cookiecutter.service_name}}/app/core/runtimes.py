"""Runtimes: from verified bytes to a function from rows to probabilities, or to values."""

import io
import json
import operator
import os
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ArtifactError
from app.core.store import Artifact, Input

Matrix = NDArray[Any]  # [rows, features], of the dtype that the runtime names

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
}  # fmt: skip


class Runtime(Protocol):
    """A loaded model. Pure: the same rows give the same answer, and no call disturbs another."""

    dtype: Any  # of the rows it takes: a float, null being NaN; or object, values as they were sent

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) in the contract's order -> (n, labels), in the labels' order, or (n, 1)."""
        ...


def load_runtime(artifact: Artifact) -> Runtime:
    """Load the runtime that the manifest names; raises ArtifactError."""
    content, manifest = artifact.files[artifact.model_file], artifact.manifest
    inputs, labels = manifest.inputs, manifest.outputs.labels
    try:
        library = import_library(artifact)
        if manifest.runtime == "rules":
            return RulesRuntime(json.loads(content), inputs, labels)
        if manifest.runtime == "skops":
            return SkopsRuntime(library, content, manifest.trusted_types, inputs, labels)
        return OnnxRuntime(library, content, len(inputs))
    except ArtifactError:
        raise
    except Unfit as error:
        raise _refusal(artifact, str(error)) from None
    except Exception as error:  # whatever a malformed model makes its library raise
        raise _refusal(artifact, f"cannot be loaded ({type(error).__name__})") from error


def import_library(artifact: Artifact) -> Any:
    """The library that runs this artifact, or None; raises ArtifactError where it is not the one to use."""
    if artifact.manifest.runtime == "onnx":
        # Kept from sending usage events to its maker; too late once it is imported.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        return onnxruntime
    if artifact.manifest.runtime == "skops":
        _check_libraries(artifact)
        _check_types(artifact)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the service scales by workers
        import skops.io

        return skops.io
    return None


def _refusal(artifact: Artifact, reason: str) -> ArtifactError:
    return ArtifactError(f"{artifact.manifest.version}/{artifact.model_file}: {reason}")


def _check_libraries(artifact: Artifact) -> None:
    """Raise ArtifactError unless every library in the manifest is installed in that very version."""
    made_with = artifact.manifest.libraries
    for name in sorted({"numpy", "scikit-learn", "skops", *made_with}):
        if name not in made_with:
            raise _refusal(artifact, f"manifest.json does not say with which {name} it was made")
        needed, installed = made_with[name], "none"
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.version(name)
        if installed != needed:
            reason = f"was made with {name} {needed}, and {installed} is installed: add {name}=={needed} to"
            raise _refusal(artifact, f"{reason} requirements/runtime.in, run `make lock`, install again")


def _check_types(artifact: Artifact) -> None:
    """Raise ArtifactError unless the manifest lists every type that the model is made of.

    skops trusts some hundred types of its own accord; here the manifest alone has the say.
    """
    try:
        held = skops_types(artifact.files[artifact.model_file])
    except Exception as error:  # no archive, or one of something else
        raise _refusal(artifact, f"cannot be loaded ({type(error).__name__})") from error
    if unlisted := sorted(held - set(artifact.manifest.trusted_types)):
        reason = f"holds a {unlisted[0]}, which manifest.json does not list among trusted_types"
        raise _refusal(artifact, reason)


class Unfit(Exception):
    """A model that is not loaded, and the reason in a few words of ours."""


# onnxruntime looks for tensors that lie in other files only in this folder, where there are none.
_NO_FOLDER = ("session.model_external_initializers_file_folder_path", os.devnull)
_TENSORS: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_, "tensor(string)": np.object_,
}  # fmt: skip


class OnnxRuntime:
    """onnxruntime on one thread: the service scales by workers, and threads of threads only fight.

    The model takes all columns as one tensor of floats, or each as a tensor [rows, 1] of its own type.
    """

    def __init__(self, onnxruntime: Any, content: bytes, features: int) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*_NO_FOLDER)
        # Not onnxruntime's own format, which it would recognise as well.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if os.devnull in str(error) or "external" in str(error).lower():
                raise Unfit("refers to data outside of the file") from error
            raise
        taken = self._session.get_inputs()
        self._inputs = [(one.name, _TENSORS[one.type]) for one in taken]
        if sum(one.shape[-1] for one in taken) != features:
            raise ValueError("the model takes another number of columns")
        whole = len(taken) == 1 and taken[0].type in ("tensor(float)", "tensor(double)")
        text = any(kind is np.object_ for _, kind in self._inputs)
        self.dtype = self._inputs[0][1] if whole else np.object_ if text else np.float64
        self._columns = None if whole else self._inputs
        output = self._session.get_outputs()[-1]
        self._outputs, self._flat = [output.name], len(output.shape) == 1

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        if self._columns is None:
            tensors = {self._inputs[0][0]: matrix}
        else:
            tensors = {name: _tensor(matrix[:, [at]], kind) for at, (name, kind) in enumerate(self._columns)}
        output = self._session.run(self._outputs, tensors)[0]
        answer: list[list[float]] = (output[:, None] if self._flat else output).tolist()
        return answer


def _tensor(column: NDArray[Any], kind: Any) -> NDArray[Any]:
    """A column [rows, 1] as `kind`; ONNX has no missing text, so that is empty text there."""
    if kind is np.object_:
        return np.where(column == None, "", column)  # noqa: E711  # of each
    return column.astype(kind)


class SkopsRuntime:
    """A scikit-learn model, made of `trusted` types; fitted on named columns it gets such."""

    dtype: Any = np.float64

    def __init__(
        self, skops_io: Any, content: bytes, trusted: list[str], inputs: list[Input], labels: list[Any]
    ) -> None:
        self._model = skops_io.loads(content, trusted=trusted)
        classes = self._model.classes_.tolist() if labels else []
        if sorted(map(repr, classes)) != sorted(map(repr, labels)):
            raise Unfit("answers with other labels than manifest.json")
        names = [entry.name for entry in inputs]
        fitted = getattr(self._model, "feature_names_in_", None)
        if list(names if fitted is None else fitted) != names or self._model.n_features_in_ != len(names):
            raise Unfit("takes other columns than manifest.json")
        self._labels = [classes.index(label) for label in labels]
        self._kinds: dict[str, Any] = {}
        if fitted is not None and any(entry.dtype != "float64" for entry in inputs):
            import pandas as pd

            self._frame = pd.DataFrame
            self._kinds = {entry.name: _kind(entry) for entry in inputs}
            self.dtype = np.object_
        alone = {key: 1 for key in self._model.get_params() if key.rpartition("__")[2] == "n_jobs"}
        self._model.set_params(**alone)
        # Columns are in order, as was just checked; an array need not carry their names.
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        rows: Any = matrix
        if self._kinds:
            # An estimator looks at the type of each column, and finds the same as in training.
            named = zip(self._kinds.items(), matrix.T, strict=True)
            rows = self._frame(
                {name: column.astype(kind) if kind else column.tolist() for (name, kind), column in named}
            )
        if self._labels:
            answer: list[list[float]] = self._model.predict_proba(rows)[:, self._labels].tolist()
            return answer
        return [[float(value)] for value in self._model.predict(rows).ravel()]


def _kind(entry: Input) -> Any:
    """A column's type in training; None leaves it to pandas, which knows missing text."""
    if entry.dtype == "string" or (entry.dtype == "bool" and entry.nullable):
        return None
    if entry.dtype == "float64" or entry.nullable:
        return np.float64
    return np.int64 if entry.dtype == "int64" else np.bool_


def skops_types(content: bytes) -> set[str]:
    """Every type, function and method owner that a skops file names, like `numpy.ndarray`."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pending, found = [json.loads(archive.read("schema.json"))], set()
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            owner, name = node.get("__module__"), node.get("__class__")
            if isinstance(owner, str) and isinstance(name, str):
                found.add(f"{owner}.{name}")
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
    return found


class RulesRuntime:
    """A decision list: the first rule whose conditions all hold decides. No model, the same contract."""

    def __init__(self, document: dict[str, Any], inputs: list[Input], labels: list[Any]) -> None:
        self._labels = labels
        floats = all(entry.dtype == "float64" for entry in inputs)
        self.dtype = np.float32 if floats else np.object_
        names = [entry.name for entry in inputs]
        self._rules = [
            (
                [
                    (names.index(name), _OPERATORS[symbol], float(np.float32(bound)) if floats else bound)
                    for name, conditions in rule["when"].items()
                    for symbol, bound in conditions.items()
                ],
                self._spread(rule),
            )
            for rule in document["rules"]
        ]
        self._otherwise = self._spread(document["otherwise"])

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        return [self._decide(row) for row in matrix.tolist()]

    def _decide(self, row: list[float]) -> list[float]:
        for conditions, probabilities in self._rules:
            if all(row[index] is not None and holds(row[index], bound) for index, holds, bound in conditions):
                return probabilities
        return self._otherwise

    def _spread(self, decision: dict[str, Any]) -> list[float]:
        """The decided label's score, and the rest of 1 shared by the other labels; or the value."""
        if not self._labels:
            return [float(decision["value"])]
        chosen, score = self._labels.index(decision["label"]), float(decision["score"])
        rest = (1 - score) / max(len(self._labels) - 1, 1)
        return [score if index == chosen else rest for index in range(len(self._labels))]
