"""Runtimes: from verified bytes to a function from rows to probabilities, or to values.

    rows, columns typed by the contract -> one model file, or the two files of a split model in order

A value's type never depends on other rows. A missing value is NaN in a column of numbers, "" in a text column
of ONNX, and NaN in an object column of a DataFrame.
"""

import io
import json
import operator
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module, metadata
from itertools import accumulate, pairwise
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
    """A loaded model. Pure: the same rows give the same answer, and calls do not affect each other."""

    dtype: Any  # of the rows it takes: a float type with NaN for null, or object with values as sent

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) in the contract's order -> (n, labels), in the labels' order, or (n, 1)."""
        ...


def load_runtime(artifact: Artifact) -> Runtime:
    """Load the runtime that the manifest names; raises ArtifactError."""
    manifest, files = artifact.manifest, artifact.files
    inputs, outputs = manifest.inputs, manifest.outputs
    libraries, loaded = import_libraries(artifact), list[Any]()
    with _refusing(artifact):
        for name in artifact.model_files:
            if name == "rules.json":
                loaded.append(RulesRuntime(json.loads(files[name]), inputs, outputs.labels))
            elif name == "model.onnx":
                loaded.append(OnnxRuntime(libraries[name], files[name], None if loaded else len(inputs)))
            else:
                runtime = SkopsRuntime(
                    libraries[name], files[name], manifest.trusted_types, None if loaded else inputs,
                    outputs.labels if name == artifact.model_file else None,
                    classes=outputs.classes, takes=manifest.takes, dtypes=manifest.dtypes,
                )  # fmt: skip
                loaded.append(runtime)
    return loaded[0] if len(loaded) == 1 else SplitRuntime(*loaded)


def import_libraries(artifact: Artifact) -> dict[str, Any]:
    """The library that runs each model file; raises ArtifactError if its version does not fit."""
    found: dict[str, Any] = {}
    with _refusing(artifact):
        if "model.skops" in artifact.model_files:
            _check_libraries(artifact.manifest.libraries)
            # skops trusts some hundred types by default; here only those in the manifest are trusted.
            trusted = set(artifact.manifest.trusted_types)
            if unlisted := sorted(skops_types(artifact.files["model.skops"]) - trusted):
                raise Unfit(f"holds a {unlisted[0]}, which manifest.json does not list among trusted_types")
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # the service scales by workers
            found["model.skops"] = import_module("skops.io")
        if "model.onnx" in artifact.model_files:
            # Stops it from sending usage events; must be set before the import.
            os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
            found["model.onnx"] = import_module("onnxruntime")
    return found


class Unfit(Exception):
    """A model that is refused; the message is the reason, in our own words."""


@contextmanager
def _refusing(artifact: Artifact) -> Iterator[None]:
    """Turn any exception that a malformed model causes in its library into an ArtifactError."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, Unfit) else f"cannot be loaded ({type(error).__name__})"
        raise ArtifactError(f"{artifact.manifest.version}/{artifact.model_file}: {reason}") from error


def _check_libraries(made_with: Mapping[str, str]) -> None:
    for name in sorted({"numpy", "scikit-learn", "skops", *made_with}):
        if name not in made_with:
            raise Unfit(f"manifest.json does not say with which {name} it was made")
        needed, installed = made_with[name], "none"
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.version(name)
        if installed != needed:
            reason = f"was made with {name} {needed}, and {installed} is installed: add {name}=={needed} to"
            raise Unfit(f"{reason} requirements/runtime.in, run `make lock`, install again")


# onnxruntime looks for external tensors only in this folder, which has none.
_NO_FOLDER = ("session.model_external_initializers_file_folder_path", os.devnull)
_TENSORS: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_, "tensor(string)": np.object_,
}  # fmt: skip


class OnnxRuntime:
    """onnxruntime on one thread: the service scales by workers, and more threads compete for the CPUs.

    Each input takes as many columns as it is wide, in order; `features` is the total number of columns, None
    for the second stage of a split.
    """

    def __init__(self, onnxruntime: Any, content: bytes, features: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*_NO_FOLDER)
        # Refuse onnxruntime's own format, which it detects by default.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if os.devnull in str(error) or "external" in str(error).lower():
                raise Unfit("refers to data outside of the file") from error
            raise
        taken = self._session.get_inputs()
        ends = list(accumulate((one.shape[-1] for one in taken), initial=0))
        if features is not None and ends[-1] != features:
            raise ValueError("the model takes another number of columns")
        kinds = [_TENSORS[one.type] for one in taken]
        self._inputs = list(zip([one.name for one in taken], kinds, pairwise(ends), strict=True))
        whole = len(kinds) == 1 and kinds[0] in (np.float32, np.float64)
        self.dtype = kinds[0] if whole else np.object_ if np.object_ in kinds else np.float64
        output = self._session.get_outputs()[-1]
        self._outputs, self._flat = [output.name], len(output.shape) == 1

    def transform(self, matrix: Matrix) -> Matrix:
        """Rows (n, features) -> (n, labels) or (n, 1), as an array."""
        tensors = {name: _tensor(matrix[:, slice(*at)], kind) for name, kind, at in self._inputs}
        output: Matrix = self._session.run(self._outputs, tensors)[0]
        return output[:, None] if self._flat else output

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        answer: list[list[float]] = self.transform(matrix).tolist()
        return answer


def _tensor(columns: NDArray[Any], kind: Any) -> NDArray[Any]:
    """Columns as `kind`; ONNX has no missing text, so missing text becomes an empty string."""
    if kind is np.object_:
        return _filled(columns, "")
    if columns.dtype == kind and columns.flags.c_contiguous:  # most models: the matrix is made for them
        return columns
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(columns, kind)


def _filled(columns: NDArray[Any], missing: Any) -> NDArray[Any]:
    return np.where(columns == None, missing, columns)  # noqa: E711  # elementwise


class SkopsRuntime:
    """A scikit-learn model of `trusted` types; `takes` and `dtypes` come from the manifest.

    `inputs` is None for the second stage of a split, `labels` for the first, which only transforms.
    """

    dtype: Any = np.float64

    def __init__(
        self,
        skops_io: Any,
        content: bytes,
        trusted: list[str],
        inputs: Sequence[Input] | None,
        labels: Sequence[Any] | None,
        *,
        classes: Sequence[Any] = (),
        takes: str | None = None,
        dtypes: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = skops_io.loads(content, trusted=trusted)
        self._labels: list[int] = []
        if labels:
            own = self._model.classes_.tolist()
            called = classes or labels
            if len(own) != len(called) or not all(one in own for one in called):
                raise Unfit("answers with other labels than manifest.json")
            self._labels = [own.index(one) for one in called]
        if inputs is not None:
            self._expect(inputs, takes, dtypes or {})
        alone = {key: 1 for key in self._model.get_params() if key.rpartition("__")[2] == "n_jobs"}
        if alone:  # a fitted CatBoost refuses even none
            self._model.set_params(**alone)
        # The order of the columns has been checked; arrays need no names.
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)

    def _expect(self, inputs: Sequence[Input], takes: str | None, dtypes: Mapping[str, Any]) -> None:
        """Refuse columns that the model was not fitted on, and set the type of each column."""
        self._kinds: dict[str, Any] = {entry.name: _kind(entry) for entry in inputs}
        exact = all(kind is np.float64 for kind in self._kinds.values()) and not dtypes
        names = [entry.name for entry in inputs]
        fitted = getattr(self._model, "feature_names_in_", None)
        same = fitted is None or _plain(fitted) == _plain(names)
        count = getattr(self._model, "n_features_in_", 0) or len(names)  # CatBoost says 0
        if not same or count != len(names):
            raise Unfit("takes other columns than manifest.json")
        self._takes = takes or ("array" if fitted is None or exact else "frame")
        self.dtype = np.float64 if exact else np.object_
        if self._takes == "frame":
            self._pandas = pd = import_module("pandas")
            for name, kind in dtypes.items():
                self._kinds[name] = pd.CategoricalDtype(kind) if isinstance(kind, list) else kind

    def transform(self, matrix: Matrix) -> Matrix:
        """Rows (n, features) -> output of the first stage of a split, (n, k)."""
        made: Any = self._model.transform(self._rows(matrix))
        return np.asarray(made.toarray() if hasattr(made, "toarray") else made)

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        rows = self._rows(matrix)
        if self._labels:
            answer: list[list[float]] = self._model.predict_proba(rows)[:, self._labels].tolist()
            return answer
        return [[float(value)] for value in self._model.predict(rows).ravel()]

    def _rows(self, matrix: Matrix) -> Any:
        """The rows in the types that the model was fitted on: estimators depend on the type of a column."""
        if self._takes == "column":
            return _filled(matrix[:, 0], "")
        if self._takes == "frame":
            columns = zip(self._kinds.items(), matrix.T, strict=True)
            return self._pandas.DataFrame({name: self._series(one, kind) for (name, kind), one in columns})
        if self.dtype is not np.object_:
            return matrix
        kinds = self._kinds.values()
        typed = [_typed(one, kind) for kind, one in zip(kinds, matrix.T, strict=True)]
        return np.column_stack(typed).astype(np.object_ if np.object_ in kinds else np.float64)

    def _series(self, column: NDArray[Any], kind: Any) -> Any:
        pd = self._pandas
        if isinstance(kind, pd.CategoricalDtype):  # an unknown value becomes missing
            return pd.Categorical.from_codes(kind.categories.get_indexer(column), dtype=kind)
        return pd.Series(_typed(column, kind), dtype=kind)


def _plain(names: Iterable[Any]) -> list[str]:
    """Column names as LightGBM stores them."""
    return [str(one).replace(" ", "_") for one in names]


def _kind(entry: Input) -> Any:
    """The usual type of a column in training, if the manifest names no other."""
    if entry.dtype == "string" or (entry.dtype == "bool" and entry.nullable):
        return np.object_
    if entry.dtype == "float64" or entry.nullable:
        return np.float64
    return np.int64 if entry.dtype == "int64" else np.bool_


def _typed(column: NDArray[Any], kind: Any) -> NDArray[Any]:
    """A column as NumPy's `kind`, or as objects for pandas to convert; missing is NaN in every type."""
    if kind in (np.float64, np.int64, np.bool_):
        return column.astype(kind)
    return _filled(column, np.nan)


class SplitRuntime:
    """Two stages: the second takes the output of the first as one matrix of numbers."""

    def __init__(self, first: OnnxRuntime | SkopsRuntime, last: OnnxRuntime | SkopsRuntime) -> None:
        self._first, self._last, self.dtype = first, last, first.dtype

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        return self._last.infer(self._first.transform(matrix).astype(self._last.dtype, copy=False))


def skops_types(content: bytes) -> set[str]:
    """All types, functions and owners of methods that a skops file names, like `numpy.ndarray`."""
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
    """A decision list under the same contract: the first rule whose conditions all hold decides."""

    def __init__(self, document: dict[str, Any], inputs: list[Input], labels: list[Any]) -> None:
        self._labels = labels
        floats = all(entry.dtype == "float64" for entry in inputs)
        self.dtype = np.float32 if floats else np.object_
        names = [entry.name for entry in inputs]
        self._rules = []
        for rule in [*document["rules"], {"when": {}} | document["otherwise"]]:
            conditions = [
                (names.index(name), _OPERATORS[symbol], float(np.float32(bound)) if floats else bound)
                for name, bounds in rule["when"].items()
                for symbol, bound in bounds.items()
            ]
            self._rules.append((conditions, self._spread(rule)))

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) -> (n, labels) or (n, 1)."""
        return [self._decide(row) for row in matrix.tolist()]

    def _decide(self, row: list[float]) -> list[float]:
        return next(
            answer
            for conditions, answer in self._rules
            if all(row[at] is not None and holds(row[at], bound) for at, holds, bound in conditions)
        )

    def _spread(self, decision: dict[str, Any]) -> list[float]:
        """The score of the decided label, and the rest of 1 shared by the other labels; or the value."""
        if not self._labels:
            return [float(decision["value"])]
        chosen, score = self._labels.index(decision["label"]), float(decision["score"])
        rest = (1 - score) / max(len(self._labels) - 1, 1)
        return [score if index == chosen else rest for index in range(len(self._labels))]
