"""v0: rules in place of a model, under the same contract. Yours to edit.

Teams integrate against it before a model exists, and it is what a rollback falls back to.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifecycle.package import TOLERANCE, Rows, canonical_json, feature_names, golden_set, labels, pack

VERSION = "v0"

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
OUTPUTS = {
    "score": "How sure the author of the rule is; not measured.",
    "review_threshold": 0.6,
}
_HOLDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq}


def stub_files(golden_rows: Rows) -> dict[str, bytes]:
    """The files of v0; its golden set is `golden_rows` and rows exactly on the bounds of the rules."""
    rows = np.vstack([golden_rows, _on_the_bounds(golden_rows[0])])
    answers = np.array([decide(row) for row in rows.tolist()])
    files = {"rules.json": canonical_json(RULES), "golden.jsonl": golden_set(rows.tolist(), answers)}
    return pack(version=VERSION, runtime="rules", files=files, outputs=OUTPUTS, libraries={})


def ignorant_stub(name: str, golden_rows: Sequence[Sequence[Any]], answers: Rows) -> dict[str, bytes]:
    """The files of v0 for a contract without rules: the same answer to every request.

    It is the label that the model answered most often, or the mean of its values. `answers` is [rows,
    labels], or [rows, 1] of a regressor. All answers of a classifier are for review.
    """
    if labels():
        counts = np.bincount(answers.argmax(axis=1), minlength=len(labels()))
        chosen = int(counts.argmax())
        # Rounded up, so that it is more than what the others share.
        score = min(1.0, math.ceil(100 * counts[chosen] / len(answers) + 1e-9) / 100)
        tolerance = TOLERANCE
        verdict: dict[str, Any] = {"label": labels()[chosen], "score": score}
        row = [(1 - score) / (len(labels()) - 1)] * len(labels())
        row[chosen] = score
        outputs: dict[str, Any] = {"score": OUTPUTS["score"], "review_threshold": 1.0}
    else:
        value = float(answers.mean())
        verdict, row = {"value": value}, [value]
        tolerance = 1e-9 * max(1.0, abs(value))
        outputs = {"value": "The model's mean answer to its training data, the same for every request."}
    golden = golden_set(golden_rows, np.array([row] * len(golden_rows)), tolerance)
    files = {"rules.json": canonical_json({"rules": [], "otherwise": verdict}), "golden.jsonl": golden}
    return pack(version=VERSION, name=name, runtime="rules", files=files, outputs=outputs, libraries={})


def _on_the_bounds(row: NDArray[np.float64]) -> Rows:
    """`row` with the bounds of each rule as its values: the rows on which < and <= differ."""
    rows = []
    for rule in RULES["rules"]:
        values = {name: max(conditions.values()) for name, conditions in rule["when"].items()}
        rows.append([values.get(name, old) for name, old in zip(feature_names(), row.tolist(), strict=True)])
    return np.array(rows)


def decide(row: list[float]) -> list[float]:
    """Probabilities for one row, read from the rules without the runtime that the golden set is to check."""
    instance = dict(zip(feature_names(), row, strict=True))
    verdict = RULES["otherwise"]
    for rule in reversed(RULES["rules"]):
        if all(
            _HOLDS[symbol](instance[name], bound)
            for name, conditions in rule["when"].items()
            for symbol, bound in conditions.items()
        ):
            verdict = rule
    rest = (1 - verdict["score"]) / (len(labels()) - 1)
    return [verdict["score"] if label == verdict["label"] else rest for label in labels()]
