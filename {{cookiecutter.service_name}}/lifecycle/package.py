"""From a model and the rows it is judged by to the files of a version folder, whole or not at all.

    model, rows, answers -> model file, golden.jsonl, baseline.json -> manifest.json, which signs them all
    files -> .v1.new beside it -> rename -> artifacts/v1

Nothing here reads the clock, the machine or git: the same input gives the same bytes. A version that is
there is never changed: other bytes need another version, or `force` before release.
"""

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.core.manifest import FileEntry, Input, Manifest, Outputs, Training
from app.core.store import MANIFEST, RELEASE, Release
from app.schemas.contract import contract_inputs, contract_outputs, served_contract_sha256
from app.schemas.predict import Features

NAME = "iris"
MAX_BINS, ROWS_A_BIN = 10, 20
TOLERANCE = 1e-5  # how far a probability may be from the recorded one: float32 against float64

Rows = NDArray[np.float64]  # [rows, features], in the order of `Features`


def feature_names() -> list[str]:
    """Names of the model's columns, in order."""
    return [entry["name"] for entry in contract_inputs()]


def labels() -> list[str]:
    """Labels, in the order of the model's probabilities."""
    return list(contract_outputs()["labels"])


def golden_set(rows: Rows, probabilities: Rows) -> bytes:
    """JSON lines: the features, and the answer that every later run must give again.

    `probabilities` is [rows, labels] from a source other than the runtime that serves.
    """
    lines = []
    for row, answer in zip(rows.tolist(), probabilities.round(7).tolist(), strict=True):
        line = {
            "features": dict(zip(feature_names(), row, strict=True)),
            "label": labels()[int(np.argmax(answer))],
            "probabilities": dict(zip(labels(), answer, strict=True)),
            "tolerance": TOLERANCE,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def baseline(rows: Rows, probabilities: Rows) -> bytes:
    """What training looked like, for drift: counts per bin of every feature, of the score, and per label.

    Bin `i` holds edges[i-1] < value <= edges[i], the first and last bin are open, so there is always
    one count more than edges. Edges of a feature are its quantiles, fewer where they coincide; a feature
    with categories has a bin for each of the commonest.
    """
    features = {}
    # Shares of bins that few rows fell in are noise, and noise on both sides looks like drift.
    bins = min(MAX_BINS, max(2, len(rows) // ROWS_A_BIN))
    for entry, values in zip(contract_inputs(), rows.T, strict=True):
        present = values[~np.isnan(values)]
        if entry["categories"]:
            counted = _commonest(present, entry["categories"])
        else:
            quantiles = np.quantile(present, np.linspace(0, 1, bins + 1)[1:-1])
            counted = _histogram(present, np.unique([float(f"{edge:.7g}") for edge in quantiles]))
        features[entry["name"]] = counted | {"missing": int(len(values) - len(present))}
    chosen = probabilities.argmax(axis=1)
    return canonical_json(
        {
            "rows": len(rows),
            "features": features,
            "labels": {str(label): int((chosen == index).sum()) for index, label in enumerate(labels())},
            "scores": _histogram(probabilities.max(axis=1), np.linspace(0.1, 0.9, 9).round(1)),
        }
    )


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    bounds = ["-inf", *(f"{edge:.7g}" for edge in edges), "inf"]
    names = [f"({low},{high}]" for low, high in itertools.pairwise(bounds)]
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(names))
    return {"edges": edges.tolist(), "bins": names, "counts": counts.tolist()}


def _commonest(values: NDArray[np.float64], categories: list[Any]) -> dict[str, Any]:
    counts = {category: int((values == category).sum()) for category in categories}
    kept = sorted(categories, key=lambda category: -counts[category])[:MAX_BINS]
    other = len(values) - sum(counts[category] for category in kept)
    named = {"categories": kept, "bins": [str(category) for category in kept]}
    return named | {"counts": [counts[category] for category in kept], "other": other}


def pack(
    *,
    version: str,
    runtime: Literal["onnx", "rules"],
    files: dict[str, bytes],
    outputs: dict[str, Any],
    libraries: dict[str, str],
    training: Training | None = None,
    training_rows: Rows | None = None,
) -> dict[str, bytes]:
    """The whole folder: `files` and the manifest that signs them.

    `outputs` holds the meaning of the score and the review threshold; inputs and labels come from the
    contract in `app/schemas/predict.py`.
    """
    ranges = {}
    if training_rows is not None:
        low, high = np.nanmin(training_rows, axis=0).tolist(), np.nanmax(training_rows, axis=0).tolist()
        ranges = dict(zip(feature_names(), zip(low, high, strict=True), strict=True))
    schema = Features.model_json_schema()
    example = schema["examples"][0]
    manifest = Manifest(
        name=NAME,
        version=version,
        task=contract_outputs()["task"],
        runtime=runtime,
        files={
            name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            for name, content in sorted(files.items())
        },
        inputs=[
            Input(
                **entry,
                description=schema["properties"][entry["name"]].get("description", ""),
                training_range=ranges.get(entry["name"]),
                example=example[entry["name"]],
            )
            for entry in contract_inputs()
        ],
        outputs=Outputs(labels=list(labels()), **outputs),
        training=training,
        libraries=libraries,
        contract_sha256=served_contract_sha256(),
    )
    return files | {MANIFEST: canonical_json(manifest.model_dump(mode="json"))}


def canonical_json(value: object) -> bytes:
    """JSON as versions hold it: sorted, indented, one newline at the end, the same bytes every time."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def differing(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Names of files in `folder` that differ from `files`, are missing or are too many; [] if equal."""
    present = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    return sorted(name for name in present.keys() | files.keys() if present.get(name) != files.get(name))


def publish(root: Path, version: str, files: dict[str, bytes]) -> None:
    """Write `files` as `root`/`version`, in place of what is there; on any failure what is there stays."""
    target, new, old = root / version, root / f".{version}.new", root / f".{version}.old"
    root.mkdir(parents=True, exist_ok=True)
    if old.exists() and not target.exists():  # killed between the two renames
        old.rename(target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        if target.exists():  # a folder cannot be renamed over a full one
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def start_release(root: Path, serving: str, previous: str) -> bool:
    """Write `release.json` if there is none; what serves afterwards changes by promotion only."""
    if (root / RELEASE).exists():
        return False
    write_release(root, Release(serving=serving, previous=previous))
    return True


def write_release(root: Path, release: Release) -> None:
    """Write `release.json` whole or not at all: a running service may read it at any moment."""
    new = root / ".release.new"
    new.write_bytes(canonical_json(release.model_dump()))
    new.replace(root / RELEASE)
