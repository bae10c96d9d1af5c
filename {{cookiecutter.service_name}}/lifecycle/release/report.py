"""The report of an evaluation: Markdown with tables, and pictures by matplotlib and scikit-learn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, PredictionErrorDisplay

from lifecycle.figures import plot_reliability, reliability
from lifecycle.files import write_file
from lifecycle.printing import table
from lifecycle.release.evaluation import MAX_VALUES, Evaluation, Metrics

MAX_POINTS, MAX_BARS = 5000, 40  # in a picture


def write_report(found: Evaluation, folder: Path) -> None:
    """Write report.md and its pictures (PNG) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*sections(found)]
    for name, figure in pictures(found):
        figure.savefig(folder / f"{name}.png", dpi=110)
        lines.append(f"![{name}.png]({name}.png)")
    write_file(folder / "report.md", ("\n\n".join(lines) + "\n").encode())


def sections(found: Evaluation) -> Iterator[str]:
    """Headings, paragraphs and tables, in order."""
    data, version, served = found.data, found.verdict.version, found.verdict.served
    both, main, own = [version, *([served] if served else [])], _main(found), found.verdict.metrics

    def cells(name: str, *metrics: Metrics) -> list[str]:
        return [f"{one[name]:.4g}" if name in one else "-" for one in metrics[: len(both)]]

    yield f"# Evaluation of {version}: {'failed' if found.failed else 'passed'}"
    beside = f"beside {served}, which serves" if served else f"no comparison: {found.note}"
    yield (
        f"{data.table.num_rows:,} rows of `{data.name}` (sha256 `{data.sha256[:12]}`), truth in "
        f"`{data.target}`; {beside}.\n"
        f"To review: {found.answers.reviewed:.1%} of them."
    )
    gates = [("ok" if one.passed else "**FAILED**", one.name, one.found, one.needed) for one in found.gates]
    yield f"## Gates\n{table(('', 'gate', 'found', 'needed'), gates)}"
    metrics = [(name, *cells(name, own, found.verdict.served_metrics)) for name in own]
    yield f"## Metrics\n{table(('metric', *both), metrics)}"
    for one, parts in found.slices:
        head = (one.column, "rows", *(f"{main} of {name}" for name in both), "")
        rows = [
            (part.name, f"{part.rows:,}", *cells(main, part.metrics, part.served), _note(part.judged))
            for part in parts
        ]
        yield f"## By {one.column}\n{table(head, rows)}"


def pictures(found: Evaluation) -> Iterator[tuple[str, Figure]]:
    """Name and figure: calibration, errors of labels or values, and each slice."""
    known, version, labels = found.answers.known, found.verdict.version, found.data.labels
    truths, values = found.data.truths[known], found.answers.values[known]
    if not len(truths):
        return
    if labels:
        figure, axes = _figure(f"{version}: score and share of right answers")
        plot_reliability(axes, reliability(values.max(axis=1), values.argmax(axis=1) == truths))
        yield "calibration", figure
        figure, axes = _figure(f"{version}: rows by truth and answer")
        ConfusionMatrixDisplay.from_predictions(
            truths,
            values.argmax(axis=1),
            labels=range(len(labels)),
            display_labels=labels,
            include_values=len(labels) <= MAX_VALUES,
            xticks_rotation="horizontal" if len(labels) < 5 else "vertical",
            cmap="Blues",
            ax=axes,
            colorbar=False,
        )
        yield "confusion", figure
    else:
        for name, kind in (("calibration", "actual_vs_predicted"), ("residuals", "residual_vs_predicted")):
            figure, axes = _figure(f"{version}: {kind.replace('_', ' ')}")
            PredictionErrorDisplay.from_predictions(
                truths, values, kind=kind, ax=axes, subsample=min(MAX_POINTS, len(truths)), random_state=0
            )
            yield name, figure
    main = _main(found)
    for number, (one, parts) in enumerate(found.slices, 1):
        shown = [part for part in parts if main in part.metrics][:MAX_BARS]
        bars = {version: [part.metrics[main] for part in shown]}
        if found.verdict.served:
            bars[found.verdict.served] = [part.served.get(main, 0.0) for part in shown]
        frame = pd.DataFrame(bars, index=[f"{part.name} ({part.rows})" for part in shown])
        figure, axes = _figure(f"{main} by {one.column}", 1.5 + 0.45 * len(shown))
        if shown:
            frame.plot.barh(ax=axes, xlabel=main).invert_yaxis()
        yield f"slice-{number}", figure


def _figure(title: str, height: float = 4.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, height), layout="constrained")
    return figure, figure.add_subplot(title=title)


def _main(found: Evaluation) -> str:
    return "accuracy" if found.data.labels else "rmse"


def _note(judged: bool) -> str:
    return "" if judged else "too few to judge"
