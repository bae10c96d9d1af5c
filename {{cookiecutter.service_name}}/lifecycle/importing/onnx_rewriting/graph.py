"""An ONNX graph that is built step by step, and the registry of functions that add estimators to it.

    columns of the contract -> Numbers (doubles) and Words (text) -> transform() ... -> answer() -> bytes

`converter("StandardScaler", ...)` registers a function for estimators with these class names, in the file of
this package for their library. skl2onnx converts other estimators of scikit-learn; the rest is Unsupported.
All numbers are doubles, as in scikit-learn; a missing number is NaN, a missing word is an empty string.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np

from lifecycle.command import LifecycleError

OPSET = {"": 18, "ai.onnx.ml": 3}
# Modules here by library; for any other library, the module has the library's name.
FILES = {"sklearn": ("sklearn", "trees"), "imblearn": ("sklearn",), "category_encoders": ("sklearn",)}
MISSING = float("nan")
NEIGHBOURS = ("KNeighborsClassifier", "KNeighborsRegressor", "KNNImputer")


class Unsupported(LifecycleError):
    """A part of a model that has no ONNX form here; the message names the part."""


@dataclass(frozen=True)
class Numbers:
    """A tensor of doubles [rows, width]."""

    tensor: str
    width: int


@dataclass(frozen=True)
class Words:
    """A tensor of text [rows, 1], with replacements of some words, such as for a missing value."""

    tensor: str
    known: tuple[str, ...] = ()
    meanings: dict[str, Any] = field(default_factory=lambda: {"": MISSING})
    width: int = 1


Frame = list[Numbers | Words]
Method = Literal["transform", "answer", "decision", "inverse"]
_F = TypeVar("_F", bound=Callable[..., Any])
CONVERTERS: dict[tuple[Method, str, str], Callable[..., Any]] = {}  # by method, file and class


def converter(*names: str, method: Method = "answer") -> Callable[[_F], _F]:
    """Register a function for the estimators of these class names, subclasses included."""

    def register(function: _F) -> _F:
        CONVERTERS.update({(method, function.__module__, name): function for name in names})
        return function

    return register


def transform(graph: "Graph", step: Any, frame: Frame) -> Frame:
    """Add a transformer to the graph; returns its output columns."""
    if step is None or isinstance(step, str):
        return frame if step == "passthrough" or step is None else []
    found = _added("transform", graph, step, frame)
    if found is None:
        found = foreign(graph, step, frame, transforms=True)
    return found if isinstance(found, list) else [found]


def answer(graph: "Graph", estimator: Any, frame: Frame) -> Numbers:
    """Add a predictor; returns probabilities [rows, labels] of a classifier, or values [rows, 1]."""
    estimator = unwrapped(estimator)
    return _added("answer", graph, estimator, frame) or foreign(graph, estimator, frame)


def decision(graph: "Graph", estimator: Any, frame: Frame) -> Numbers:
    """Add the input of a calibration: `decision_function` [rows, 1 or labels], else probabilities."""
    estimator = unwrapped(estimator)
    found: Numbers | None = _added("decision", graph, estimator, frame)
    if found:
        return found
    if hasattr(estimator, "decision_function"):
        raise Unsupported(f"the decision function of {type(estimator).__name__} has no ONNX form")
    scores = answer(graph, estimator, frame)
    return graph.select(scores, [1]) if scores.width == 2 else scores


def inverse(graph: "Graph", step: Any, values: Numbers) -> Numbers:
    """Add a transformer's `inverse_transform`."""
    found: Numbers | None = _added("inverse", graph, step, values)
    if found:
        return found
    raise Unsupported(f"the inverse of {type(step).__name__} has no ONNX form")


def unwrapped(estimator: Any) -> Any:
    """The estimator inside searches, frozen estimators and thresholds."""
    inner = {
        "BaseSearchCV": "best_estimator_", "FrozenEstimator": "estimator",
        "BaseThresholdClassifier": "estimator_",
        "SelfTrainingClassifier": "estimator_", "RANSACRegressor": "estimator_",
    }  # fmt: skip
    for kind in type(estimator).__mro__:
        if kind.__name__ in inner and kind.__module__.startswith("sklearn."):
            return unwrapped(getattr(estimator, inner[kind.__name__]))
    return estimator


def _added(method: Method, graph: "Graph", step: Any, given: Any) -> Any:
    """Call the registered function for a step; None if there is none."""
    for kind in type(step).__mro__:
        library = kind.__module__.partition(".")[0]
        for file in FILES.get(library, (library,)):
            module = f"{__package__}.{file}"
            with suppress(ModuleNotFoundError):
                importlib.import_module(module)
            if function := CONVERTERS.get((method, module, kind.__name__)):
                return function(graph, step, given)
    return None


class Graph:
    """Nodes and constants; each method adds some and returns the name of a tensor, or Numbers."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.opsets = dict(OPSET)
        self.functions: list[Any] = []
        self._count = 0

    def input(self, name: str, width: int, *, words: bool = False) -> str:
        """Declare an input [rows, width] of doubles, or of text."""
        from onnx import TensorProto, helper

        kind = TensorProto.STRING if words else TensorProto.DOUBLE
        self.inputs.append(helper.make_tensor_value_info(name, kind, [None, width]))
        return name

    def constant(self, value: Any, dtype: Any = np.float64) -> str:
        """A constant tensor."""
        from onnx import numpy_helper

        array = np.asarray(value, dtype)
        key = f"/c{len(self.constants)}"
        self.constants[key] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), key)
        return key

    def node(self, operator: str, *taken: Any, domain: str = "", **attributes: Any) -> str:
        """Add an operator; numbers and arrays among its inputs become constants of doubles."""
        from onnx import helper

        self._count += 1
        names = [one if isinstance(one, str) else self.constant(one) for one in taken]
        output = f"/{self._count}"
        self.nodes.append(helper.make_node(operator, names, [output], output, domain=domain, **attributes))
        return output

    def cast(self, tensor: str, dtype: Any) -> str:
        """A tensor as another type."""
        from onnx import helper

        return self.node("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def number(self, operator: str, *taken: Any, width: int, **attributes: Any) -> Numbers:
        """Add an operator whose output is a matrix of doubles."""
        tensors = [one.tensor if isinstance(one, Numbers) else one for one in taken]
        return Numbers(self.node(operator, *tensors, **attributes), width)

    def matrix(self, frame: Frame) -> Numbers:
        """All columns side by side; raises Unsupported for words."""
        if any(isinstance(one, Words) for one in frame):
            raise Unsupported("text goes into a step that has no ONNX form for it")
        numbers = [one for one in frame if isinstance(one, Numbers) and one.width]
        if not numbers:
            raise Unsupported("a step gets no columns")
        if len(numbers) == 1:
            return numbers[0]
        return self.number("Concat", *numbers, width=sum(one.width for one in numbers), axis=1)

    def select(self, numbers: Numbers, indices: Sequence[int]) -> Numbers:
        """Some columns of a matrix, in the order of the indices."""
        if list(indices) == list(range(numbers.width)):
            return numbers
        chosen = self.constant(list(indices), np.int64)
        return self.number("Gather", numbers, chosen, width=len(indices), axis=1)

    def columns(self, frame: Frame, indices: Sequence[int]) -> Frame:
        """Some columns of a frame; adjacent columns of one matrix stay together."""
        places = [(part, at) for part in frame for at in range(part.width)]
        chosen: Frame = []
        together: list[int] = []
        wanted = [places[index] for index in indices]
        for (part, at), following in pairwise([*wanted, (None, 0)]):
            if isinstance(part, Words):
                chosen.append(part)
            elif isinstance(part, Numbers):
                together.append(at)
                if following[0] is not part:
                    chosen.append(self.select(part, together))
                    together = []
        return chosen

    def affine(self, numbers: Numbers, weights: Any, bias: Any) -> Numbers:
        """Matrix product with weights [width, outputs], plus bias."""
        weights = np.asarray(weights, np.float64)
        product = self.node("MatMul", numbers.tensor, weights)
        return self.number("Add", product, np.atleast_1d(bias), width=weights.shape[1])

    def sigmoid(self, raw: Numbers) -> Numbers:
        """The logistic function. ONNX Runtime's is 0 below -36, where ratios of scores still matter."""
        grown = self.node("Exp", self.node("Neg", raw.tensor))
        return self.number("Div", 1.0, self.node("Add", 1.0, grown), width=raw.width)

    def both(self, second: Numbers) -> Numbers:
        """Probabilities of both labels from the probability of the second."""
        first = self.node("Sub", 1.0, second.tensor)
        return self.number("Concat", first, second, width=2, axis=1)

    def scores(self, raw: Numbers) -> Numbers:
        """Probabilities of all labels from logits: of the second of two labels, or of each label."""
        if raw.width == 1:
            return self.both(self.sigmoid(raw))
        return self.number("Softmax", raw, width=raw.width, axis=1)

    def normalised(self, scores: Numbers, *, otherwise: float | None = None) -> Numbers:
        """Each row divided by its sum; if the sum is 0, the row becomes `otherwise`, or is unchanged."""
        total = self.node("ReduceSum", scores.tensor, self.constant([1], np.int64), keepdims=1)
        none = self.node("Equal", total, 0.0)
        safe = self.node("Where", none, 1.0, total)
        divided = self.number("Div", scores, safe, width=scores.width)
        if otherwise is None:
            return divided
        return self.number("Where", none, otherwise, divided, width=scores.width)

    def table(self, column: Numbers | Words, keys: Sequence[Any], rows: Any) -> Numbers:
        """The row of the table for each key, and its last row for other values."""
        rows = np.asarray(rows, np.float64)
        if isinstance(column, Words):
            if strange := [key for key in keys if not isinstance(key, str) and not is_missing(key)]:
                raise Unsupported(f"a category of text is {strange[0]!r}")
            places = {
                key: at for at, key in enumerate(keys) if isinstance(key, str) and key not in column.meanings
            }
            by_meaning = {
                "" if is_missing(key) else f"={key}": at for at, key in reversed([*enumerate(keys)])
            }
            for word, meaning in column.meanings.items():
                key = "" if is_missing(meaning) else f"={meaning}"
                places[word] = by_meaning.get(key, len(keys))
            code = self.node(
                "LabelEncoder", column.tensor, domain="ai.onnx.ml", keys_strings=list(places),
                values_int64s=list(places.values()), default_int64=len(keys),
            )  # fmt: skip
        else:
            numbers = np.array([MISSING if is_missing(key) else float(key) for key in keys])
            tensor, sentinel = column.tensor, np.finfo(np.float64).max
            if np.isnan(numbers).any():
                tensor = self.node("Where", self.node("IsNaN", tensor), sentinel, tensor)
            same = self.node("Equal", tensor, np.where(np.isnan(numbers), sentinel, numbers)[None, :])
            steps = np.arange(len(keys), dtype=np.float64)[:, None] - len(keys)
            code = self.node("Add", self.node("MatMul", self.cast(same, np.float64), steps), float(len(keys)))
            code = self.cast(code, np.int64)
        flat = self.node("Reshape", code, self.constant([-1], np.int64))
        return self.number("Gather", rows, flat, width=rows.shape[1], axis=0)

    def include(self, model: Any, tensor: str) -> list[str]:
        """Add another model with one input; returns the names of its outputs in this graph."""
        self._count += 1
        prefix, outer = f"/{self._count}/", {model.graph.input[0].name: tensor, "": ""}

        def renamed(name: str) -> str:
            return outer.setdefault(name, prefix + name)

        for one in model.graph.initializer:
            constant = type(one)()
            constant.CopyFrom(one)
            constant.name = renamed(one.name)
            self.constants[constant.name] = constant
        for one in model.graph.node:
            node = type(one)()
            node.CopyFrom(one)
            node.name = prefix + node.name
            node.input[:], node.output[:] = map(renamed, one.input), map(renamed, one.output)
            self.nodes.append(node)
        self.functions += model.functions
        for one in model.opset_import:
            self.opsets[one.domain] = max(one.version, self.opsets.get(one.domain, 1))
        return [renamed(one.name) for one in model.graph.output]

    def finish(self, answers: Numbers, name: str) -> bytes:
        """The model with only the nodes that its answers need; the same bytes each time."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [answers.tensor], [name], name))
        needed, kept = {name}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        constants = [one for key, one in self.constants.items() if key in needed]
        output = helper.make_tensor_value_info(name, TensorProto.DOUBLE, [None, answers.width])
        model = helper.make_model(
            helper.make_graph(kept[::-1], "model", self.inputs, [output], constants),
            opset_imports=[helper.make_opsetid(domain, version) for domain, version in self.opsets.items()],
            ir_version=8,
            functions=self.functions,
        )
        return bytes(model.SerializeToString())


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN."""
    return value is None or value != value  # NaN


def foreign(
    graph: Graph, estimator: Any, frame: Frame, *, transforms: bool = False, raw_scores: bool = False
) -> Numbers:
    """Add an estimator of scikit-learn with skl2onnx; returns its last output; raises Unsupported.

    It gets doubles, or floats where onnxruntime has no operator for doubles.
    """
    import onnxruntime
    import skl2onnx
    from skl2onnx.common.data_types import DoubleTensorType, FloatTensorType
    from sklearn.base import is_classifier

    name, failure = type(estimator).__name__, None
    # For neighbours at the same distance, skl2onnx and scikit-learn make different choices.
    if not type(estimator).__module__.startswith("sklearn.") or name in NEIGHBOURS:
        raise Unsupported(f"{name} has no ONNX form")
    if any(isinstance(one, Words) for one in frame):
        raise Unsupported(f"{name} of text has no ONNX form")
    numbers = graph.matrix(frame)
    classifier = is_classifier(estimator) and not transforms
    options = {id(estimator): {"zipmap": False} | ({"raw_scores": True} if raw_scores else {})}
    for dtype, tensor in ((np.float64, DoubleTensorType), (np.float32, FloatTensorType)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = skl2onnx.to_onnx(
                    estimator,
                    initial_types=[("features", tensor([None, numbers.width]))],
                    options=options if classifier else None,
                    target_opset=OPSET,
                )
            made = model.SerializeToString()
            onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
        except Exception as error:  # both raise many types
            failure = error
            continue
        taken = numbers.tensor if dtype is np.float64 else graph.cast(numbers.tensor, dtype)
        output = graph.cast(graph.include(model, taken)[-1], np.float64)
        if classifier:
            return Numbers(output, len(estimator.classes_))
        if not transforms:
            return graph.number("Reshape", output, graph.constant([-1, 1], np.int64), width=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Numbers(output, estimator.transform(np.zeros((1, numbers.width))).shape[1])
    raise Unsupported(f"{name} has no ONNX form") from failure
