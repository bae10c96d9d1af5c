"""A model as it was given: its task, labels and columns, and how to ask it.

    .joblib, .pkl -> an estimator, unpickled, which runs whatever code the file holds
    .onnx -> nothing to unpickle and nothing to convert, but a ZipMap is removed
    .pt, .pt2 -> torch.py
    rows of the sample, as pandas would have read them -> answers [rows, labels], or [rows, 1] of a regressor

Everything that makes it unfit for serving is a LifecycleError, in one line.
"""

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.core.runtimes import OnnxRuntime
from app.core.store import Input
from lifecycle.command import LifecycleError
from lifecycle.importing.steps import Progress

SCORE_TOLERANCE = 1e-5
OPSET = {"": 18, "ai.onnx.ml": 3}
ROWS_A_CALL = 8_192
BOOSTERS = ("lightgbm", "xgboost")  # libraries of estimators that the ONNX converter has to be taught

Task = Literal["classification", "regression"]
Answers = np.ndarray[Any, np.dtype[np.float64]]
Form = tuple[str, Callable[[], bytes]]  # what it is, and how it is made


@dataclass
class Original:
    """The model as it was given: its task, labels and columns, and how to ask it."""

    task: Task
    labels: list[Any]
    names: list[str]
    described: str
    answer: Callable[[Any], Answers]  # rows of the sample -> [rows, labels], or [rows, 1]
    libraries: set[str]  # packages whose versions decide on the answers
    estimator: Any = None
    forms: Sequence[Form] = ()  # ONNX forms, of models that are no estimators


def open_model(path: Path, inputs: dict[str, Input], unusable: dict[str, str]) -> Original:
    """A pickled or joblib-dumped estimator; raises LifecycleError."""
    estimator = unpickle(path)
    from sklearn.base import is_classifier, is_regressor
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    kind = type(estimator).__name__
    if not hasattr(estimator, "predict"):
        raise LifecycleError(f"{path.name}: holds a {kind}, not an estimator with `predict`")
    try:
        check_is_fitted(estimator)
    except (NotFittedError, TypeError):
        raise LifecycleError(f"{path.name}: the {kind} is not fitted") from None
    if not is_classifier(estimator) and not is_regressor(estimator):
        raise LifecycleError(f"{path.name}: {_final(estimator)} is neither a classifier nor a regressor")
    task: Task = "classification" if is_classifier(estimator) else "regression"
    if task == "classification" and not hasattr(estimator, "predict_proba"):
        raise LifecycleError(
            f"{path.name}: {_final(estimator)} has no `predict_proba`, and every answer has a score; wrap it "
            "in CalibratedClassifierCV and fit again"
        )
    named = getattr(estimator, "feature_names_in_", None)
    names = [str(name) for name in named] if named is not None else list(inputs)
    if lacking := [name for name in names if name in unusable] if named is not None else list(unusable):
        raise LifecycleError(f"column {lacking[0]!r} {unusable[lacking[0]]}")
    if missing := [name for name in names if name not in inputs]:
        raise LifecycleError(
            f"model and data columns differ: the model takes {quoted(missing)}, and the data has "
            f"{quoted([name for name in inputs if name not in names])}"
        )
    if len(names) != (count := getattr(estimator, "n_features_in_", len(names))):
        raise LifecycleError(
            f"model and data columns differ: the model takes {count} columns without names, and the data has "
            f"{len(names)} beside the target: {quoted(names)}"
        )
    labels: list[Any] = []
    if task == "classification":
        classes = getattr(estimator, "classes_", None)
        if classes is None or isinstance(classes, list):
            raise LifecycleError(f"{path.name}: has several targets; one is what can be served")
        labels = as_labels(path, np.asarray(classes).tolist())
    columns = [inputs[name] for name in names]

    def answer(part: Any) -> Answers:
        rows = frame(part, columns) if named is not None else plain(part, columns)
        if task == "regression":
            values = np.asarray(estimator.predict(rows), np.float64)
            if values.size != len(values):
                raise LifecycleError(
                    f"{path.name}: predicts {values.shape[1]} values a row; one can be served"
                )
            return values.reshape(-1, 1)
        scores = np.asarray(estimator.predict_proba(rows), np.float64)
        _same_choice(path, estimator, rows, scores)
        return scores

    providers = metadata.packages_distributions()
    packages = {"scikit-learn"} | {providers[name][0] for name in BOOSTERS if name in sys.modules}
    return Original(task, labels, names, describe(estimator), answer, packages, estimator)


def open_onnx(path: Path, inputs: dict[str, Input], table: Any, target: str) -> Original:
    """An ONNX model; raises LifecycleError."""
    import onnx
    import onnxruntime

    try:
        model = onnx.load_from_string(path.read_bytes())
        without_zipmap(model)
        content = bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise LifecycleError(f"{path.name}: {error.strerror or 'cannot be read'}") from None
    except Exception as error:  # onnx and its runtime raise many types
        raise LifecycleError(
            f"{path.name}: cannot be read as an ONNX model ({type(error).__name__})"
        ) from None
    taken = session.get_inputs()
    names = list(inputs)
    if len(taken) > 1:
        names = [one.name for one in taken]
        if missing := [name for name in names if name not in inputs]:
            raise LifecycleError(f"model and data columns differ: the data lacks {quoted(missing)}")
    elif taken[0].shape[-1] != len(names):
        raise LifecycleError(
            f"model and data columns differ: the model takes {taken[0].shape[-1]} columns, and the data has "
            f"{len(names)} beside the target: {quoted(names)}"
        )
    entries = [inputs[name] for name in names]
    runtime = OnnxRuntime(onnxruntime, content, len(names))
    truth = table.column(target).drop_null()
    width = len(runtime.infer(as_served(table.slice(0, 1), entries, runtime.dtype))[0])
    labels: list[Any] = []
    if width > 1:
        labels = as_labels(path, sorted(truth.unique().to_pylist()))
        if len(labels) != width:
            there = f"{target!r} has {len(labels)} values"
            raise LifecycleError(f"{path.name}: answers with {width} probabilities, and {there}")
    elif len(session.get_outputs()) > 1 or str(truth.type) not in ("double", "int64"):
        raise LifecycleError(
            f"{path.name}: its last output has to be the probabilities [rows, labels], or the value [rows]"
        )

    def answer(part: Any) -> Answers:
        return np.asarray(runtime.infer(as_served(part, entries, runtime.dtype)), np.float64)

    task: Task = "classification" if labels else "regression"
    digest = hashlib.sha256(content).hexdigest()[:8]
    return Original(
        task, labels, names, f"an ONNX model ({digest})", answer, set(), forms=[("as it is", lambda: content)]
    )


def without_zipmap(model: Any) -> None:
    """Take the ZipMap nodes off, which turn probabilities into a list of maps."""
    from onnx import TensorProto
    from onnx.helper import make_tensor_value_info

    for node in [one for one in model.graph.node if one.op_type == "ZipMap"]:
        for output in model.graph.output:
            if output.name == node.output[0]:
                output.CopyFrom(make_tensor_value_info(node.input[0], TensorProto.FLOAT, [None, None]))
        model.graph.node.remove(node)


def unpickle(path: Path, load: Callable[[Path], Any] | None = None) -> Any:
    """The object in the file; raises LifecycleError, which names a missing package or version."""
    import joblib
    from sklearn.exceptions import InconsistentVersionWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", InconsistentVersionWarning)
            return (load or joblib.load)(path)
    except InconsistentVersionWarning as warning:
        made, here = warning.original_sklearn_version, warning.current_sklearn_version
        raise LifecycleError(
            f"{path.name}: was made with scikit-learn {made}, and {here} is installed: install "
            f"scikit-learn=={made} here, or fit and save the model again with {here}"
        ) from None
    except ModuleNotFoundError as error:
        raise LifecycleError(
            f"{path.name}: needs the module {error.name}: install what provides it, or name its folder in "
            "PYTHONPATH"
        ) from None
    except AttributeError as error:
        name = str(error).partition("attribute ")[2].split(" on ")[0] or str(error)
        raise LifecycleError(
            f"{path.name}: is made of {name}, which is not where it was when the model was saved; a class or "
            "function from a notebook has to move into a module that can be imported here"
        ) from None
    except Exception as error:  # unpickling a broken file can raise anything
        saved_by = "torch" if load else "joblib or pickle"
        raise LifecycleError(
            f"{path.name}: cannot be read as a model saved by {saved_by} ({type(error).__name__})"
        ) from None


def as_labels(path: Path, labels: list[Any]) -> list[Any]:
    """Labels that an answer can have; raises LifecycleError."""
    if all(isinstance(label, float) and label.is_integer() for label in labels):
        labels = [int(label) for label in labels]
    if not all(isinstance(label, str | int) for label in labels) or len({type(one) for one in labels}) > 1:
        raise LifecycleError(
            f"{path.name}: its labels are {type(labels[0]).__name__}, and only text, integers or booleans "
            "can be served"
        )
    if len(labels) < 2:
        raise LifecycleError(f"{path.name}: knows only the label {labels[0]!r}")
    return labels


def _same_choice(path: Path, estimator: Any, rows: Any, scores: Answers) -> None:
    """Raise LifecycleError where `predict` is not the most probable label: clients get the latter."""
    classes = np.asarray(estimator.classes_)
    chosen = np.searchsorted(classes, np.asarray(estimator.predict(rows)).ravel())
    own = scores[np.arange(len(scores)), chosen]
    if differing := int((scores.max(axis=1) - own > SCORE_TOLERANCE).sum()):
        raise LifecycleError(
            f"{path.name}: `predict` and `predict_proba` of {_final(estimator)} choose different labels in "
            f"{differing:,} of {len(scores):,} rows; a service answers with the most probable one. Fit it so "
            "that they agree (for SVC: CalibratedClassifierCV in place of probability=True)"
        )


def _final(estimator: Any) -> str:
    while hasattr(estimator, "steps"):
        estimator = estimator.steps[-1][1]
    return type(estimator).__name__


def describe(estimator: Any) -> str:
    """The kinds of its steps."""
    if hasattr(estimator, "steps"):
        return f"{type(estimator).__name__}({', '.join(describe(step) for _, step in estimator.steps)})"
    if hasattr(estimator, "transformers_"):
        inner = [describe(step) for _, step, _ in estimator.transformers_ if hasattr(step, "get_params")]
        return f"{type(estimator).__name__}({', '.join(inner)})"
    return type(estimator).__name__


def quoted(names: Sequence[str]) -> str:
    """At most eight names, for a message."""
    listed = ", ".join(map(repr, names[:8])) or "nothing else"
    return listed + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- asking ----------------------------------------------------------------------------------------------


def parts(table: Any) -> Iterator[Any]:
    """A table in pieces of ROWS_A_CALL rows."""
    for start in range(0, table.num_rows, ROWS_A_CALL):
        yield table.slice(start, ROWS_A_CALL)


def column(part: Any, entry: Input) -> Any:
    """A column as pandas would have read it."""
    array = part.column(entry.name)
    if entry.dtype == "string" or (entry.dtype == "bool" and entry.nullable):
        found = np.empty(len(array), object)
        found[:] = [np.nan if value is None else value for value in array.to_pylist()]
        return found
    return (array.cast("float64") if entry.nullable else array).to_numpy()


def frame(part: Any, entries: Sequence[Input]) -> Any:
    """Rows as a DataFrame."""
    import pandas as pd

    columns = {entry.name: column(part, entry) for entry in entries}
    return pd.DataFrame({name: pd.Series(one, dtype=one.dtype) for name, one in columns.items()})


def plain(part: Any, entries: Sequence[Input]) -> Any:
    """Rows as an array: of float64, or of objects where there is text."""
    columns = [column(part, entry) for entry in entries]
    kind = object if any(one.dtype == object for one in columns) else np.float64
    return np.column_stack([one.astype(kind) for one in columns])


def as_served(part: Any, entries: Sequence[Input], dtype: Any) -> Any:
    """Rows as the service hands them to a runtime."""
    columns = [part.column(entry.name) for entry in entries]
    if dtype is np.object_:
        return np.column_stack([np.array(one.to_pylist(), object) for one in columns])
    return np.column_stack([one.cast("float64").to_numpy().astype(dtype) for one in columns])


def original_answers(original: Original, table: Any, entries: Sequence[Input]) -> Answers:
    """The original's answers to every row of the sample; raises LifecycleError."""
    found: list[Answers] = []
    progress = Progress("asking the model")
    for part in parts(table):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(original.answer(part))
        except LifecycleError:
            raise
        except Exception as error:  # an estimator may raise anything about rows it does not like
            kinds = ", ".join(f"{one.name} ({one.dtype})" for one in entries[:5])
            words = " ".join(str(error).split())[:160]
            raise LifecycleError(
                f"the model cannot predict the data's own rows: {type(error).__name__}: {words} "
                f"[columns: {kinds}{', ...' if len(entries) > 5 else ''}]"
            ) from None
        if not np.isfinite(found[-1]).all():
            row = int(np.flatnonzero(~np.isfinite(found[-1]).all(axis=1))[0])
            before = sum(map(len, found[:-1]))
            raise LifecycleError(f"the model answers row {before + row + 1} with something that is no number")
        progress(sum(map(len, found)))
    return np.concatenate(found)
