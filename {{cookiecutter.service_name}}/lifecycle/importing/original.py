"""The original model: its task, labels, columns and decision rule, and how to get its answers.

    .joblib, .pkl -> an estimator; unpickling runs any code in the file
    .onnx -> used unchanged, except that a ZipMap is removed
    .pt, .pt2 -> torch.py
    rows of the sample, as pandas would have read them -> answers [rows, labels], or [rows, 1] for a regressor

A model that cannot be served raises a LifecycleError with one line.
"""

import hashlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.core.runtimes import OnnxRuntime
from app.core.store import Input
from lifecycle.command import LifecycleError
from lifecycle.importing.steps import Progress, quoted
from lifecycle.tables import spelling

SCORE_TOLERANCE = 1e-5
OPSET = {"": 18, "ai.onnx.ml": 3}
WITH_ONNX = {"numpy", "onnx", "onnxruntime"}  # distributions that an ONNX model depends on
ROWS_A_CALL = 8_192
ROUNDING = 1e-7
INDEX = "Unnamed: 0"  # pandas' name for an index column that it wrote
BOOSTERS = ("lightgbm", "xgboost")  # libraries whose estimators need converters of their own
# Where wrappers keep the fitted estimator that gets the same columns.
INNER = ("best_estimator_", "estimator_", "regressor_", "ordinal_encoder", "base_n_encoder")
# Objects and files that people save in place of an estimator; files by their first bytes.
BARE = {
    "lightgbm.basic.Booster": "LightGBM",
    "xgboost.core.Booster": "XGBoost",
    "catboost.core.CatBoost": "CatBoost",
}
NATIVE = {
    "LightGBM": rb'tree\s+version=|\{\s*"name": "tree"',
    "XGBoost": rb'\{L\0{7}\x07learner|\{\s*"learner"',
    "CatBoost": rb'CBM1|\{\s*"(features_info|model_info|ctrs|oblivious_trees)"',
}
ESTIMATORS = {"LightGBM": "LGBM", "XGBoost": "XGB", "CatBoost": "CatBoost"}  # first part of the class names
WITH_SCORES = {  # classifiers that need no calibration to have probabilities
    "VotingClassifier": "give it voting='soft', with models that all have `predict_proba`,",
    "SGDClassifier": "give it loss='log_loss'",
}
MOVE = (
    "move it to app/own/features.py, import it from `app.own.features` where you fit the model, "
    "fit and save it again"
)

Task = Literal["classification", "regression"]
Answers = np.ndarray[Any, np.dtype[np.float64]]


class Unanswered(LifecycleError):
    """The original model cannot answer a row."""


class AsText(Exception):
    """Columns that were read as numbers, but the model knows as text: codes like 08."""


@dataclass(frozen=True)
class Candidate:
    """One form of the model; `make` gives its files by name."""

    form: str
    runtime: Literal["onnx", "skops"]
    make: Callable[[], dict[str, bytes]]  # may raise anything; Unsupported has a short reason
    libraries: set[str]  # distributions whose versions affect its answers
    advice: str = ""  # why the model is not ONNX
    manifest: dict[str, Any] = field(default_factory=dict)  # additional fields of the manifest


@dataclass
class Original:
    """The original model: its task, labels and columns, and how to get its answers."""

    task: Task
    labels: list[Any]
    names: list[str]
    described: str
    answer: Callable[[Any], Answers]  # rows of the sample -> [rows, labels], or [rows, 1]
    libraries: set[str]  # packages whose versions affect the answers
    estimator: Any = None
    forms: Sequence[Candidate] = ()  # of a model that is not an estimator
    outputs: dict[str, Any] = field(default_factory=dict)  # `threshold` and `classes` of the manifest
    takes: dict[str, Any] = field(default_factory=dict)  # `takes` and `dtypes` of the manifest
    framed: bool = False  # whether it takes DataFrames
    asked: Callable[[Any], Any] = lambda part: part  # sample rows -> the estimator's input

    def chosen(self, scores: Answers) -> Any:
        """The index of each row's label: by the threshold, or the most probable label."""
        if rule := self.outputs.get("threshold"):
            at = self.labels.index(rule["label"])
            return np.where(scores[:, at] >= rule["least"], at, 1 - at)
        return scores.argmax(axis=1)

    def undecided(self, scores: Answers) -> Any:
        """Rows whose label depends on rounding. Equal scores do not: the first label wins."""
        if rule := self.outputs.get("threshold"):
            apart = np.abs(scores[:, self.labels.index(rule["label"])] - rule["least"])
        else:
            apart = np.subtract(*np.sort(scores, axis=1)[:, [-1, -2]].T)
        return (apart > 0) & (apart < ROUNDING)

    def call(self, row: Any) -> Callable[[], Any]:
        """The call for the answer to one row, with its input prepared, for measuring its duration."""
        if self.estimator is None:
            return partial(self.answer, row)
        method = self.estimator.predict_proba if self.labels else self.estimator.predict
        return partial(method, self.asked(row))


def open_model(
    path: Path, inputs: dict[str, Input], unusable: dict[str, str], table: Any, target: str
) -> Original:
    """An estimator from pickle or joblib; raises LifecycleError, or AsText."""
    with path.open("rb") as file:
        begin = file.read(64)
    if library := next((one for one, pattern in NATIVE.items() if re.match(pattern, begin)), ""):
        raise LifecycleError(_instead(path, "is in a format of its own", library))
    estimator = unpickle(path)
    from sklearn.base import is_classifier, is_regressor
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    found = type(estimator).__name__
    if library := BARE.get(f"{type(estimator).__module__}.{found}", ""):
        raise LifecycleError(_instead(path, f"holds a bare {found}", library))
    if not hasattr(estimator, "predict"):
        raise LifecycleError(f"{path.name}: holds a {found}, not an estimator with `predict`")
    try:
        check_is_fitted(estimator)
    except (NotFittedError, TypeError):
        raise LifecycleError(f"{path.name}: the {found} is not fitted") from None
    if not is_classifier(estimator) and not is_regressor(estimator):
        raise LifecycleError(f"{path.name}: {_final(estimator)} is neither a classifier nor a regressor")
    named = fitted_names(estimator, inputs)
    text = fitted_on_text(estimator, named or list(inputs)) & inputs.keys()
    if numbers := sorted(name for name in text if inputs[name].dtype != "string"):
        raise AsText(*numbers)
    names, takes = how_it_takes(estimator, inputs, named, table)
    _check_columns(path, estimator, names, named, inputs, unusable)
    columns = [inputs[name] for name in names]
    outputs, labels, classes = {}, [], []  # type: dict[str, Any], list[Any], list[Any]
    if is_classifier(estimator):
        if not hasattr(estimator, "predict_proba"):
            kind = _final(estimator)
            advice = WITH_SCORES.get(kind, "wrap it in CalibratedClassifierCV")
            raise LifecycleError(
                f"{path.name}: {kind} has no `predict_proba`, and every answer has a score; {advice} and fit "
                "again"
            )
        known = getattr(estimator, "classes_", None)
        if known is None or isinstance(known, list):
            raise LifecycleError(f"{path.name}: has several targets; only one can be served")
        classes = np.asarray(known).tolist()
        labels = as_words(path, as_labels(path, classes), table.column(target), target)
        if labels != classes:
            outputs["classes"] = as_labels(path, classes)
        if rule := threshold(path, estimator, dict(zip(classes, labels, strict=True))):
            outputs["threshold"] = rule
    # The distribution may be xgboost or xgboost-cpu.
    providers = metadata.packages_distributions() if set(BOOSTERS) & sys.modules.keys() else {}
    packages = {"scikit-learn", *(providers[name][0] for name in BOOSTERS if name in sys.modules)}
    original = Original(
        "classification" if labels else "regression",
        labels,
        names,
        describe(estimator),
        lambda part: answers(path, original, classes, original.asked(part)),
        packages,
        estimator,
        outputs=outputs,
        takes=takes,
        framed=named is not None or takes.get("takes") == "frame",
        asked=lambda part: asked(part, columns, takes, named=named is not None),
    )
    return original


def _instead(path: Path, what: str, library: str) -> str:
    kind = ESTIMATORS[library]
    return (
        f"{path.name}: {what} of {library}, which lacks what an estimator knows: fit {kind}Classifier or "
        f"{kind}Regressor, and save that object with joblib.dump(model, 'model.joblib')"
    )


def fitted_names(estimator: Any, inputs: dict[str, Input]) -> list[str] | None:
    """The columns that it was fitted on, by their names in the data; None if it knows no names."""
    named = getattr(estimator, "feature_names_in_", getattr(estimator, "feature_names_", None))  # CatBoost's
    if named is None or [*map(str, named)] == [*map(str, range(len(named)))]:
        return None
    # LightGBM changes names with spaces.
    plainly = {re.sub(r"\W", "_", name): name for name in inputs}
    return [
        name if name in inputs else plainly.get(re.sub(r"\W", "_", name), name) for name in map(str, named)
    ]


def fitted_on_text(estimator: Any, names: Sequence[str]) -> set[str]:
    """Columns for which an encoder knows words."""
    if (columns := getattr(estimator, "_transformer_to_input_indices", None)) is not None:
        parts = [
            fitted_on_text(inner, [names[at] for at in columns[name]])
            for name, inner, _ in estimator.transformers_
            if columns.get(name) and max(columns[name]) < len(names)
        ]
        return set().union(*parts)
    if hasattr(estimator, "build_analyzer") and len(names) == 1:  # a vectoriser of scikit-learn
        return {*names}
    if hasattr(estimator, "get_cat_feature_indices"):  # CatBoost makes text of every category
        return {names[at] for at in estimator.get_cat_feature_indices() if at < len(names)}
    for step in [one for _, one in getattr(estimator, "steps", ())]:
        if found := fitted_on_text(step, names):
            return found
    inner = [getattr(estimator, one) for one in INNER if hasattr(estimator, one)]
    inner += [one for _, one in getattr(estimator, "transformer_list", ())]
    inner += [one.estimator for one in getattr(estimator, "calibrated_classifiers_", ())]
    if inner := inner or [*getattr(estimator, "estimators_", ())]:
        return set().union(*(fitted_on_text(one, names) for one in inner))
    known = getattr(estimator, "categories_", ())
    words = dict(zip(names, known, strict=True)) if len(known) == len(names) else {}
    if hasattr(estimator, "cols"):  # category_encoders: a table for each column, listed or by name
        tables = estimator.mapping or ()
        pairs = (
            tables.items() if isinstance(tables, dict) else [(one["col"], one["mapping"]) for one in tables]
        )
        words |= {name: one.index for name, one in pairs}
    return {one for one in names if any(isinstance(word, str) for word in words.get(one, ()))}


def how_it_takes(
    estimator: Any, inputs: dict[str, Input], named: list[str] | None, table: Any
) -> tuple[list[str], dict[str, Any]]:
    """Its columns, and `takes` and `dtypes` for the manifest, left out if they are the default.

    An estimator without names may take an array, a frame, or a Series of text: two rows show which.
    """
    everything, text = list(inputs), [name for name, one in inputs.items() if one.dtype == "string"]
    if getattr(estimator, "n_features_in_", 0) == len(everything) - 1 and INDEX in everything:
        everything.remove(INDEX)
    if named is not None:
        entries = [inputs[name] for name in named if name in inputs]
        if kinds := pandas_categories(estimator, entries, table):
            return named, {"takes": "frame", "dtypes": kinds}
        if len(entries) < len(named) or any(one.dtype != "float64" for one in entries):
            return named, {}
        return named, {} if _predicts(estimator, plain(table.slice(0, 2), entries)) else {"takes": "frame"}
    attempts: list[tuple[list[str], dict[str, Any]]] = [
        (everything, {"takes": "array"} if text else {}), (everything, {"takes": "frame"})
    ]  # fmt: skip
    if not hasattr(estimator, "n_features_in_") and len(text) == 1:
        attempts.insert(0, (text, {"takes": "column"}))
    for names, takes in attempts:
        entries = [inputs[name] for name in names]
        if _predicts(estimator, asked(table.slice(0, 2), entries, takes, named=False)):
            return names, takes
    return attempts[0]


def _predicts(estimator: Any, rows: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            estimator.predict(rows)
        except Exception:  # an estimator may raise anything about rows it does not like
            return False
    return True


def pandas_categories(estimator: Any, entries: Sequence[Input], table: Any) -> dict[str, list[Any]]:
    """The categories, in order, of columns that a booster was fitted on as pandas' type `category`."""
    estimator = getattr(estimator, "best_estimator_", estimator)
    known = iter(getattr(getattr(estimator, "booster_", None), "pandas_categorical", None) or ())
    kinds = (
        getattr(estimator.get_booster(), "feature_types", None) if hasattr(estimator, "get_booster") else None
    )
    found: dict[str, list[Any]] = {}
    wanted = next(known, None)
    for at, entry in enumerate(entries):
        values = {one for one in table.column(entry.name).unique().to_pylist() if one is not None}
        if wanted is not None and values <= set(wanted):
            found[entry.name], wanted = list(wanted), next(known, None)
        elif kinds and kinds[at] == "c":
            found[entry.name] = sorted(values)
    return found


def _check_columns(
    path: Path,
    estimator: Any,
    names: list[str],
    named: list[str] | None,
    inputs: dict[str, Input],
    unusable: dict[str, str],
) -> None:
    """Raise LifecycleError if the columns of the data are not those of the model."""
    count = getattr(estimator, "n_features_in_", 0) or len(names)  # CatBoost says 0
    lacking = [name for name in (unusable if named is None else names) if name in unusable]
    if lacking and (named is not None or len(names) != count):
        raise LifecycleError(f"column {lacking[0]!r} {unusable[lacking[0]]}")
    if missing := [name for name in names if name not in inputs]:
        raise LifecycleError(
            f"model and data columns differ: the model takes {quoted(missing)}, and the data has "
            f"{quoted([name for name in inputs if name not in names])}"
        )
    if len(names) != count:
        raise LifecycleError(
            f"model and data columns differ: the model takes {count} columns without names, and the data has "
            f"{len(names)} beside the target: {quoted(names)}"
        )


def threshold(path: Path, estimator: Any, labels: dict[Any, Any]) -> dict[str, Any] | None:
    """The rule of a classifier with its own threshold, or None; `labels` by class. Raises LifecycleError."""
    while type(estimator).__name__ not in ("TunedThresholdClassifierCV", "FixedThresholdClassifier"):
        frozen = estimator.estimator if type(estimator).__name__ == "FrozenEstimator" else None
        inner = getattr(estimator, "best_estimator_", getattr(estimator, "final_estimator_", frozen))
        estimator = estimator.steps[-1][1] if hasattr(estimator, "steps") else inner
        if estimator is None:
            return None
    inner = getattr(estimator, "estimator_", estimator.estimator)
    if estimator.response_method == "decision_function" or not hasattr(inner, "predict_proba"):
        raise LifecycleError(
            f"{path.name}: {type(estimator).__name__} has its threshold on decision_function, and answers "
            "have probabilities: fit it with response_method='predict_proba'"
        )
    least: Any = getattr(estimator, "best_threshold_", getattr(estimator, "threshold", None))
    scorer = getattr(estimator, "_curve_scorer", None)
    positive = scorer._get_pos_label() if scorer else estimator.pos_label  # as in its `predict`
    label = list(labels.values())[1] if positive is None else labels[positive]
    return {"label": label, "least": 0.5 if least == "auto" else float(least)}


def as_words(path: Path, labels: list[Any], truth: Any, target: str) -> list[Any]:
    """The target's words for labels that a LabelEncoder turned into numbers; raises LifecycleError."""
    values = sorted({spelling(one): one for one in truth.drop_null().unique().to_pylist()}.items())
    if {spelling(one) for one in labels} & {key for key, _ in values}:
        return labels
    words = [value for _, value in values]
    if labels != list(range(len(words))) or not all(isinstance(word, str) for word in words):
        raise LifecycleError(
            f"{path.name}: its labels are {quoted(labels)}, and {target!r} holds {quoted(words)}: give the "
            "data with the labels that the model was fitted on"
        )
    return words


def answers(path: Path, original: Original, classes: list[Any], rows: Any) -> Answers:
    """Values [rows, 1], or probabilities; raises LifecycleError if `predict` gives another label."""
    estimator = original.estimator
    if not original.labels:
        values = np.asarray(estimator.predict(rows), np.float64)
        if values.size != len(values):
            raise LifecycleError(f"{path.name}: predicts {values.shape[1]} values a row; one can be served")
        return values.reshape(-1, 1)
    scores = np.asarray(estimator.predict_proba(rows), np.float64)
    own = [classes[at] for at in original.chosen(scores).tolist()]
    predicted = np.asarray(estimator.predict(rows)).ravel().tolist()
    differ = np.array([one != other for one, other in zip(own, predicted, strict=True)])
    if differing := int((differ & ~original.undecided(scores)).sum()):
        raise LifecycleError(
            f"{path.name}: `predict` and `predict_proba` of {_final(estimator)} choose different labels in "
            f"{differing:,} of {len(scores):,} rows; a service answers with the most probable one. Fit it so "
            "that they agree (for SVC: CalibratedClassifierCV in place of probability=True)"
        )
    return scores


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
    elif not isinstance(taken[0].shape[-1], int):  # any number of columns
        model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value = len(names)
        content = bytes(model.SerializeToString())
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
    form = Candidate("ONNX as it is", "onnx", lambda: {"model.onnx": content}, WITH_ONNX)
    return Original(task, labels, names, f"an ONNX model ({digest})", answer, set(), forms=[form])


def without_zipmap(model: Any) -> None:
    """Remove ZipMap nodes, which turn probabilities into a list of maps."""
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
        if error.name == "cloudpickle":
            raise LifecycleError(
                f"{path.name}: was saved by cloudpickle, so it holds code of a notebook or script: {MOVE} "
                "with joblib.dump"
            ) from None
        raise LifecycleError(
            f"{path.name}: needs the module {error.name!r}, which is not installed here: install the package "
            f"that has it; if it is your own code, {MOVE}"
        ) from None
    except AttributeError as error:
        name = str(error).partition("attribute ")[2].split(" on ")[0] or str(error)[:80]
        raise LifecycleError(
            f"{path.name}: is made of {name}, which is not where it was when the model was saved: if it is "
            f"your own code, {MOVE}"
        ) from None
    except Exception as error:  # unpickling a broken file can raise anything
        saved_by = "torch" if load else "joblib or pickle"
        raise LifecycleError(
            f"{path.name}: cannot be read as a model saved by {saved_by} ({type(error).__name__}); for an "
            "estimator, joblib.dump(model, 'model.joblib') writes one"
        ) from None


def as_labels(path: Path, labels: list[Any]) -> list[Any]:
    """Labels in a type that an answer can have; raises LifecycleError."""
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


def _final(estimator: Any) -> str:
    while hasattr(estimator, "steps") or hasattr(estimator, "best_estimator_"):
        estimator = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator.best_estimator_
    return type(estimator).__name__


def describe(estimator: Any) -> str:
    """The class names of its steps."""
    if hasattr(estimator, "steps"):
        return f"{type(estimator).__name__}({', '.join(describe(step) for _, step in estimator.steps)})"
    if hasattr(estimator, "transformers_"):
        inner = [describe(step) for _, step, _ in estimator.transformers_ if hasattr(step, "get_params")]
        return f"{type(estimator).__name__}({', '.join(inner)})"
    return type(estimator).__name__


# --- asking ----------------------------------------------------------------------------------------------


def parts(table: Any, rows: int = ROWS_A_CALL) -> Iterator[Any]:
    """A table in pieces of `rows` rows."""
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def column(part: Any, entry: Input) -> Any:
    """A column as pandas would have read it."""
    array = part.column(entry.name)
    if entry.dtype == "string" or (entry.dtype == "bool" and entry.nullable):
        found = np.empty(len(array), object)
        found[:] = [np.nan if value is None else value for value in array.to_pylist()]
        return found
    return (array.cast("float64") if entry.nullable else array).to_numpy()


def asked(part: Any, entries: Sequence[Input], takes: dict[str, Any], *, named: bool) -> Any:
    """Rows as the estimator's input: a Series of text, an array, or a DataFrame."""
    import pandas as pd

    if takes.get("takes") == "column":
        return pd.Series(part.column(entries[0].name).fill_null("").to_pylist(), dtype=object)
    if not named and takes.get("takes") != "frame":
        return plain(part, entries)
    kinds = {name: pd.CategoricalDtype(one) for name, one in takes.get("dtypes", {}).items()}
    columns = {entry.name: column(part, entry) for entry in entries}
    return pd.DataFrame(
        {name: pd.Series(one, dtype=kinds.get(name, one.dtype)) for name, one in columns.items()}
    )


def plain(part: Any, entries: Sequence[Input]) -> Any:
    """Rows as an array of float64, or of objects if there is text."""
    columns = [column(part, entry) for entry in entries]
    kind = object if any(one.dtype == object for one in columns) else np.float64
    return np.column_stack([one.astype(kind) for one in columns])


def as_served(part: Any, entries: Sequence[Input], dtype: Any) -> Any:
    """Rows as the service passes them to a runtime."""
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
            for one in [one for one in entries if one.dtype == "string" and "to float" in words]:
                values = part.column(one.name).to_pylist()
                for at, value in enumerate(values, sum(map(len, found)) + 1):
                    if value and repr(value) in str(error):
                        raise Unanswered(
                            f"column {one.name!r} is text where the model takes numbers: row {at} "
                            f"holds {value[:60]!r}; write numbers like 3504 or 3.5, and nothing where one "
                            "is missing"
                        ) from None
            raise Unanswered(
                f"the model cannot predict the data's own rows: {type(error).__name__}: {words} "
                f"[columns: {kinds}{', ...' if len(entries) > 5 else ''}]"
            ) from None
        if not np.isfinite(found[-1]).all():
            row = int(np.flatnonzero(~np.isfinite(found[-1]).all(axis=1))[0])
            before = sum(map(len, found[:-1]))
            raise Unanswered(f"the model answers row {before + row + 1} with NaN or infinity")
        progress(sum(map(len, found)))
    return np.concatenate(found)
