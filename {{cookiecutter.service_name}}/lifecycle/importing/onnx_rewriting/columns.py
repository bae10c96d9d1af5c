"""scikit-learn's transformers: the preparation of columns, pipelines, and the ways back of targets."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.graph import (
    MISSING,
    Frame,
    Graph,
    Numbers,
    Unsupported,
    Words,
    answer,
    converter,
    decision,
    inverse,
    transform,
)

MAX_TABLE = 20_000_000  # numbers that an encoder is asked for, to know what it makes of each category
UNSEEN = "a word that nobody has written"

# --- steps made of steps ----------------------------------------------------------------------------------


def prepared(graph: Graph, pipeline: Any, frame: Frame) -> Frame:
    """The frame after all steps but the last. imblearn's samplers only work while a model is fitted."""
    for _, step in pipeline.steps[:-1]:
        if not hasattr(step, "fit_resample"):
            frame = transform(graph, step, frame)
    return frame


@converter("Pipeline", method="transform")
def _pipeline(graph: Graph, pipeline: Any, frame: Frame) -> Frame:
    return transform(graph, pipeline.steps[-1][1], prepared(graph, pipeline, frame))


@converter("Pipeline")
def _pipeline_answer(graph: Graph, pipeline: Any, frame: Frame) -> Numbers:
    return answer(graph, pipeline.steps[-1][1], prepared(graph, pipeline, frame))


@converter("Pipeline", method="decision")
def _pipeline_decision(graph: Graph, pipeline: Any, frame: Frame) -> Numbers:
    return decision(graph, pipeline.steps[-1][1], prepared(graph, pipeline, frame))


@converter("Pipeline", method="inverse")
def _pipeline_inverse(graph: Graph, pipeline: Any, values: Numbers) -> Numbers:
    for _, step in reversed(pipeline.steps):
        values = inverse(graph, step, values)
    return values


@converter("ColumnTransformer", method="transform")
def _column_transformer(graph: Graph, step: Any, frame: Frame) -> Frame:
    made: Frame = []
    for name, inner, _ in step.transformers_:
        indices = step._transformer_to_input_indices.get(name, [])
        if len(indices) and not (isinstance(inner, str) and inner == "drop"):
            made += _weighted(graph, step, name, transform(graph, inner, graph.columns(frame, list(indices))))
    return made


@converter("FeatureUnion", method="transform")
def _feature_union(graph: Graph, step: Any, frame: Frame) -> Frame:
    made: Frame = []
    for name, inner in step.transformer_list:
        if inner != "drop":
            made += _weighted(graph, step, name, transform(graph, inner, frame))
    return made


def _weighted(graph: Graph, step: Any, name: str, frame: Frame) -> Frame:
    weight = (step.transformer_weights or {}).get(name)
    if weight is None:
        return frame
    numbers = graph.matrix(frame)
    return [graph.number("Mul", numbers, float(weight), width=numbers.width)]


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
    made: Frame = []
    statistics = list(step.statistics_)
    indicated = set(step.indicator_.features_) if step.add_indicator else set()
    indicators: Frame = []
    for at, column in enumerate(graph.columns(frame, [index]) for index in range(len(statistics))):
        (one,) = column
        value, sought = statistics[at], step.missing_values
        if at in indicated:
            indicators.append(_is(graph, one, sought))
        if not isinstance(value, str) and (value is None or np.isnan(float(value))):
            continue  # it had no value in training, and is left out
        if isinstance(one, Words):
            meanings = {
                word: value if _same(meaning, sought) else meaning for word, meaning in one.meanings.items()
            }
            if isinstance(sought, str):
                meanings[sought] = value
            made.append(Words(one.tensor, one.known, meanings))
        else:
            made.append(one)
    numbers = [index for index, one in enumerate(made) if isinstance(one, Numbers)]
    if numbers and len(numbers) == len(made):  # all of them at once
        kept = [at for at, value in enumerate(statistics) if not np.isnan(float(value))]
        found = graph.select(graph.matrix(frame), kept)
        made = [_filled(graph, found, step.missing_values, np.array([float(statistics[at]) for at in kept]))]
    else:
        kept = [
            at for at, value in enumerate(statistics) if isinstance(value, str) or not np.isnan(float(value))
        ]
        for index in numbers:
            made[index] = _filled(graph, made[index], step.missing_values, float(statistics[kept[index]]))
    return made + indicators


@converter("MissingIndicator", method="transform")
def _indicator(graph: Graph, step: Any, frame: Frame) -> Frame:
    return [_is(graph, graph.columns(frame, [at])[0], step.missing_values) for at in step.features_]


def _same(first: Any, second: Any) -> bool:
    return bool(first == second) or (first != first and (second is None or second != second))


def _is(graph: Graph, column: Any, sought: Any) -> Numbers:
    """1 where the column holds the value, else 0."""
    return graph.table(column, [sought], [[1.0], [0.0]])


def _filled(graph: Graph, numbers: Any, sought: Any, value: Any) -> Numbers:
    if sought is None or sought != sought:  # NaN
        where = graph.node("IsNaN", numbers.tensor)
    else:
        where = graph.node("Equal", numbers.tensor, float(sought))
    return graph.number("Where", where, value, numbers, width=numbers.width)


# By NumPy's name: operators of ONNX one after the other, each with what it takes beside the numbers.
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
    "expit": [("Sigmoid", [])],
    "check_array": [],  # it looks at the numbers, and hands them on
    "identity": [],
}


def applied(graph: Graph, function: Any, numbers: Numbers) -> Numbers:
    """A function of NumPy on each number; raises Unsupported for any other."""
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
    if step.kw_args:
        raise Unsupported("a function with kw_args has no ONNX form")
    return [applied(graph, step.func, graph.matrix(frame))]


@converter("FunctionTransformer", method="inverse")
def _function_inverse(graph: Graph, step: Any, values: Numbers) -> Numbers:
    return applied(graph, step.inverse_func, values)


@converter("PCA", "TruncatedSVD", method="transform")
def _components(graph: Graph, step: Any, frame: Frame) -> Numbers:
    weights = step.components_.T
    if getattr(step, "whiten", False):
        weights = weights / np.sqrt(step.explained_variance_)
    mean = getattr(step, "mean_", None)
    bias = np.zeros(weights.shape[1]) if mean is None else -mean @ weights
    return graph.affine(graph.matrix(frame), weights, bias)


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


@converter("PowerTransformer", method="inverse")
def _power_inverse(graph: Graph, step: Any, values: Numbers) -> Numbers:
    if step.standardize:
        values = _scaler_inverse(graph, step._scaler, values)
    (power,) = step.lambdas_

    def raised(base: str, exponent: float, offset: float) -> str:
        return graph.node("Sub", graph.node("Pow", base, exponent), offset)

    scaled = graph.node("Add", graph.node("Mul", values.tensor, power), 1.0)
    if step.method == "box-cox":
        found = graph.node("Exp", values.tensor) if power == 0 else graph.node("Pow", scaled, 1 / power)
        return Numbers(found, 1)
    above = (
        raised(graph.node("Exp", values.tensor), 1.0, 1.0) if power == 0 else raised(scaled, 1 / power, 1.0)
    )
    if power == 2:
        below = graph.node("Sub", 1.0, graph.node("Exp", graph.node("Neg", values.tensor)))
    else:
        base = graph.node("Sub", 1.0, graph.node("Mul", values.tensor, 2 - power))
        below = graph.node("Sub", 1.0, graph.node("Pow", base, 1 / (2 - power)))
    positive = graph.node("GreaterOrEqual", values.tensor, 0.0)
    return graph.number("Where", positive, above, below, width=1)


# --- categories -------------------------------------------------------------------------------------------


@converter("OneHotEncoder", "OrdinalEncoder", "TargetEncoder", method="transform")
def _encoder(graph: Graph, step: Any, frame: Frame) -> Frame:
    return encoded(graph, step, frame, [list(one) for one in step.categories_])


def encoded(
    graph: Graph, step: Any, frame: Frame, keys: Sequence[Sequence[Any]], passed: dict[int, int] | None = None
) -> Frame:
    """A step whose every output looks at one column: ask it about all keys of each, and keep the answers.

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
        unseen = UNSEEN if words[at] else 1.0 + max((float(key) for key in known if key == key), default=0.0)
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
