"""Trees: the trees of scikit-learn, and the ONNX operator for the trees of all libraries.

Tree(splits, leaves) ... -> ensemble() -> the sum of the leaves that a row reaches [rows, targets]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.graph import (
    Frame,
    Graph,
    Numbers,
    Unsupported,
    converter,
    decision,
    transform,
)


@dataclass(frozen=True)
class Tree:
    """Arrays over the nodes, the root first. A leaf is a node whose `yes` is -1."""

    feature: Any
    threshold: Any
    yes: Any  # next node if the feature is at most (or: less than, equal to) the threshold
    no: Any
    missing: Any  # whether a missing value goes to `yes`
    values: Any  # leaf values, [nodes, targets]
    target: int = 0  # index of its first target in the answer
    mode: Any = "BRANCH_LEQ"  # of all splits, or an array


def ensemble(
    graph: Graph, numbers: Numbers, trees: Sequence[Tree], targets: int, *, centred: bool = True
) -> Numbers:
    """The sum over the trees, [rows, targets].

    The operator answers in single precision. So the mean of a tree's leaves is added afterwards, in double:
    `centred`, but for probabilities, where 0 and 1 have to be exact.
    """
    from onnx import numpy_helper

    sizes = [len(one.feature) for one in trees]
    ids = np.concatenate([np.arange(size) for size in sizes])
    numbers_of_trees = np.repeat(np.arange(len(trees)), sizes)
    leaf = np.concatenate([one.yes for one in trees]) < 0
    modes = np.concatenate([np.broadcast_to(np.asarray(one.mode, object), len(one.feature)) for one in trees])
    modes[leaf] = "LEAF"
    base, rows, columns, weights = np.zeros(targets), [], [], []
    for start, one in zip(np.cumsum([0, *sizes[:-1]]), trees, strict=True):
        where = np.flatnonzero(np.asarray(one.yes) < 0)
        values = np.asarray(one.values, np.float64)[where]
        width = values.shape[1]
        if width == 1:
            shared = values.mean() if centred else 0.0
            base[one.target] += shared
            at, column, kept = where, np.zeros(len(where), int), (values - shared).ravel()
        else:
            at, column = np.nonzero(values)
            at, kept = where[at], values[at, column]
        rows.append(at + start)
        columns.append(column + one.target)
        weights.append(kept)
    reached = np.concatenate(rows)

    def joined(name: str, kept: Any = 0) -> Any:
        return np.where(leaf, kept, np.concatenate([getattr(one, name) for one in trees]))

    def doubles(values: Any) -> Any:
        return numpy_helper.from_array(np.asarray(values, np.float64))

    output = graph.node(
        "TreeEnsembleRegressor", numbers.tensor, domain="ai.onnx.ml", n_targets=targets,
        nodes_treeids=numbers_of_trees.tolist(), nodes_nodeids=ids.tolist(),
        nodes_featureids=joined("feature").tolist(), nodes_modes=modes.tolist(),
        nodes_truenodeids=joined("yes").tolist(), nodes_falsenodeids=joined("no").tolist(),
        nodes_missing_value_tracks_true=joined("missing").astype(int).tolist(),
        nodes_values_as_tensor=doubles(joined("threshold", 0.0)),
        target_treeids=numbers_of_trees[reached].tolist(), target_nodeids=ids[reached].tolist(),
        target_ids=np.concatenate(columns).tolist(),
        target_weights_as_tensor=doubles(np.concatenate(weights)),
    )  # fmt: skip
    return graph.number("Add", graph.cast(output, np.float64), base, width=targets)


@dataclass(frozen=True)
class Split:
    """An inner node; `yes` and `no` are nodes of the library, or splits."""

    feature: int
    values: Sequence[float]  # a row goes to `yes` if the comparison with any of them is true
    missing: bool  # whether a missing value goes to `yes`
    yes: Any
    no: Any
    mode: str = "BRANCH_LEQ"


def grown(root: Any, read: Callable[[Any], Split | float], target: int = 0) -> Tree:
    """A tree of a library without arrays of nodes; `read` returns a split, or the value of a leaf."""
    rows: list[list[Any]] = []  # feature, threshold, yes, no, missing, mode, value

    def grow(node: Any) -> int:
        found = node if isinstance(node, Split) else read(node)
        first = len(rows)
        if not isinstance(found, Split):
            rows.append([0, 0.0, -1, -1, False, "LEAF", found])
            return first
        if not len(found.values):
            return grow(found.no)
        last = first + len(found.values) - 1
        for at, value in enumerate(found.values, first):
            rows.append([found.feature, float(value), 0, at + 1, found.missing, found.mode, 0.0])
        yes = grow(found.yes)
        for row in rows[first : last + 1]:
            row[2] = yes
        rows[last][3] = grow(found.no)
        return first

    grow(root)
    feature, threshold, yes, no, missing, mode, value = map(np.array, zip(*rows, strict=True))
    return Tree(feature, threshold, yes, no, missing, value[:, None], target, mode.astype(object))


def floats(graph: Graph, numbers: Numbers) -> Numbers:
    """The numbers rounded to single precision, as some libraries compare them."""
    return Numbers(graph.cast(graph.cast(numbers.tensor, np.float32), np.float64), numbers.width)


# --- scikit-learn -----------------------------------------------------------------------------------------


def _tree(estimator: Any, values: Any, target: int = 0) -> Tree:
    tree = estimator.tree_
    missing = getattr(tree, "missing_go_to_left", np.zeros(tree.node_count, bool))
    return Tree(
        tree.feature, tree.threshold, tree.children_left, tree.children_right, missing, values, target
    )


@converter("DecisionTreeClassifier", "ForestClassifier")
def _classifier(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    trees = getattr(estimator, "estimators_", [estimator])
    if estimator.n_outputs_ > 1:
        raise Unsupported("several targets have no ONNX form")
    numbers, labels = floats(graph, graph.matrix(frame)), len(estimator.classes_)
    chosen = slice(1, 2) if labels == 2 else slice(None)
    made = [_tree(one, one.tree_.value[:, 0, chosen]) for one in trees]
    scores = ensemble(graph, numbers, made, 1 if labels == 2 else labels, centred=False)
    if len(trees) > 1:
        scores = graph.number("Div", scores, float(len(trees)), width=scores.width)
    return graph.both(scores) if labels == 2 else scores


@converter("DecisionTreeRegressor", "ForestRegressor")
def _regressor(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    trees = getattr(estimator, "estimators_", [estimator])
    if estimator.n_outputs_ > 1:
        raise Unsupported("several targets have no ONNX form")
    made = [_tree(one, one.tree_.value[:, 0] / len(trees)) for one in trees]
    return ensemble(graph, floats(graph, graph.matrix(frame)), made, 1)


@converter("BaseGradientBoosting", method="decision")
def _boosted(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    if not isinstance(estimator.init_, str) and not type(estimator.init_).__name__.startswith("Dummy"):
        raise Unsupported("GradientBoosting with an init of its own has no ONNX form")
    numbers = graph.matrix(frame)
    start = estimator._raw_predict_init(np.zeros((1, numbers.width)))[0]
    made = [
        _tree(tree, tree.tree_.value[:, 0] * estimator.learning_rate, target)
        for stage in estimator.estimators_
        for target, tree in enumerate(stage)
    ]
    raw = ensemble(graph, floats(graph, numbers), made, len(start))
    return graph.number("Add", raw, start, width=len(start))


@converter("BaseHistGradientBoosting", method="decision")
def _histogram(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    if estimator._preprocessor is not None:
        frame = transform(graph, estimator._preprocessor, frame)
    known = estimator._bin_mapper.make_known_categories_bitsets()
    made = [
        grown(0, partial(_histogram_node, known, predictor, predictor.nodes), target)
        for stage in estimator._predictors
        for target, predictor in enumerate(stage)
    ]
    start = estimator._baseline_prediction.ravel()
    raw = ensemble(graph, graph.matrix(frame), made, len(start))
    return graph.number("Add", raw, start, width=len(start))


def _histogram_node(known: Any, predictor: Any, nodes: Any, at: int) -> Split | float:
    node = nodes[at]
    if node["is_leaf"]:
        return float(node["value"])
    feature, missing = int(node["feature_idx"]), bool(node["missing_go_to_left"])
    left, right = int(node["left"]), int(node["right"])
    if not node["is_categorical"]:
        return Split(feature, [node["num_threshold"]], missing, left, right)
    inside = _members(predictor.raw_left_cat_bitsets[node["bitset_idx"]])
    if not missing:
        return Split(feature, sorted(inside), False, left, right, "BRANCH_EQ")
    bits, places = known  # unknown categories follow missing values
    others = sorted(_members(bits[places[feature]]) - inside)
    return Split(feature, others, False, right, left, "BRANCH_EQ")


def _members(bits: Any) -> set[int]:
    return {at for at in range(len(bits) * 32) if bits[at // 32] >> np.uint32(at % 32) & 1}


@converter("GradientBoostingClassifier", "HistGradientBoostingClassifier")
def _boosted_classifier(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    raw = decision(graph, estimator, frame)
    if estimator.loss == "exponential":
        raw = graph.number("Mul", raw, 2.0, width=raw.width)
    return graph.scores(raw)


@converter("GradientBoostingRegressor", "HistGradientBoostingRegressor")
def _boosted_regressor(graph: Graph, estimator: Any, frame: Frame) -> Numbers:
    return linked(graph, estimator._loss.link, decision(graph, estimator, frame))


def linked(graph: Graph, link: Any, raw: Numbers) -> Numbers:
    """The value of a generalised linear model: its inverse link applied to the raw value."""
    name = type(link).__name__
    if name not in ("IdentityLink", "LogLink"):
        raise Unsupported(f"the link {name} has no ONNX form")
    return raw if name == "IdentityLink" else graph.number("Exp", raw, width=raw.width)
