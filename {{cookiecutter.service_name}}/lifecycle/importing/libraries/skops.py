"""skops: the model as scikit-learn itself, for estimators without an ONNX form."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.core.runtimes import SkopsRuntime, skops_types
from app.core.store import Input
from lifecycle.errors import LifecycleError
from lifecycle.importing import libraries
from lifecycle.importing.documents import Conversion

# Types that estimators of these libraries are made of; anything else is for the person to trust.
KNOWN = tuple(f"{name}." for name in ("sklearn", "numpy", "scipy", "pandas", *libraries.ESTIMATORS))
KNOWN_BUILTINS = {
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "slice", "str",
                                      "tuple", "type", "complex", "frozenset", "range", "bytearray")),
    "collections.OrderedDict", "collections.defaultdict", "functools.partial",
}  # fmt: skip


def trusted(estimator: Any, request: Conversion, tries: Sequence[str]) -> tuple[bytes, list[str]]:
    """The model as skops saves it and the types in it; raises LifecycleError unless all may be loaded."""
    content = normalised(estimator)
    types = sorted(skops_types(content))
    strange = [one for one in types if not one.startswith(KNOWN) and one not in KNOWN_BUILTINS]
    if request.runtime == "onnx":
        trust = f" --trust {','.join(strange)}" if strange else ""
        raise LifecycleError(
            f"no ONNX form of this model answers as it does ({'; '.join(dict.fromkeys(tries))}). It can be "
            f"served by scikit-learn itself, some hundred times slower: repeat with --runtime skops{trust}"
        )
    if untrusted := [one for one in strange if one not in request.trust and not request.trust_listed]:
        raise LifecycleError(
            f"skops: the model is made of types that are not trusted: {', '.join(untrusted)}. "
            f"If you know them: --trust {','.join(untrusted)}"
        )
    return content, types


def normalised(estimator: Any) -> bytes:
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


def runtime(content: bytes, types: list[str], entries: list[Input], labels: list[Any]) -> SkopsRuntime:
    """The runtime that would serve it."""
    import skops.io

    return SkopsRuntime(skops.io, content, types, entries, labels)
