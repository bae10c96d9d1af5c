"""Makes the files of an imported version, for the contract of the import.

    repository/ (a copy, with its new predict.py), sample.arrow, answers.npy, Assembly, Converted
    -> golden set, baseline, manifest, v0
    -> the service's own check of them, with only the packages of the image -> openapi.json, documents
    -> evaluation/: the thresholds for a new contract, and the given holdout rows

Runs as a separate process in `repository`: there Python imports the `app` with the new contract, so that
everything here is made for it. The process also has the locale of the image.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from app.core.errors import ArtifactError
from app.core.pipeline import Pipeline
from app.core.store import RELEASE, read_artifact
from app.schemas.contract import contract_inputs
from lifecycle import package
from lifecycle.command import LifecycleError
from lifecycle.importing.serving import Only
from lifecycle.importing.steps import ANSWERS, SAMPLE, UNFIT, Assembly, Converted, step
from lifecycle.operations.documents import documents, snapshot
from lifecycle.package import TOLERANCE, Rule, canonical_json, chosen_labels, labels
from lifecycle.tables import contract_types, instances, read_sample, read_table, truths

GOLDEN_ROWS, MAX_GOLDEN_ROWS = 60, 500
STUB = "v0"
SCORE = "The model's probability of the label; not calibrated beyond training."


def assemble(folder: Path) -> None:
    """Write into folder/repository, or write why the service refuses the version; raises LifecycleError."""
    assembly, model = Assembly.read(folder), Converted.read(folder)
    root = folder / "repository"
    sample = read_sample(folder / SAMPLE)
    content = {name: (folder / name).read_bytes() for name in model.files}
    made = version_files(assembly, model, content, sample, np.load(folder / ANSWERS))
    for name, files in made.items():
        package.publish(root / "artifacts", name, files)
    if STUB in made:
        (root / "artifacts" / RELEASE).unlink(missing_ok=True)
        package.start_release(root / "artifacts", serving=assembly.version, previous=STUB)
    try:
        with Only(assembly.requirements):
            for name in made:
                Pipeline.offline(read_artifact(root / "artifacts", name)).model.replay()
            for path, text in (documents(root) | {"openapi.json": snapshot()}).items():
                (root / path).write_text(text, "utf-8", newline="\n")
    except ArtifactError as error:
        (folder / UNFIT).write_text(str(error), "utf-8")
        return
    except ValueError as error:  # a document may lack a heading
        raise LifecycleError(f"the version that was made is not fit to be served: {error}") from None
    prepare_evaluation(root, assembly, sample.column(assembly.target))


def version_files(
    assembly: Assembly, model: Converted, content: dict[str, bytes], sample: Any, answers: Any
) -> dict[str, dict[str, bytes]]:
    """The files of the new version, and of v0 if the contract is new."""
    names, rule = list(inputs()), model.outputs.get("threshold")
    chosen = golden_rows(sample, answers, rule)
    rows = [list(row.values()) for row in sample.select(names).take(chosen).to_pylist()]
    outputs = {"score": SCORE, "review_threshold": assembly.review_threshold} | model.outputs
    if not labels():
        outputs = {
            "value": f"The model's estimate of {assembly.target}.",
            "feedback_tolerance": assembly.feedback_tolerance or float(f"{answers.std() / 10:.2g}"),
        }
    files = {
        **content,
        "baseline.json": package.baseline([values(sample.column(name)) for name in names], answers, rule),
        "golden.jsonl": package.golden_set(rows, answers[chosen], model.tolerance, rule),
    }
    described = assembly.model_dump(include={"version", "name", "ranges", "words"}) | model.manifest
    packed = package.pack(
        runtime=model.runtime, files=files, outputs=outputs, training=assembly.training, **described
    )
    stub = {STUB: ignorant_stub(assembly.name, rows, answers)} if assembly.new_contract else {}
    return {assembly.version: packed} | stub


def ignorant_stub(name: str, golden_rows: Sequence[Sequence[Any]], answers: Any) -> dict[str, bytes]:
    """The files of v0 for a contract without rules: the same answer to every request.

    The answer is the model's most frequent label, or the mean of its values. `answers` is [rows, labels], or
    [rows, 1] for a regressor. All answers of a classifier need a review.
    """
    if labels():
        counts = np.bincount(answers.argmax(axis=1), minlength=len(labels()))
        chosen = int(counts.argmax())
        # Rounded up, so that it exceeds the scores of the other labels.
        score = min(1.0, math.ceil(100 * counts[chosen] / len(answers) + 1e-9) / 100)
        tolerance = TOLERANCE
        verdict: dict[str, Any] = {"label": labels()[chosen], "score": score}
        row = [(1 - score) / (len(labels()) - 1)] * len(labels())
        row[chosen] = score
        outputs: dict[str, Any] = {
            "score": "How sure the author of the rule is; not measured.",
            "review_threshold": 1.0,
        }
    else:
        value = float(answers.mean())
        verdict, row = {"value": value}, [value]
        tolerance = 1e-9 * max(1.0, abs(value))
        outputs = {"value": "The model's mean answer to its training data, the same for every request."}
    golden = package.golden_set(golden_rows, np.array([row] * len(golden_rows)), tolerance)
    files = {"rules.json": canonical_json({"rules": [], "otherwise": verdict}), "golden.jsonl": golden}
    return package.pack(version=STUB, name=name, runtime="rules", files=files, outputs=outputs, libraries={})


def inputs() -> Mapping[str, dict[str, Any]]:
    """The contract's inputs by name."""
    return {entry["name"]: entry for entry in contract_inputs()}


def values(column: Any) -> Sequence[Any]:
    """A column of the sample: numbers as an array with NaN for missing values, others as a list with None."""
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        return pc.cast(column, pa.float64()).to_numpy()  # type: ignore[no-any-return]
    return column.to_pylist()  # type: ignore[no-any-return]


def golden_rows(sample: Any, answers: Any, rule: Rule = None) -> list[int]:
    """The rows of the golden set: some rows of each answer, and for each column special rows.

    These are the first row with a missing value, and the first row of each category.
    """
    strata = chosen_labels(answers, rule) if labels() else answers[:, 0]
    if not labels():  # group values by tenths
        strata = np.searchsorted(np.quantile(strata, np.linspace(0.1, 0.9, 9)), strata)
    groups = [np.flatnonzero(strata == one) for one in np.unique(strata)]
    share = max(1, GOLDEN_ROWS // len(groups))
    draw = np.random.default_rng(0)
    chosen: dict[int, None] = {}
    for rows in groups:
        chosen.update(dict.fromkeys(draw.permutation(rows)[:share].tolist()))
    for name, entry in inputs().items():
        column = sample.column(name)
        firsts = [
            pc.index(pc.is_null(column), True),
            *(pc.index(column, one) for one in entry["categories"] or ()),
        ]
        chosen.update(dict.fromkeys(first.as_py() for first in firsts if first.as_py() >= 0))
    return sorted(list(chosen)[:MAX_GOLDEN_ROWS])


def prepare_evaluation(root: Path, assembly: Assembly, target: Any) -> None:
    """Adapt evaluation/ to the model; raises LifecycleError if the given rows break the contract."""
    path = root / "evaluation" / "thresholds.toml"
    text = path.read_text("utf-8") if path.is_file() else ""
    if assembly.rewritten:
        text = thresholds(text, assembly.target, target)
    if assembly.rewritten and not assembly.holdout:
        text = _replaced(text, "data", "file", '"holdout.csv"', comment=True)  # the rows of the old contract
    if assembly.holdout:
        held = root / assembly.holdout
        text = _replaced(text, "data", "file", json.dumps(held.name))
        types = contract_types(assembly.target, labels())
        table = read_table(held, types, {*types, assembly.target})
        if assembly.target not in table.column_names:
            raise LifecycleError(f"{assembly.holdout}: has no column {assembly.target!r}")
        for _ in instances(table, assembly.holdout):
            pass  # validates each row
        truths(table.column(assembly.target).to_pylist(), labels(), assembly.holdout, assembly.target)
    if path.is_file():
        path.write_text(text, "utf-8", newline="\n")


def thresholds(text: str, name: str, target: Any) -> str:
    """`thresholds.toml` for a new contract: a version must beat the best constant prediction.

    Any model can be asked this much; people may require more. Conditions on slices are removed, because
    they use the old columns and labels; slices by the target are shown without conditions.
    """
    truths = target.drop_null()
    text = _replaced(text, "data", "target", json.dumps(name, ensure_ascii=False), comment=True)
    if labels():
        share = pc.max(pc.value_counts(truths).field("counts")).as_py() / max(len(truths), 1)
        text = _replaced(text, "classification", "accuracy", f"{math.floor(1000 * share) / 1000:g}")
        text = _replaced(text, "classification", "auc", "0.5")
    else:
        text = _replaced(text, "regression", "rmse", f"{pc.stddev(truths).as_py():.3g}")
    head, found, _ = text.partition("\n[[slices]]\n")
    wish = "accuracy = 0.8" if labels() else "rmse = 2.5"
    shown = f'column = "target"\nminimum_rows = 5 # smaller parts are shown, not judged\n# {wish}\n'
    return f"{head}{found}{shown}" if found else text


def _replaced(text: str, section: str, key: str, value: str, *, comment: bool = False) -> str:
    """The text with a new value for a key in a section; with `comment` the line is commented out."""
    line = rf"(?m)(^\[{section}\]\n(?:(?!\[).*\n)*?)(?:# )?({key} = )(?:\"[^\"]*\"|[^#\n]*?)( #.*)?$"
    return re.sub(
        line, lambda found: f"{found[1]}{'# ' * comment}{found[2]}{value}{found[3] or ''}", text, count=1
    )


if __name__ == "__main__":
    step(assemble)
