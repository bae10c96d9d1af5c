"""XGBoost: the trees of its boosters, on numbers and on pandas' categories, with any column names."""

import json
from itertools import pairwise
from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.graph import MISSING, Frame, Graph, Numbers, Unsupported, converter
from lifecycle.importing.onnx_rewriting.trees import Split, Tree, ensemble, floats, grown

LOGISTIC = ("binary:logistic", "reg:logistic", "binary:logitraw")
EXPONENTIAL = ("count:poisson", "reg:gamma", "reg:tweedie")
PLAIN = (
    "reg:squarederror", "reg:linear", "reg:absoluteerror", "reg:pseudohubererror", "reg:quantileerror",
    "reg:squaredlogerror",
)  # fmt: skip


@converter("XGBModel")
def _model(graph: Graph, model: Any, frame: Frame) -> Numbers:
    if model.missing is not None and not np.isnan(model.missing):
        raise Unsupported("XGBoost with a `missing` of its own has no ONNX form")
    return booster(graph, model.get_booster(), frame)


@converter("Booster")
def booster(graph: Graph, model: Any, frame: Frame) -> Numbers:
    """Probabilities or values, by the booster's objective."""
    learner = json.loads(model.save_raw("json"))["learner"]
    boosted = learner["gradient_booster"]
    weights = boosted.get("weight_drop")
    boosted = boosted.get("gbtree", boosted)
    if "trees" not in boosted.get("model", {}):
        raise Unsupported(f"XGBoost's {boosted.get('name')} has no ONNX form")
    forest = boosted["model"]
    last = learner["attributes"].get("best_iteration")
    count = len(forest["trees"]) if last is None else forest["iteration_indptr"][int(last) + 1]
    trees = forest["trees"][:count]
    if any(int(one["tree_param"]["size_leaf_vector"]) > 1 for one in trees):
        raise Unsupported("XGBoost's trees of several targets have no ONNX form")
    factors = weights or [1.0] * count
    made = [
        _tree(one, target, factor)
        for one, target, factor in zip(trees, forest["tree_info"][:count], factors[:count], strict=True)
    ]
    targets = max(1, int(learner["learner_model_param"]["num_class"]))
    start = np.array(json.loads(f"[{learner['learner_model_param']['base_score'].strip('[]')}]"), np.float64)
    objective = learner["objective"]["name"]
    if objective in LOGISTIC:
        start = np.log(start / (1 - start))
    elif objective in EXPONENTIAL:
        start = np.log(start)
    numbers = floats(graph, graph.matrix(_coded(graph, forest.get("cats"), frame)))
    raw = graph.number("Add", ensemble(graph, numbers, made, targets), start, width=targets)
    if objective.startswith(("binary:logistic", "multi:soft")):
        return graph.scores(raw)
    if objective == "reg:logistic":
        return graph.sigmoid(raw)
    if objective in EXPONENTIAL:
        return graph.number("Exp", raw, width=1)
    if objective in PLAIN:
        return raw
    raise Unsupported(f"XGBoost's objective {objective} has no ONNX form")


def _coded(graph: Graph, categories: Any, frame: Frame) -> Frame:
    """Columns of pandas' categories as their codes; an unknown category is missing."""
    made: Frame = []
    places = [(part, at) for part in frame for at in range(part.width)]
    encodings = (categories or {}).get("enc") or [{}] * len(places)
    for column, encoding in enumerate(encodings):
        known = encoding.get("values") or []
        if offsets := encoding.get("offsets"):
            text = bytes(known)
            known = [text[start:end].decode() for start, end in pairwise(offsets)]
        (part,) = graph.columns(frame, [column])
        if known:
            part = graph.table(part, known, [*([code] for code in range(len(known))), [MISSING]])
        made.append(part)
    return frame if all(not one.get("values") for one in encodings) else made


def _tree(tree: dict[str, Any], target: int, factor: float) -> Tree:
    single = np.array(tree["split_conditions"], np.float32).astype(np.float64)
    left, right = tree["left_children"], tree["right_children"]
    segments = zip(
        tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True
    )
    members = {node: tree["categories"][start : start + size] for node, start, size in segments}

    def read(at: int) -> Split | float:
        if left[at] < 0:
            return float(single[at]) * factor
        feature, missing = tree["split_indices"][at], bool(tree["default_left"][at])
        if not tree["split_type"][at]:
            return Split(feature, [single[at]], missing, left[at], right[at], "BRANCH_LT")
        chosen = Split(feature, members[at], False, right[at], left[at], "BRANCH_EQ")
        # A missing value follows the categories, because NaN is not less than infinity.
        return chosen if missing else Split(feature, [np.inf], False, chosen, right[at], "BRANCH_LT")

    return grown(0, read, target)
