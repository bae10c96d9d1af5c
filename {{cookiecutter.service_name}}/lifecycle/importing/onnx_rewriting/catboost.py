"""CatBoost: its own ONNX export, which supports models of numbers."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lifecycle.importing.onnx_rewriting.graph import Frame, Graph, Numbers, Unsupported, converter


@converter("CatBoost")
def _model(graph: Graph, model: Any, frame: Frame) -> Numbers:
    import onnx

    numbers = graph.matrix(frame)
    if model.get_cat_feature_indices() or model.get_text_feature_indices():
        raise Unsupported("CatBoost with categories of its own has no ONNX form; encode them in a pipeline")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save_model(str(path), format="onnx")
        exported = onnx.load_from_string(path.read_bytes())
    for node in [one for one in exported.graph.node if one.op_type == "ZipMap"]:
        exported.graph.output[-1].name = node.input[0]
        exported.graph.node.remove(node)
    single = graph.cast(numbers.tensor, np.float32)
    output = graph.cast(graph.include(exported, single)[-1], np.float64)
    if len(getattr(model, "classes_", ())):
        return Numbers(output, len(model.classes_))
    return graph.number("Reshape", output, graph.constant([-1, 1], np.int64), width=1)
