"""category_encoders: each encodes its columns one by one, and hands the others on."""

from typing import Any

from lifecycle.importing.onnx_rewriting.columns import encoded
from lifecycle.importing.onnx_rewriting.graph import MISSING, Frame, Graph, Unsupported, Words, converter


@converter("BaseEncoder", method="transform")
def _encoder(graph: Graph, step: Any, frame: Frame) -> Frame:
    names = list(step.feature_names_in_)
    columns = graph.columns(frame, range(len(names)))
    places = [part for part in columns for _ in range(part.width)]
    if any(isinstance(part, Words) != (name in step.cols) for part, name in zip(places, names, strict=True)):
        raise Unsupported(f"{type(step).__name__} encodes numbers, or leaves words")
    keys = [[*part.known, MISSING] if isinstance(part, Words) else [] for part in places]
    outputs = list(step.get_feature_names_out())
    passed = {outputs.index(name): at for at, name in enumerate(names) if name not in step.cols}
    return encoded(graph, step, frame, keys, passed)
