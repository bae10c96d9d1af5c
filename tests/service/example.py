"""Makes the versions that the template ships, a model of iris flowers and its stub: `make example`.

    load_iris -> split -> fit -> ONNX -> proof that ONNX answers as scikit-learn does -> artifacts/v1

Runs with a service's Python and that service's own packaging. Owners import their model with
`make import-model` instead. The same libraries give the same bytes, so a version can be made again and
compared.
"""

import csv
import hashlib
import io
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import skl2onnx
import typer
from numpy.typing import NDArray
from skl2onnx.common.data_types import FloatTensorType
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from app.core.runtimes import RulesRuntime
from app.core.store import VERSION_PATTERN, Input, Training
from app.schemas.contract import contract_inputs
from lifecycle import package
from lifecycle.command import LifecycleError
from tests.service.where import ROOT

ARTIFACTS = ROOT / "artifacts"
OPSET = {"": 18, "ai.onnx.ml": 3}
SEED = 0
HOLDOUT_ROWS = 30
TARGET = "species"
OUTPUTS = {
    "score": "The model's probability of the label; not calibrated beyond training.",
    # Below it: 6 of the 7 rows (in 150) that the model gets wrong, and 1 that it gets right.
    "review_threshold": 0.6,
}
STUB = "v0"  # rules in place of a model: for teams that integrate before there is one, and for rollbacks
# The first rule whose conditions all hold decides; the other labels share 1 - score equally.
RULES: dict[str, Any] = {
    "rules": [
        {"when": {"petal_length": {"<": 2.5}}, "label": "setosa", "score": 0.95},
        {
            "when": {"petal_length": {"<": 4.8}, "petal_width": {"<": 1.7}},
            "label": "versicolor",
            "score": 0.9,
        },
        {"when": {"petal_length": {">=": 5.2}}, "label": "virginica", "score": 0.9},
    ],
    "otherwise": {"label": "virginica", "score": 0.55},
}
STUB_OUTPUTS = {
    "score": "How sure the author of the rule is; not measured.",
    "review_threshold": 0.6,
}
LIBRARIES = ("numpy", "onnx", "onnxruntime", "scikit-learn", "skl2onnx")


@dataclass(frozen=True)
class Data:
    """Rows [n, 4] in cm and their labels, split into what the model sees and what judges it."""

    training: package.Rows
    training_labels: NDArray[np.str_]
    holdout: package.Rows
    holdout_labels: NDArray[np.str_]


def load() -> Data:
    """The iris measurements that come with scikit-learn; the holdout has as many rows of each label."""
    iris = load_iris()
    training, holdout, training_labels, holdout_labels = train_test_split(
        iris.data,
        iris.target_names[iris.target],
        test_size=HOLDOUT_ROWS,
        stratify=iris.target,
        random_state=SEED,
    )
    return Data(training, training_labels, holdout, holdout_labels)


def fit(data: Data) -> Pipeline:
    """Standardise, then logistic regression."""
    scaler, model = StandardScaler(), LogisticRegression()
    pipeline = make_pipeline(scaler, model).fit(data.training, data.training_labels)
    # Another processor differs in the last bits; rounded, it arrives at the same file.
    for step, names in ((scaler, ("mean_", "scale_")), (model, ("coef_", "intercept_"))):
        for name in names:
            setattr(step, name, getattr(step, name).round(6))
    return pipeline


def convert(pipeline: Pipeline) -> bytes:
    """The pipeline as ONNX: `features` [rows, 4] -> `label` [rows], `probabilities` [rows, 3]; float32."""
    model = skl2onnx.to_onnx(
        pipeline,
        initial_types=[("features", FloatTensorType([None, len(package.feature_names())]))],
        options={id(pipeline): {"zipmap": False}},
        name="model",  # the default is a new random name each time
        target_opset=OPSET,
    )
    model.domain = ""
    return bytes(model.SerializeToString())


def prove_parity(pipeline: Pipeline, model: bytes, rows: package.Rows) -> None:
    """Raise ValueError unless ONNX and scikit-learn answer `rows` alike."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    label, probabilities = session.run(["label", "probabilities"], {"features": rows.astype(np.float32)})
    if label.tolist() != pipeline.predict(rows).tolist():
        raise ValueError("the ONNX model chooses other labels than scikit-learn")
    gap = float(np.abs(probabilities - pipeline.predict_proba(rows)).max())
    if not gap <= package.TOLERANCE:
        raise ValueError(
            f"the ONNX model is {gap:.1e} away from scikit-learn, allowed is {package.TOLERANCE:.0e}"
        )


def model_files(version: str, data: Data) -> dict[str, bytes]:
    """Fit, convert, prove, package: the files of `version`."""
    pipeline = fit(data)
    if pipeline.classes_.tolist() != package.labels():
        raise ValueError(f"the model's labels {pipeline.classes_.tolist()} are not those of the contract")
    model = convert(pipeline)
    prove_parity(pipeline, model, np.vstack([data.training, data.holdout]))
    return package.pack(
        version=version,
        runtime="onnx",
        files={
            "model.onnx": model,
            "baseline.json": package.baseline(list(data.training.T), pipeline.predict_proba(data.training)),
            "golden.jsonl": package.golden_set(data.holdout.tolist(), pipeline.predict_proba(data.holdout)),
        },
        outputs=OUTPUTS,
        libraries={name: installed(name) for name in LIBRARIES},
        training=Training(
            data_sha256=hashlib.sha256(canonical_csv(data.training, data.training_labels)).hexdigest(),
            rows=len(data.training),
            query=f"sklearn.datasets.load_iris, {HOLDOUT_ROWS} rows held out (stratified, seed {SEED})",
            target=TARGET,
            # Text mode: the same on a checkout with other line ends.
            code_revision="sha256:" + hashlib.sha256(Path(__file__).read_text("utf-8").encode()).hexdigest(),
        ),
        ranges={
            name: (float(column.min()), float(column.max()))
            for name, column in zip(package.feature_names(), data.training.T, strict=True)
        },
    )


def stub_files(golden_rows: package.Rows) -> dict[str, bytes]:
    """The files of v0; its golden set is `golden_rows` and rows exactly on the bounds of the rules."""
    rows = np.vstack([golden_rows, _on_the_bounds(golden_rows[0])])
    runtime = RulesRuntime(RULES, [Input(**entry) for entry in contract_inputs()], package.labels())
    answers = np.array(runtime.infer(rows.astype(np.float32)))
    files = {
        "rules.json": package.canonical_json(RULES),
        "golden.jsonl": package.golden_set(rows.tolist(), answers),
    }
    return package.pack(version=STUB, runtime="rules", files=files, outputs=STUB_OUTPUTS, libraries={})


def _on_the_bounds(row: NDArray[np.float64]) -> package.Rows:
    """`row` with the bounds of each rule as its values: the rows on which < and <= differ."""
    rows = []
    for rule in RULES["rules"]:
        values = {name: max(conditions.values()) for name, conditions in rule["when"].items()}
        rows.append(
            [values.get(name, old) for name, old in zip(package.feature_names(), row.tolist(), strict=True)]
        )
    return np.array(rows)


def canonical_csv(rows: package.Rows, targets: NDArray[Any]) -> bytes:
    """The training rows as UTF-8 CSV with a header and LF: what `data_sha256` is the hash of."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*package.feature_names(), TARGET])
    writer.writerows([*row, target] for row, target in zip(rows.tolist(), targets.tolist(), strict=True))
    return text.getvalue().encode()


def train(
    artifacts: Annotated[Path, typer.Option(help="Folder of the versions.")] = ARTIFACTS,
    version: Annotated[str, typer.Option(help="Name of the new version, like v2.")] = "v1",
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the bytes would differ.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a version that was never released.")
    ] = False,
) -> None:
    """Train the model, prove that ONNX answers as scikit-learn does, write it and its stub v0."""
    if not re.fullmatch(VERSION_PATTERN, version) or version == STUB:
        raise typer.BadParameter(f"a version is v and a number, and not {STUB}", param_hint="--version")
    data = load()
    made = {STUB: stub_files(data.holdout), version: model_files(version, data)}
    changes = {name: package.differing(artifacts / name, files) for name, files in made.items()}
    changed = {name: ", ".join(names) for name, names in changes.items() if names}
    for name, files in changed.items():
        if check:
            raise LifecycleError(f"{name} differs from what this code makes: {files}")
        if not force and (artifacts / name).exists():
            raise LifecycleError(
                f"{name} exists with other bytes ({files}); a version is never changed: take --version for a "
                "new one, or --force if it was never released"
            )
    if check:
        return
    for name, names in changes.items():
        if names:
            package.publish(artifacts, name, made[name])
        typer.echo(f"{artifacts / name}: {'written' if names else 'unchanged'}")
    if package.start_release(artifacts, serving=version, previous=STUB):
        typer.echo(f"{artifacts / 'release.json'}: {version} serves")


if __name__ == "__main__":
    try:
        typer.run(train)
    except LifecycleError as error:
        sys.exit(f"example: {error}")
