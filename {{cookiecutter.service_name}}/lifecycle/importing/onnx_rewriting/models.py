"""scikit-learn's models but for trees: linear ones, and those that are made of others."""

from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.columns import interpolated
from lifecycle.importing.onnx_rewriting.graph import (
    Frame,
    Graph,
    Numbers,
    Unsupported,
    answer,
    converter,
    decision,
    foreign,
    inverse,
    unwrapped,
)
from lifecycle.importing.onnx_rewriting.trees import linked

BINARY = 2

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
    scores = graph.number("Sigmoid", raw, width=raw.width)
    return graph.both(scores) if raw.width == 1 else graph.normalised(scores)


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


@converter("SVR", "NuSVR")
def _vector_regressor(graph: Graph, model: Any, frame: Frame) -> Numbers:
    numbers, gamma, vectors = graph.matrix(frame), float(model._gamma), model.support_vectors_
    products = graph.node("MatMul", numbers.tensor, vectors.T)
    if model.kernel == "rbf":
        squares = graph.node("ReduceSumSquare", numbers.tensor, graph.constant([1], np.int64), keepdims=1)
        both = graph.node("Add", squares, (vectors**2).sum(axis=1))
        distances = graph.node("Sub", both, graph.node("Mul", products, 2.0))
        products = graph.node("Exp", graph.node("Mul", distances, -gamma))
    elif model.kernel in ("poly", "sigmoid"):
        products = graph.node("Add", graph.node("Mul", products, gamma), float(model.coef0))
        if model.kernel == "poly":
            products = graph.node("Pow", products, float(model.degree))
        else:
            products = graph.node("Tanh", products)
    elif model.kernel != "linear":
        raise Unsupported("a kernel of one's own has no ONNX form")
    return graph.affine(Numbers(products, len(vectors)), model.dual_coef_.T, model.intercept_)


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
            scores.append(graph.number("Sigmoid", line, width=1))
        else:
            scores.append(interpolated(graph, column, calibrator.X_thresholds_, calibrator.y_thresholds_))
    if labels == BINARY:
        return graph.both(scores[0])
    return graph.normalised(graph.matrix(list(scores)), otherwise=1 / labels)
