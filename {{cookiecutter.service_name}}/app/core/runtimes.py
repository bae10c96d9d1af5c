"""What runs a model: verified bytes in, a function from rows to probabilities out."""

import json
import operator
import os
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

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """Rows (n, features) in the contract's order -> probabilities (n, labels) in the labels' order."""
        ...


def load_runtime(artifact: Artifact) -> Runtime:
    """Load the runtime that the manifest names; raises ArtifactError."""
    content, manifest = artifact.files[artifact.model_file], artifact.manifest
    names = [entry.name for entry in manifest.inputs]
    try:
        if manifest.runtime == "rules":
            return RulesRuntime(json.loads(content), names, manifest.outputs.labels)
        return OnnxRuntime(content, len(names))
    except Exception as error:  # whatever a malformed model makes its library raise
        where = f"{manifest.version}/{artifact.model_file}"
        raise ArtifactError(f"{where}: cannot be loaded ({type(error).__name__})") from error


def import_onnxruntime() -> Any:
    """The library, imported only where it is needed, and kept from sending usage events to its maker."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # too late once it is imported
    import onnxruntime

    return onnxruntime


class OnnxRuntime:
    """onnxruntime on one thread: the service scales by workers, and threads of threads only fight."""

    def __init__(self, content: bytes, features: int) -> None:
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        (model_input,) = self._session.get_inputs()
        if model_input.shape[-1] != features:
            raise ValueError("the model takes another number of columns")
        self._input, self._outputs = model_input.name, [self._session.get_outputs()[-1].name]

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        answer: list[list[float]] = self._session.run(self._outputs, {self._input: matrix})[0].tolist()
        return answer


class RulesRuntime:
    """A decision list: the first rule whose conditions all hold decides. No model, the same contract."""

    def __init__(self, document: dict[str, Any], names: list[str], labels: list[Any]) -> None:
        self._labels = labels
        self._rules = [
            (
                [
                    (names.index(name), _OPERATORS[symbol], float(np.float32(bound)))
                    for name, conditions in rule["when"].items()
                    for symbol, bound in conditions.items()
                ],
                self._spread(rule),
            )
            for rule in document["rules"]
        ]
        self._otherwise = self._spread(document["otherwise"])

    def infer(self, matrix: Matrix) -> list[list[float]]:
        """See `Runtime`."""
        return [self._decide(row) for row in matrix.tolist()]

    def _decide(self, row: list[float]) -> list[float]:
        for conditions, probabilities in self._rules:
            if all(holds(row[index], bound) for index, holds, bound in conditions):
                return probabilities
        return self._otherwise

    def _spread(self, decision: dict[str, Any]) -> list[float]:
        """The decided label's score, and what is left of 1 shared by the other labels."""
        chosen, score = self._labels.index(decision["label"]), float(decision["score"])
        rest = (1 - score) / max(len(self._labels) - 1, 1)
        return [score if index == chosen else rest for index in range(len(self._labels))]
