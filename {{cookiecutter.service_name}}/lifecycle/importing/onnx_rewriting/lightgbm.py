"""LightGBM: the trees of its boosters, on numbers and on pandas' categories, with any column names."""

from typing import Any

from lifecycle.importing.onnx_rewriting.graph import MISSING, Frame, Graph, Numbers, Unsupported, converter
from lifecycle.importing.onnx_rewriting.trees import Split, ensemble, grown

EXPONENTIAL = ("poisson", "gamma", "tweedie")
PLAIN = ("regression", "regression_l1", "huber", "fair", "quantile", "mape")


@converter("LGBMModel")
def _model(graph: Graph, model: Any, frame: Frame) -> Numbers:
    return booster(graph, model.booster_, frame)


@converter("Booster")
def booster(graph: Graph, model: Any, frame: Frame) -> Numbers:
    """Probabilities or values, by the booster's objective."""
    document = model.dump_model()
    targets = document["num_tree_per_iteration"]
    made = [grown(one["tree_structure"], _node, at % targets) for at, one in enumerate(document["tree_info"])]
    raw = ensemble(graph, graph.matrix(_coded(graph, model, frame)), made, targets)
    if document["average_output"]:
        raw = graph.number("Div", raw, len(made) / targets, width=targets)
    objective, *settings = document.get("objective", "none").split()
    factor = next((float(one[8:]) for one in settings if one.startswith("sigmoid:")), 1.0)
    if objective in ("binary", "cross_entropy"):
        return graph.scores(graph.number("Mul", raw, factor, width=1))
    if objective == "multiclass":
        return graph.scores(raw)
    if objective == "multiclassova":
        scaled = graph.number("Mul", raw, factor, width=targets)
        return graph.sigmoid(scaled)
    if objective in EXPONENTIAL:
        return graph.number("Exp", raw, width=1)
    if objective in PLAIN and "sqrt" not in settings:
        return raw
    raise Unsupported(f"LightGBM's objective {objective} has no ONNX form")


def _coded(graph: Graph, model: Any, frame: Frame) -> Frame:
    """Words as the codes of pandas' categories; an unknown word is missing."""
    categories = iter(model.pandas_categorical or [])
    made: Frame = []
    for part in frame:
        if isinstance(part, Numbers):
            made.append(part)
            continue
        known = next(categories, None)
        if known is None:
            raise Unsupported("LightGBM does not say which number each word had")
        made.append(graph.table(part, known, [*([code] for code in range(len(known))), [MISSING]]))
    if next(categories, None) is not None:
        raise Unsupported("LightGBM on categories that are numbers has no ONNX form")
    return made


def _node(node: dict[str, Any]) -> Split | float:
    if "leaf_coeff" in node:
        raise Unsupported("LightGBM's linear trees have no ONNX form")
    if "leaf_value" in node:
        return float(node["leaf_value"])
    feature, threshold = node["split_feature"], node["threshold"]
    left, right = node["left_child"], node["right_child"]
    if node["decision_type"] == "==":
        return Split(feature, threshold.split("||"), False, left, right, "BRANCH_EQ")
    missing = node["default_left"] if node["missing_type"] != "None" else threshold >= 0
    if node["missing_type"] == "Zero" and missing != (threshold >= 0):
        raise Unsupported("LightGBM with zero_as_missing has no ONNX form")
    return Split(feature, [threshold], missing, left, right)
