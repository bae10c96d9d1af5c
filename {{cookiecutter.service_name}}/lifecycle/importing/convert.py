"""The forms in which a model can be served, the fastest first; proof.py takes the first proven form.

estimator -> ONNX, a split into ONNX and scikit-learn, scikit-learn itself
scikit-learn -> skops, always with the same bytes
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from app.core.store import Input
from lifecycle.importing.onnx_rewriting.graph import (
    Frame,
    Graph,
    Numbers,
    Unsupported,
    Words,
    answer,
    transform,
    unwrapped,
)
from lifecycle.importing.original import WITH_ONNX, Candidate, Original, describe


def candidates(original: Original, entries: Sequence[Input], table: Any) -> Iterator[Candidate]:
    """The forms of an estimator; `table` has the words of its text columns."""
    estimator = unwrapped(original.estimator)
    output = "value" if original.task == "regression" else "probabilities"
    libraries = {"numpy", *original.libraries}
    whole = libraries | WITH_ONNX
    mixed = libraries | {"onnxruntime", "scikit-learn", "skops"}
    reasons: list[str] = []

    def onnx() -> dict[str, bytes]:
        graph = Graph()
        try:
            scores = answer(graph, estimator, declared(graph, entries, table))
        except Exception as error:  # models that were changed by hand may raise anything
            named = isinstance(error, Unsupported)
            reasons.append(str(error) if named else f"its ONNX form fails ({type(error).__name__})")
            raise
        return {"model.onnx": graph.finish(scores, output)}

    yield Candidate("ONNX", "onnx", onnx, whole)
    advice = f"{reasons[0]}; with another step there, all of it would be" if reasons else ""
    steps = [step for step in getattr(estimator, "steps", []) if not hasattr(step[1], "fit_resample")]
    for at in range(1, len(steps) if reasons else 1):
        head, tail = _pipeline(steps[:at]), _pipeline(steps[at:])
        graph = Graph()
        with suppress(Exception):  # this split has no ONNX form
            width = int(steps[at][1].n_features_in_)
            features = Numbers(graph.input("features", width), width)
            later = graph.finish(answer(graph, tail, [features]), output)
            yield Candidate(
                f"{describe(head)} in scikit-learn, then {describe(tail)} in ONNX", "skops",
                partial(_split, head, later),
                mixed, advice, {"stages": ["model.skops", "model.onnx"]},
            )  # fmt: skip
            break
    for at in range(len(steps) - 1 if reasons else 0, 0, -1):
        head, tail = _pipeline(steps[:at]), _pipeline(steps[at:])
        graph = Graph()
        with suppress(Exception):  # this split has no ONNX form
            first = graph.finish(
                graph.matrix(transform(graph, head, declared(graph, entries, table))), "features"
            )
            yield Candidate(
                f"{describe(head)} in ONNX, then {describe(tail)} in scikit-learn", "skops",
                partial(_split, tail, first),
                mixed, advice, {"stages": ["model.onnx", "model.skops"]},
            )  # fmt: skip
            break
    yield Candidate(
        "scikit-learn itself", "skops", lambda: {"model.skops": normalised(estimator)},
        libraries | {"scikit-learn", "skops"}, advice,
    )  # fmt: skip


def _split(estimator: Any, model: bytes) -> dict[str, bytes]:
    return {"model.skops": normalised(estimator), "model.onnx": model}


def _pipeline(steps: Sequence[Any]) -> Any:
    from sklearn.pipeline import Pipeline

    return Pipeline(list(steps))


def declared(graph: Graph, entries: Sequence[Input], table: Any) -> Frame:
    """The contract's columns as inputs of a graph; adjacent columns of one type share a tensor."""
    frame: Frame = []
    runs = [(text, list(run)) for text, run in groupby(entries, lambda entry: entry.dtype == "string")]
    for number, (text, run) in enumerate(runs):
        name = graph.input("features" if len(runs) == 1 else f"features_{number}", len(run), words=text)
        if not text:
            frame.append(Numbers(name, len(run)))
            continue
        for at, entry in enumerate(run):
            column = name
            if len(run) > 1:
                column = graph.node("Gather", name, graph.constant([at], np.int64), axis=1)
            known = entry.categories or table.column(entry.name).drop_null().unique().to_pylist()
            frame.append(Words(column, tuple(map(str, known))))
    return frame


def normalised(estimator: Any) -> bytes:
    """The model as saved by skops, but with ids and names in order and without times: stable bytes."""
    import skops.io

    with zipfile.ZipFile(io.BytesIO(skops.io.dumps(estimator))) as archive:
        schema = json.loads(archive.read("schema.json"))
        files = {name: archive.read(name) for name in archive.namelist() if name != "schema.json"}
    ids: dict[int, int] = {}
    names: dict[str, str] = {}

    def renumber(node: Any) -> None:
        if isinstance(node, dict):
            if "__id__" in node:
                node["__id__"] = ids.setdefault(node["__id__"], len(ids))
            if node.get("file") in files:
                name = node["file"]
                node["file"] = names.setdefault(name, f"{len(names)}{Path(name).suffix}")
            for value in node.values():
                renumber(value)
        elif isinstance(node, list):
            for value in node:
                renumber(value)

    renumber(schema)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        ordered = {"schema.json": json.dumps(schema, sort_keys=False).encode()}
        ordered |= {names[name]: files[name] for name in names}
        for name, content in ordered.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return target.getvalue()
