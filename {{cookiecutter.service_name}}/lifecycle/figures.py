"""The calibration of scores, for an evaluation and for the quality in service.

Imports pandas, which takes a second: import it where it is needed.
"""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

BINS = 10  # of the score


def reliability(scores: ArrayLike, right: ArrayLike) -> pd.DataFrame:
    """Tenths of the score that have rows, by number from 0: count, mean score, share of right answers."""
    rows = pd.DataFrame({"score": scores, "right": right})
    tenths = np.minimum((rows.score * BINS).astype(int), BINS - 1)
    return rows.groupby(tenths).agg(count=("score", "size"), score=("score", "mean"), right=("right", "mean"))


def calibration_error(bins: pd.DataFrame) -> float:
    """Expected calibration error: the distance of score and share of right answers, averaged over rows."""
    return float(np.average((bins.score - bins.right).abs(), weights=bins["count"]))


def plot_reliability(axes: Any, bins: pd.DataFrame) -> None:
    """Draw mean score against share of right answers; the area of a dot grows with its rows."""
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--")
    axes.plot(bins.score, bins.right)
    axes.scatter(bins.score, bins.right, 20 + 200 * bins["count"] / bins["count"].sum())
    axes.set(xlabel="score", ylabel="share of right answers", xlim=(0, 1.02), ylim=(-0.02, 1.05))
