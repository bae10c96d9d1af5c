"""skops: the model as scikit-learn itself, for estimators without an ONNX form."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from app.core.manifest import Input
from app.core.runtimes import SkopsRuntime
from lifecycle.importing.original import Original


def content(estimator: Any) -> bytes:
    """The model as skops saves it, ids and names in order and without times: the same bytes every time."""
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


def runtime(original: Original, content: bytes, types: list[str], entries: list[Input]) -> SkopsRuntime:
    """The runtime that would serve it."""
    import skops.io

    return SkopsRuntime(skops.io, content, types, entries, original.labels)
