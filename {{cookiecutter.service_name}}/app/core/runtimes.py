"""What runs a model: verified bytes in, a function from rows to probabilities out.

Artifact -> load_runtime -> Runtime.infer(matrix) -> probabilities
"""

import json
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from app.core.errors import ArtifactError
from app.core.store import Artifact

Matrix = NDArray[np.float32]

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
}  # fmt: skip


class Runtime(Protocol):
    """A loaded model. Pure: the same rows give the same answer, and no call disturbs another."""

    def infer(self, matrix: Matrix) -> NDArray[Any]:
        """Rows (n, features) in contract order -> probabilities (n, labels), or values (n,) of a regressor."""
        ...


def load_runtime(artifact: Artifact) -> Runtime:
    """Load the runtime the manifest names; raises ArtifactError."""
    content = artifact.files[artifact.model_file]
    names = [entry.name for entry in artifact.manifest.inputs]
    try:
        if artifact.manifest.runtime == "rules":
            return RulesRuntime(json.loads(content), names, artifact.manifest.outputs.labels)
        return OnnxRuntime(content, len(names))
    except ArtifactError:
        raise
    except Exception as error:  # whatever a malformed model makes its library raise
        where = f"{artifact.manifest.version}/{artifact.model_file}"
        raise ArtifactError(f"{where}: cannot be loaded ({type(error).__name__})") from error


class OnnxRuntime:
    """onnxruntime on one thread: the service scales by workers, and threads of threads only fight."""

    def __init__(self, content: bytes, features: int) -> None:
        import onnxruntime  # here, so that a rules model does not pay for it

        onnxruntime.set_default_logger_severity(3)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        (model_input,) = session.get_inputs()
        if model_input.shape[-1] != features:
            raise ArtifactError(
                f"model.onnx: takes {model_input.shape[-1]} columns, the contract has {features}"
            )
        self._session = session
        self._input = model_input.name
        self._outputs = [session.get_outputs()[-1].name]  # a classifier's probabilities, a regressor's value

    def infer(self, matrix: Matrix) -> NDArray[Any]:
        """See `Runtime`."""
        answer: NDArray[Any] = self._session.run(self._outputs, {self._input: matrix})[0]
        return answer


class RulesRuntime:
    """A decision list: the first rule whose conditions all hold decides. No model needed, the same contract."""

    def __init__(self, document: dict[str, Any], names: list[str], labels: list[Any]) -> None:
        position = {name: index for index, name in enumerate(names)}
        self._rules = [
            (
                [
                    (position[name], _OPERATORS[symbol], float(bound))
                    for name, conditions in rule["when"].items()
                    for symbol, bound in conditions.items()
                ],
                _spread(rule, labels),
            )
            for rule in document["rules"]
        ]
        self._otherwise = _spread(document["otherwise"], labels)

    def infer(self, matrix: Matrix) -> NDArray[Any]:
        """See `Runtime`."""
        return np.array([self._decide(row) for row in matrix.tolist()])

    def _decide(self, row: list[float]) -> list[float]:
        for conditions, probabilities in self._rules:
            if all(holds(row[index], bound) for index, holds, bound in conditions):
                return probabilities
        return self._otherwise


def _spread(decision: dict[str, Any], labels: list[Any]) -> list[float]:
    """The decided label's score, and what is left of 1 shared by the other labels."""
    chosen, score = labels.index(decision["label"]), float(decision["score"])
    rest = (1 - score) / max(len(labels) - 1, 1)
    return [score if index == chosen else rest for index in range(len(labels))]
