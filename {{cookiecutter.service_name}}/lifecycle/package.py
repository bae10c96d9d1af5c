"""From a model, rows and answers to the files of a version folder, written atomically.

    model, rows, answers -> model file, golden.jsonl, baseline.json -> manifest.json with their checksums
    files -> .v1.new beside it -> rename -> artifacts/v1

This module reads no clock, no machine data and no git: the same input gives the same bytes. An existing
version is never changed: other bytes need another version.
"""

import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from app.core.store import (
    MANIFEST,
    RELEASE,
    SIGNATURE,
    FileEntry,
    Input,
    Manifest,
    Outputs,
    Release,
    Training,
)
from app.schemas.contract import contract_inputs, contract_outputs, label_key, served_contract_sha256
from app.schemas.predict import Features
from lifecycle.command import write_file

NAME = "iris"
MAX_BINS = 10
TOLERANCE = 1e-5  # allowed difference from a recorded probability: float32 against float64

Rows = NDArray[np.float64]  # [rows, features], in the order of `Features`
Rule = Mapping[str, Any] | None  # the threshold of a manifest's outputs


def feature_names() -> list[str]:
    """Names of the model's columns, in order."""
    return [entry["name"] for entry in contract_inputs()]


def labels() -> list[Any]:
    """Labels in the order of the model's probabilities; empty for a regressor."""
    return list(contract_outputs()["labels"])


def chosen_labels(answers: Rows, rule: Rule = None) -> NDArray[np.int64]:
    """The index of each answer's label: the most probable label, or as the threshold decides."""
    if rule:
        at = labels().index(rule["label"])
        return np.where(answers[:, at] >= rule["least"], at, 1 - at)
    chosen: NDArray[np.int64] = answers.argmax(axis=1)
    return chosen


def golden_set(
    rows: Sequence[Sequence[Any]], answers: Rows, tolerance: float = TOLERANCE, rule: Rule = None
) -> bytes:
    """JSON lines: the features, and the answer that every later run must repeat.

    `answers` is [rows, labels], or [rows, 1] for a regressor, from a source other than the serving runtime.
    """
    lines = []
    chosen = chosen_labels(answers, rule).tolist()
    for row, answer, at in zip(rows, answers.tolist(), chosen, strict=True):
        line: dict[str, Any] = {"features": dict(zip(feature_names(), row, strict=True))}
        if labels():
            keys = [label_key(label) for label in labels()]
            line["label"] = labels()[at]
            line["probabilities"] = dict(zip(keys, (round(one, 7) for one in answer), strict=True))
        else:
            (line["value"],) = answer
        line["tolerance"] = tolerance
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def baseline(columns: Sequence[Sequence[Any]], answers: Rows, rule: Rule = None) -> bytes:
    """Counts of the training rows per bin, of every feature and of the answers, for drift.

    `columns` has the values of each feature, missing values as None or NaN. Bin `i` holds
    edges[i-1] < value <= edges[i]; the first and last bin are open, so there is one more bin than edges. The
    edges of a feature are its quantiles without duplicates; text, booleans and categories have a bin for each
    of the most frequent values.
    """
    from app.monitoring.drift import ROWS_A_BIN  # here: a rollback must not wait for its libraries

    features = {}
    rows = len(answers)
    # The share of a bin with few rows is noise, and noise on both sides looks like drift.
    most = min(MAX_BINS, max(2, rows // ROWS_A_BIN))
    for entry, values in zip(contract_inputs(), columns, strict=True):
        if entry["categories"] or entry["dtype"] in ("string", "bool"):
            present = [value for value in values if value is not None]
            counted = _commonest(present, most - (len(present) < rows))
        else:
            numbers = np.asarray(values, np.float64)
            numbers = numbers[~np.isnan(numbers)]
            counted = _histogram(numbers, _quantiles(numbers, most - (len(numbers) < rows)))
        features[entry["name"]] = counted | {
            "missing": rows - sum(counted["counts"]) - counted.get("other", 0)
        }
    if labels():
        chosen = chosen_labels(answers, rule)
        counts = {label_key(label): int((chosen == index).sum()) for index, label in enumerate(labels())}
        scores = _histogram(answers.max(axis=1), np.linspace(0.1, 0.9, 9).round(1))
        return canonical_json({"rows": rows, "features": features, "labels": counts, "scores": scores})
    given = answers[:, 0]
    return canonical_json(
        {"rows": rows, "features": features, "values": _histogram(given, _quantiles(given, most))}
    )


def _quantiles(values: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    quantiles = np.quantile(values, np.linspace(0, 1, most + 1)[1:-1])
    return np.unique([float(f"{edge:.7g}") for edge in quantiles])


def _histogram(values: NDArray[np.float64], edges: NDArray[np.float64]) -> dict[str, Any]:
    bounds = ["-inf", *(f"{edge:.7g}" for edge in edges), "inf"]
    names = [f"({low},{high}]" for low, high in itertools.pairwise(bounds)]
    counts = np.bincount(np.searchsorted(edges, values, side="left"), minlength=len(names))
    return {"edges": edges.tolist(), "bins": names, "counts": counts.tolist()}


def _commonest(values: Sequence[Any], most: int) -> dict[str, Any]:
    counts = Counter(values)
    # Ties are sorted by name: the order of the rows must not matter.
    kept = sorted(counts, key=lambda one: (-counts[one], str(one)))
    kept = kept[: most if len(kept) <= most else most - 1]  # the rest shares a bin
    # `missing` and `other` are bins of their own.
    names = [f"{key}=" if (key := label_key(one)) in ("missing", "other") else key for one in kept]
    other = len(values) - sum(counts[one] for one in kept)
    return {"categories": kept, "bins": names, "counts": [counts[one] for one in kept], "other": other}


def pack(
    *,
    version: str,
    runtime: Literal["onnx", "skops", "rules"],
    files: dict[str, bytes],
    outputs: dict[str, Any],
    libraries: dict[str, str],
    name: str = NAME,
    training: Training | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    words: Mapping[str, dict[str, Any]] | None = None,
    **more: Any,
) -> dict[str, bytes]:
    """The whole folder: `files` and the manifest with their checksums.

    `outputs` holds the meaning of the answer and the review threshold, `ranges` the smallest and the largest
    value in training; inputs and labels come from the contract in `app/schemas/predict.py`. `words` holds
    descriptions and examples of inputs that differ from the contract's, `more` further fields.
    """
    ranges, words = ranges or {}, words or {}
    schema = Features.model_json_schema()
    examples = schema["examples"][0]
    described = {
        name: {"description": one.get("description", ""), "example": examples[name]}
        for name, one in schema["properties"].items()
    }
    manifest = Manifest(
        name=name,
        version=version,
        task=contract_outputs()["task"],
        runtime=runtime,
        files={
            name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
            for name, content in sorted(files.items())
        },
        inputs=[
            Input(**entry, **described[name] | words.get(name, {}), training_range=ranges.get(name))
            for entry in contract_inputs()
            for name in [entry["name"]]
        ],
        outputs=Outputs(labels=list(labels()), **outputs),
        training=training,
        libraries=libraries,
        contract_sha256=served_contract_sha256(),
        **more,
    )
    return files | {MANIFEST: canonical_json(manifest.model_dump(mode="json"))}


def canonical_json(value: object) -> bytes:
    """JSON as in version folders: sorted, indented, one newline at the end, always the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def differing(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Names of files in `folder` that differ from `files`, are missing or are surplus; [] if equal.

    The signature is ignored: it is not part of a version.
    """
    paths = [path for path in folder.iterdir() if path.name != SIGNATURE] if folder.is_dir() else []
    present = {path.name: path.read_bytes() for path in paths}
    return sorted(name for name in present.keys() | files.keys() if present.get(name) != files.get(name))


def publish(root: Path, version: str, files: dict[str, bytes]) -> None:
    """Write `files` as `root`/`version`, replacing an older folder, which is kept on any failure."""
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
    """Write `release.json` if there is none; later only a promotion changes the served version."""
    if (root / RELEASE).exists():
        return False
    write_release(root, Release(serving=serving, previous=previous))
    return True


def write_release(root: Path, release: Release) -> None:
    """Write `release.json` atomically: a running service may read it at any moment."""
    write_file(root / RELEASE, canonical_json(release.model_dump()))
