"""ONNX files as they are given: nothing to unpickle and nothing to convert, but a ZipMap is removed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from app.core.runtimes import OnnxRuntime
from app.core.store import Input
from lifecycle.errors import LifecycleError
from lifecycle.importing.original import Answers, Original, Task, as_labels, as_served, quoted


def open_file(
    path: Path, inputs: dict[str, Input], unusable: dict[str, str], table: Any, target: str
) -> Original:
    """The model in the file; raises LifecycleError."""
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
    return Original(
        task, labels, names, f"an ONNX model ({digest})", answer, set(), forms=[("as it is", lambda: content)]
    )


def without_zipmap(model: Any) -> None:
    """Take the ZipMap nodes off, which turn probabilities into a list of maps."""
    from onnx import TensorProto
    from onnx.helper import make_tensor_value_info

    for node in [one for one in model.graph.node if one.op_type == "ZipMap"]:
        for output in model.graph.output:
            if output.name == node.output[0]:
                output.CopyFrom(make_tensor_value_info(node.input[0], TensorProto.FLOAT, [None, None]))
        model.graph.node.remove(node)
