"""scikit-learn without its trees, and libraries used in its pipelines: imblearn and category_encoders.

pipelines, numbers, categories -> linear models -> models of models
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.graph import (
    MISSING,
    Frame,
    Graph,
    Method,
    Numbers,
    Unsupported,
    Words,
    answer,
    converter,
    decision,
    foreign,
    inverse,
    is_missing,
    transform,
    unwrapped,
)
from lifecycle.importing.onnx_rewriting.trees import linked

MAX_TABLE = 20_000_000  # size of the output when asking an encoder for all categories
BINARY = 2
UNSEEN = "a word that nobody has written"

# --- steps made of steps ----------------------------------------------------------------------------------


def _pipeline(method: Method, last: Callable[..., Any]) -> None:
    @converter("Pipeline", method=method)
    def _steps(graph: Graph, pipeline: Any, frame: Frame) -> Any:
        for _, step in pipeline.steps[:-1]:
            if not hasattr(step, "fit_resample"):  # imblearn's samplers are used only in training
                frame = transform(graph, step, frame)
        return last(graph, pipeline.steps[-1][1], frame)


_pipeline("transform", transform)
_pipeline("answer", answer)
_pipeline("decision", decision)


@converter("Pipeline", method="inverse")
def _pipeline_inverse(graph: Graph, pipeline: Any, values: Numbers) -> Numbers:
    for _, step in reversed(pipeline.steps):
        values = inverse(graph, step, values)
    return values


@converter("ColumnTransformer", "FeatureUnion", method="transform")
def _beside(graph: Graph, step: Any, frame: Frame) -> Frame:
    parts = [(name, inner, frame) for name, inner in getattr(step, "transformer_list", ())]
    for name, inner, _ in getattr(step, "transformers_", ()):
        indices = step._transformer_to_input_indices.get(name, [])
        parts.append((name, inner, graph.columns(frame, list(indices))))
    made: Frame = []
    for name, inner, given in parts:
        added = transform(graph, inner, given) if given else []
        weight = (step.transformer_weights or {}).get(name)
        if added and weight is not None:
            numbers = graph.matrix(added)
            added = [graph.number("Mul", numbers, float(weight), width=numbers.width)]
        made += added
    return made


# --- numbers ----------------------------------------------------------------------------------------------


@converter("StandardScaler", "RobustScaler", "MinMaxScaler", "MaxAbsScaler", method="transform")
def _scaler(graph: Graph, step: Any, frame: Frame) -> Numbers:
    numbers = graph.matrix(frame)
    width = numbers.width
    if hasattr(step, "min_"):
        numbers = graph.number("Mul", numbers, step.scale_, width=width)
        numbers = graph.number("Add", numbers, step.min_, width=width)
        if step.clip:
            least, most = (graph.constant(bound) for bound in step.feature_range)
            numbers = graph.number("Clip", numbers, least, most, width=width)
        return numbers
    centre = getattr(step, "mean_", None) if getattr(step, "with_mean", False) else None
    centre = step.center_ if getattr(step, "with_centering", False) else centre
    if centre is not None:
        numbers = graph.number("Sub", numbers, centre, width=width)
    if step.scale_ is not None and getattr(step, "with_std", True) and getattr(step, "with_scaling", True):
        numbers = graph.number("Div", numbers, step.scale_, width=width)
    return numbers


@converter("StandardScaler", "RobustScaler", "MinMaxScaler", "MaxAbsScaler", method="inverse")
def _scaler_inverse(graph: Graph, step: Any, values: Numbers) -> Numbers:
    ends = np.asarray(step.inverse_transform(np.array([[0.0] * values.width, [1.0] * values.width])))
    return graph.number("Add", graph.number("Mul", values, ends[1] - ends[0], width=1), ends[0], width=1)


@converter("SimpleImputer", method="transform")
def _imputer(graph: Graph, step: Any, frame: Frame) -> Frame:
    # A column without any value in training is dropped.
    kept = [at for at, value in enumerate(step.statistics_) if not is_missing(value)]
    made: Frame = []
    place, sought = 0, step.missing_values
    for part in graph.columns(frame, kept):
        values = [step.statistics_[at] for at in kept[place : place + part.width]]
        place += part.width
        if isinstance(part, Words):
            meanings = {
                word: values[0] if is_missing(meaning) and is_missing(sought) else meaning
                for word, meaning in part.meanings.items()
            }
            if isinstance(sought, str):
                meanings[sought] = values[0]
            made.append(Words(part.tensor, part.known, meanings))
            continue
        test = ["IsNaN", part.tensor] if is_missing(sought) else ["Equal", part.tensor, float(sought)]
        made.append(graph.number("Where", graph.node(*test), np.array(values, float), part, width=part.width))
    indicated = step.indicator_.features_ if step.add_indicator else []
    return made + [graph.table(graph.columns(frame, [at])[0], [sought], [[1.0], [0.0]]) for at in indicated]


@converter("MissingIndicator", method="transform")
def _indicator(graph: Graph, step: Any, frame: Frame) -> Frame:
    sought, shape = [step.missing_values], [[1.0], [0.0]]
    return [graph.table(graph.columns(frame, [at])[0], sought, shape) for at in step.features_]


# By NumPy's name: the ONNX operators in order, each with its further inputs.
FUNCTIONS: dict[str, list[tuple[str, list[Any]]]] = {
    "log": [("Log", [])],
    "log1p": [("Add", [1.0]), ("Log", [])],
    "log2": [("Log", []), ("Div", [np.log(2)])],
    "log10": [("Log", []), ("Div", [np.log(10)])],
    "exp": [("Exp", [])],
    "expm1": [("Exp", []), ("Sub", [1.0])],
    "exp2": [("Mul", [np.log(2)]), ("Exp", [])],
    "sqrt": [("Sqrt", [])],
    "square": [("Pow", [2.0])],
    "absolute": [("Abs", [])],
    "fabs": [("Abs", [])],
    "negative": [("Neg", [])],
    "reciprocal": [("Reciprocal", [])],
    "sign": [("Sign", [])],
    "sin": [("Sin", [])],
    "cos": [("Cos", [])],
    "tanh": [("Tanh", [])],
    "floor": [("Floor", [])],
    "ceil": [("Ceil", [])],
    "expit": [("Neg", []), ("Exp", []), ("Add", [1]), ("Reciprocal", [])],  # as Graph.sigmoid
    "check_array": [],  # only checks the numbers
    "identity": [],
}


def applied(graph: Graph, function: Any, numbers: Numbers) -> Numbers:
    """A NumPy function applied to each number; raises Unsupported for other functions."""
    function = getattr(function, "func", function)
    name = getattr(function, "__name__", "")
    known = isinstance(function, np.ufunc) or getattr(function, "__module__", "").startswith("sklearn.")
    if function is None or not known or name not in FUNCTIONS:
        if function is None:
            return numbers
        raise Unsupported(f"the function {name or type(function).__name__} has no ONNX form")
    for operator, others in FUNCTIONS[name]:
        numbers = graph.number(operator, numbers, *others, width=numbers.width)
    return numbers


@converter("FunctionTransformer", method="transform")
def _function(graph: Graph, step: Any, frame: Frame) -> Frame:
    if step.func is None:
        return frame
    if step.kw_args or any(isinstance(part, Words) for part in frame):
        raise Unsupported(f"the function {getattr(step.func, '__name__', '')} has no ONNX form")
    return [applied(graph, step.func, graph.matrix(frame))]


@converter("FunctionTransformer", method="inverse")
def _function_inverse(graph: Graph, step: Any, values: Numbers) -> Numbers:
    return applied(graph, step.inverse_func, values)


@converter("SelectorMixin", method="transform")
def _selector(graph: Graph, step: Any, frame: Frame) -> Frame:
    return graph.columns(frame, np.flatnonzero(step.get_support()).tolist())


@converter("KBinsDiscretizer", method="transform")
def _bins(graph: Graph, step: Any, frame: Frame) -> Frame:
    numbers, made = graph.matrix(frame), []
    for at, edges in enumerate(step.bin_edges_):
        reached = graph.node("GreaterOrEqual", graph.select(numbers, [at]).tensor, edges[None, 1:-1])
        counted = graph.node(
            "ReduceSum", graph.cast(reached, np.float64), graph.constant([1], np.int64), keepdims=1
        )
        column, bins = Numbers(counted, 1), len(edges) - 1
        if step.encode != "ordinal":
            column = graph.table(column, range(bins), np.eye(bins + 1, bins))
        made.append(column)
    return [graph.matrix(list(made))]


@converter("QuantileTransformer", method="inverse")
def _quantiles(graph: Graph, step: Any, values: Numbers) -> Numbers:
    if step.output_distribution == "normal":
        root = graph.cast(graph.node("Mul", values.tensor, np.sqrt(0.5)), np.float32)
        error = graph.cast(graph.node("Erf", root), np.float64)
        values = graph.affine(Numbers(error, 1), [[0.5]], 0.5)
    return interpolated(graph, values, step.references_, step.quantiles_[:, 0])


def interpolated(graph: Graph, values: Numbers, xs: Any, ys: Any) -> Numbers:
    """Piecewise linear between points (xs ascending), constant beyond them."""
    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    kept = np.flatnonzero(np.diff(xs) > 0)
    if not len(kept):
        return graph.affine(values, [[0.0]], ys[:1])
    share = graph.node("Div", graph.node("Sub", values.tensor, xs[kept][None, :]), np.diff(xs)[kept][None, :])
    share = graph.node("Clip", share, graph.constant(0.0), graph.constant(1.0))
    return graph.affine(Numbers(share, len(kept)), np.diff(ys)[kept][:, None], ys[:1])


# --- categories -------------------------------------------------------------------------------------------


@converter("OneHotEncoder", "OrdinalEncoder", "TargetEncoder", "BaseEncoder", method="transform")
def _encoder(graph: Graph, step: Any, frame: Frame) -> Frame:
    if hasattr(step, "categories_"):
        return encoded(graph, step, frame, [list(one) for one in step.categories_])
    # From category_encoders: encodes text columns and passes the others through.
    names, outputs = list(step.feature_names_in_), list(step.get_feature_names_out())
    places = [part for part in frame for _ in range(part.width)]
    if any(isinstance(part, Words) != (name in step.cols) for part, name in zip(places, names, strict=True)):
        raise Unsupported(f"{type(step).__name__} encodes numbers, or leaves words")
    keys = [[*part.known, MISSING] if isinstance(part, Words) else [] for part in places]
    passed = {outputs.index(name): at for at, name in enumerate(names) if name not in step.cols}
    return encoded(graph, step, frame, keys, passed)


def encoded(
    graph: Graph, step: Any, frame: Frame, keys: Sequence[Sequence[Any]], passed: dict[int, int] | None = None
) -> Frame:
    """A step whose outputs each depend on one column: ask it for all keys, and store the answers in a table.

    `passed` are outputs that are a column as it came: the output's place, and the column's.
    """
    import pandas as pd

    names = list(getattr(step, "feature_names_in_", range(len(keys))))
    words = [any(isinstance(key, str) for key in known) for known in keys]
    base = [known[0] if len(known) else 0.0 for known in keys]

    def asked(at: int, values: Sequence[Any]) -> Any:
        columns = [[value] * len(values) for value in base]
        columns[at] = list(values)
        series = [
            pd.Series(one, dtype=object if text else None) for one, text in zip(columns, words, strict=True)
        ]
        rows = pd.DataFrame(dict(zip(names, series, strict=True)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = step.transform(rows if hasattr(step, "feature_names_in_") else rows.to_numpy())
        return np.asarray(found.toarray() if hasattr(found, "toarray") else found, np.float64)

    usual = asked(0, base[:1])[0]
    if sum(map(len, keys)) * len(usual) > MAX_TABLE:
        raise Unsupported(f"{type(step).__name__} has too many categories for a table in ONNX")
    tables, owner = [], np.zeros(len(usual), int)
    for at, known in enumerate(keys):
        rows = asked(at, known) if len(known) else usual[None]
        unseen = (
            UNSEEN
            if words[at]
            else 1.0 + max((float(key) for key in known if not is_missing(key)), default=0.0)
        )
        try:
            rows = np.vstack([rows, asked(at, [unseen])])
        except Exception:  # it refuses categories that it does not know, as the contract does
            varies = ~np.all((rows == usual) | (np.isnan(rows) & np.isnan(usual)), axis=0)
            rows = np.vstack([rows, np.where(varies, MISSING, usual)])
        own = ~np.all((rows == usual) | (np.isnan(rows) & np.isnan(usual)), axis=0)
        if (owner[own] > 0).any():
            raise Unsupported(f"{type(step).__name__} looks at several columns for one of its own")
        owner[own] = at + 1
        tables.append(rows)
    encoded_columns = [at for at, known in enumerate(keys) if len(known)]
    owner[owner == 0] = encoded_columns[0] + 1  # the same for every row
    parts: Frame = []
    order: list[int] = []
    for at in encoded_columns:
        own = np.array([out for out in np.flatnonzero(owner == at + 1) if out not in (passed or {})], int)
        if len(own):
            (column,) = graph.columns(frame, [at])
            parts.append(graph.table(column, keys[at], tables[at][:, own]))
            order += own.tolist()
    for out, at in (passed or {}).items():
        parts += graph.columns(frame, [at])
        order.append(out)
    return [graph.select(graph.matrix(parts), np.argsort(order).tolist())]


# --- linear -----------------------------------------------------------------------------------------------


@converter("LinearClassifierMixin", method="decision")
def _linear_decision(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return graph.affine(graph.matrix(frame), np.atleast_2d(model.coef_).T, model.intercept_)


@converter("LogisticRegression", "LinearDiscriminantAnalysis")
def _logistic(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return graph.scores(decision(graph, model, frame))


@converter("SGDClassifier")
def _gradient_descent(graph: Graph, model: Any, frame: Frame) -> Numbers:
    if model.loss != "log_loss":
        raise Unsupported(f"SGDClassifier of loss {model.loss} has no ONNX form")
    raw = decision(graph, model, frame)
    scores = graph.sigmoid(raw)
    return graph.both(scores) if raw.width == 1 else graph.normalised(scores, otherwise=1 / raw.width)


@converter("LinearModel", "BaseSGDRegressor")
def _linear(graph: Graph, model: Any, frame: Frame) -> Numbers:
    weights = np.atleast_2d(model.coef_).T
    if weights.shape[1] != 1:
        raise Unsupported("several targets have no ONNX form")
    return graph.affine(graph.matrix(frame), weights, model.intercept_)


@converter("_GeneralizedLinearRegressor")
def _generalised(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return linked(graph, model._base_loss.link, _linear(graph, model, frame))


@converter("BaseSVC", method="decision")
def _vectors(graph: Graph, model: Any, frame: Frame) -> Numbers:
    if model.probability is True or model.decision_function_shape != "ovr":
        raise Unsupported("the decision function of an SVC with probability=True has no ONNX form")
    scores = foreign(graph, model, frame, raw_scores=True)
    return graph.select(scores, [1]) if scores.width == BINARY else scores


# --- models of models -------------------------------------------------------------------------------------


def _mean(graph: Graph, parts: list[Numbers], weights: Any = None) -> Numbers:
    width = parts[0].width
    if weights is not None:
        weights = np.asarray(weights, np.float64)
        parts = [
            graph.number("Mul", part, weight, width=width)
            for part, weight in zip(parts, weights, strict=True)
        ]
    total = graph.number("Sum", *parts, width=width)
    return graph.number("Div", total, float(len(parts) if weights is None else weights.sum()), width=width)


@converter("VotingClassifier", "VotingRegressor")
def _voting(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return _mean(graph, [answer(graph, one, frame) for one in model.estimators_], model._weights_not_none)


@converter("BaggingClassifier", "BaggingRegressor")
def _bagging(graph: Graph, model: Any, frame: Frame) -> Numbers:
    parts = [
        answer(graph, one, graph.columns(frame, list(chosen)))
        for one, chosen in zip(model.estimators_, model.estimators_features_, strict=True)
    ]
    if len({part.width for part in parts} | {len(getattr(model, "classes_", [0]))}) > 1:
        raise Unsupported("a bag in which some models do not know all labels has no ONNX form")
    return _mean(graph, parts)


@converter("StackingClassifier", "StackingRegressor")
def _stacking(graph: Graph, model: Any, frame: Frame) -> Numbers:
    made: Frame = []
    methods = [method for method in model.stack_method_ if method]
    for one, method in zip(model.estimators_, methods, strict=True):
        if method == "predict" and hasattr(one, "classes_"):
            raise Unsupported("a stack of labels has no ONNX form")
        found = (decision if method == "decision_function" else answer)(graph, one, frame)
        if method == "predict_proba" and len(model.classes_) == BINARY:
            found = graph.select(found, [1])
        made.append(found)
    return answer(graph, model.final_estimator_, [*made, *(frame if model.passthrough else [])])


@converter("OneVsRestClassifier")
def _one_vs_rest(graph: Graph, model: Any, frame: Frame) -> Numbers:
    if model.multilabel_ or any(not hasattr(one, "classes_") for one in model.estimators_):
        raise Unsupported("OneVsRestClassifier of several or constant labels has no ONNX form")
    scores = graph.matrix([graph.select(answer(graph, one, frame), [1]) for one in model.estimators_])
    return graph.both(scores) if scores.width == 1 else graph.normalised(scores)


@converter("RFE")
def _eliminated(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return answer(graph, model.estimator_, graph.columns(frame, np.flatnonzero(model.support_).tolist()))


@converter("TransformedTargetRegressor")
def _target(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return inverse(graph, model.transformer_, answer(graph, model.regressor_, frame))


@converter("CalibratedClassifierCV")
def _calibrated(graph: Graph, model: Any, frame: Frame) -> Numbers:
    asked: dict[int, Numbers] = {}
    parts = []
    for one in model.calibrated_classifiers_:
        inner = one.estimator
        if id(inner) not in asked:
            asked[id(inner)] = decision(graph, inner, frame)
        parts.append(_one_calibrated(graph, one, asked[id(inner)], unwrapped(inner)))
    return _mean(graph, parts) if len(parts) > 1 else parts[0]


def _one_calibrated(graph: Graph, one: Any, raw: Numbers, inner: Any) -> Numbers:
    labels = len(one.classes)
    if one.method == "temperature":
        logits = raw
        if raw.width == 1 and not hasattr(inner, "decision_function"):
            logits = graph.both(raw)
        elif raw.width == 1:
            logits = graph.number("Concat", graph.node("Neg", raw.tensor), raw, width=2, axis=1)
        if not hasattr(inner, "decision_function"):
            logits = graph.number("Log", graph.node("Add", logits.tensor, 1e-12), width=labels)
        scaled = graph.number("Mul", logits, float(one.calibrators[0].beta_), width=labels)
        return graph.number("Softmax", scaled, width=labels, axis=1)
    if list(inner.classes_) != list(one.classes):
        raise Unsupported("a calibration in which some models do not know all labels has no ONNX form")
    scores = []
    for at, calibrator in enumerate(one.calibrators):
        column = graph.select(raw, [at])
        if hasattr(calibrator, "a_"):
            line = graph.affine(column, [[-calibrator.a_]], -calibrator.b_)
            scores.append(graph.sigmoid(line))
        else:
            scores.append(interpolated(graph, column, calibrator.X_thresholds_, calibrator.y_thresholds_))
    if labels == BINARY:
        return graph.both(scores[0])
    return graph.normalised(graph.matrix(list(scores)), otherwise=1 / labels)
