"""Gives a rendered service another model: a forest of 200 trees on 30 features of breast cancer cells.

    scikit-learn's data -> app/schemas/predict.py -> fit -> ONNX -> proof against scikit-learn -> artifacts/v1

PROVE_SERVICE=FOLDER python -m benchmarks.medium FOLDER, with an interpreter that has the service's
requirements/dev.txt. The service's own lifecycle does the work, so a contract of another size goes the way
that an owner's would.
"""

import hashlib
import importlib
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TREES, DEPTH, GOLDEN_ROWS = 200, 10, 30
LABELS = ("benign", "malignant")

MODULE = '''"""What a client sends for a prediction and what comes back."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Label = Literal[{labels}]
Action = Literal["accept", "review"]


class Features(BaseModel):
    """Thirty measurements of cell nuclei."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={{"examples": [{example}]}}
    )

{fields}


@dataclass(slots=True)
class Prediction:
'''


def contract(original: str, example: dict[str, float]) -> str:
    """The service's predict.py with these features and labels; what it answers stays as it was."""
    _, marker, answer = original.partition("@dataclass(slots=True)\nclass Prediction:\n")
    if not marker:
        raise ValueError("app/schemas/predict.py has no `class Prediction` to keep")
    fields = "\n".join(f"    {name}: Annotated[float, Field(ge=0, le=10_000)]" for name in example)
    return MODULE.format(labels=", ".join(map(repr, LABELS)), example=example, fields=fields) + answer


def build(folder: Path) -> None:
    """Puts contract and artifact of the medium model into the service in `folder`."""
    ensemble, datasets = (importlib.import_module(f"sklearn.{name}") for name in ("ensemble", "datasets"))
    data = datasets.load_breast_cancer()
    names = [str(name).replace(" ", "_") for name in data.feature_names]
    path = folder / "app" / "schemas" / "predict.py"
    example = dict(zip(names, data.data[0].tolist(), strict=True))
    path.write_text(contract(path.read_text(encoding="utf-8"), example), encoding="utf-8")

    # Only now, because these read the contract that was just written.
    train, package = map(importlib.import_module, ("tests.service.example", "lifecycle.package"))
    manifest = importlib.import_module("app.core.store")

    rows: Any = data.data
    targets = data.target_names[data.target]
    model = ensemble.RandomForestClassifier(n_estimators=TREES, max_depth=DEPTH, random_state=0)
    model.fit(rows, targets)
    assert model.classes_.tolist() == list(LABELS)  # noqa: S101  # their order is that of the probabilities
    onnx = train.convert(model)
    train.prove_parity(model, onnx, rows)
    files = {
        "model.onnx": onnx,
        "baseline.json": package.baseline(list(rows.T), model.predict_proba(rows)),
        "golden.jsonl": package.golden_set(
            rows[:GOLDEN_ROWS].tolist(), model.predict_proba(rows[:GOLDEN_ROWS])
        ),
    }
    training = manifest.Training(
        data_sha256=hashlib.sha256(rows.tobytes()).hexdigest(),
        rows=len(rows),
        query="sklearn.datasets.load_breast_cancer",
        target="diagnosis",
        code_revision="sha256:" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    )
    packed = package.pack(
        version="v1",
        runtime="onnx",
        files=files,
        outputs={"score": "The share of the trees that say so.", "review_threshold": 0.6},
        libraries={name: version(name) for name in train.LIBRARIES},
        training=training,
        ranges=dict(
            zip(names, zip(rows.min(axis=0).tolist(), rows.max(axis=0).tolist(), strict=True), strict=True)
        ),
    )
    artifacts = folder / "artifacts"
    shutil.rmtree(artifacts)  # its versions were made for another contract
    package.publish(artifacts, "v1", packed)
    release = {"serving": "v1", "previous": None, "shadow": None, "canary": None, "canary_percent": 0}
    (artifacts / "release.json").write_bytes(package.canonical_json(release))


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
