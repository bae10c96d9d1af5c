"""How often a model is right where it serves, and whether its scores mean what they say.

predictions in the log + true labels by prediction_id -> by version, of labels accuracy, calibration and
  confusion, of values errors -> tables, pictures
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lifecycle.errors import LifecycleError
from lifecycle.figures import BINS, calibration_error, plot_reliability, reliability
from lifecycle.operations.sources import log_lines, read
from lifecycle.printing import save_picture, table

MOST_DOTS = 5000  # in a picture


def judged(logs: Path, labels: Path | None) -> dict[str, pd.DataFrame]:
    """By version, the predictions in the log whose truth is known; without `labels`, the truth is feedback.

    A classifier's frame has the columns label, truth (as text) and score, a regressor's value and truth.
    """
    made: dict[str, dict[str, Any]] = {}
    truths: dict[str, str] = {}
    for line in log_lines(logs):
        for one in line.get("predictions", []) if isinstance(line.get("thresholds"), dict) else []:
            made[one["prediction_id"]] = {"version": line["model_version"], **one}
        if line.get("news"):
            truths[line["prediction_id"]] = _label(line["feedback"])
    if not made:
        raise LifecycleError(f"{logs}: no predictions in this log; they are logged at APP_LOG_LEVEL=INFO")
    if labels is not None:
        truths = dict(_labels(labels))
    known = [one | {"truth": truths[id_]} for id_, one in made.items() if id_ in truths]
    if not known:
        source = labels or "feedback"
        raise LifecycleError(f"none of the {len(made)} predictions in {logs} has a label from {source}")
    for one in known:
        if "label" in one:
            one["label"] = _label(one["label"])
        else:
            try:
                one["truth"] = float(one["truth"])
            except ValueError:
                raise LifecycleError(f"{one['prediction_id']} has a truth that is no number") from None
    return dict([*pd.DataFrame(known).groupby("version")])


def _labels(path: Path) -> Iterator[tuple[str, str]]:
    """prediction_id and label, from JSON lines or from CSV with these columns; the last of an id counts."""
    content = read(path)
    rows: Iterable[Any]
    if content.lstrip().startswith("{"):
        rows = ((number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip())
    else:
        rows = enumerate(csv.DictReader(content.splitlines()), 2)
    for number, row in rows:
        try:
            found = json.loads(row) if isinstance(row, str) else row
            prediction_id, label = found["prediction_id"].strip(), found["label"]
        except (ValueError, KeyError, TypeError, AttributeError):
            label = None
        if label in (None, ""):
            raise LifecycleError(f"{path}:{number}: needs prediction_id and label, as CSV or JSON lines")
        yield prediction_id, _label(label)


def _label(label: Any) -> str:
    """A label as text, the same from CSV and from JSON: 1 is 1 and true is true."""
    return label.strip() if isinstance(label, str) else json.dumps(label)


def report(version: str, known: pd.DataFrame) -> str:
    """Accuracy, calibration and confusion of a classifier's version, or the errors of a regressor's."""
    return _classified(version, known) if "label" in known else _measured(version, known)


def _classified(version: str, known: pd.DataFrame) -> str:
    bins = reliability(known.score, known.label == known.truth)
    scores = [
        (f"{tenth / BINS:.1f} to {(tenth + 1) / BINS:.1f}", f"{count:,}", f"{score:.3f}", f"{right:.3f}")
        for tenth, count, score, right in bins.itertuples(name=None)
    ]
    labels, accuracy = sorted({*known.truth, *known.label}), (known.label == known.truth).mean()
    cells = pd.crosstab(known.truth, known.label).reindex(index=labels, columns=labels, fill_value=0)
    return "\n\n".join(
        (
            f"{version}: {len(known):,} predictions with a label, "
            f"accuracy {accuracy:.3f}, calibration error {calibration_error(bins):.3f}",
            table(("score", "predictions", "mean score", "right"), scores),
            table(("true, predicted", *labels), cells.itertuples(name=None)),
        )
    )


def _measured(version: str, known: pd.DataFrame) -> str:
    """RMSE, MAE and bias, in all and by tenths of the predictions in ascending order."""
    ordered = known.sort_values("value")
    tenths = np.array_split(np.arange(len(ordered)), min(BINS, len(ordered)))
    rows = []
    for own in (ordered.iloc[tenth] for tenth in tenths):
        low, high = own.value.iloc[0], own.value.iloc[-1]
        rows.append((f"{low:.4g} to {high:.4g}", f"{len(own):,}", *_errors(own)))
    rmse, mae, bias = _errors(known)
    return (
        f"{version}: {len(known):,} predictions with a true value, RMSE {rmse}, MAE {mae}, bias {bias}\n\n"
        + table(("predicted", "predictions", "RMSE", "MAE", "bias"), rows)
    )


def _errors(known: pd.DataFrame) -> tuple[str, str, str]:
    """Root of the mean square, mean of the absolute, and mean of the errors; too large is positive."""
    errors = known.value - known.truth
    return f"{(errors**2).mean() ** 0.5:.4g}", f"{errors.abs().mean():.4g}", f"{errors.mean():+.4g}"


def draw(version: str, known: pd.DataFrame, folder: Path) -> Path:
    """Write a picture of calibration and confusion, or of a regressor's errors; its path."""
    from matplotlib.figure import Figure  # here, because these take a second
    from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    if "label" in known:
        left, right = figure.subplots(1, 2)
        plot_reliability(left, reliability(known.score, known.label == known.truth))
        ConfusionMatrixDisplay.from_predictions(
            known.truth, known.label, ax=right, cmap="Blues", colorbar=False
        )
    else:
        PredictionErrorDisplay.from_predictions(
            known.truth,
            known.value,
            ax=figure.subplots(),
            subsample=min(MOST_DOTS, len(known)),
            random_state=0,
        )
    figure.suptitle(f"{version}, {len(known):,} predictions")
    return save_picture(figure, folder, f"quality-{version}")
