"""Instances such as training had them, where training's own rows are not at hand.

    baseline.json -> values of each feature by its bins -> what the model answers to them
    -> weights by which every feature, the answers and the scores have the shares of training -> instances

Features are drawn one by one, so what they had to do with each other is lost but for what the weights keep.
"""

import json
import math
import random
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.pipeline import Pipeline
from app.core.store import Input, read_artifact
from app.schemas.contract import label_key
from app.schemas.predict import Features

DRAWN, ROUNDS = 3000, 50
SEED = 0
Instance = dict[str, Any]


def usual(artifacts: Path, version: str, count: int = 1000) -> list[Instance]:
    """So many instances with the shares of the baseline of `version`; the same each time."""
    artifact, chance = read_artifact(artifacts, version), random.Random(SEED)  # noqa: S311  # no secret
    baseline = json.loads(artifact.files["baseline.json"])
    inputs = artifact.manifest.inputs
    known = [json.loads(line)["features"] for line in artifact.files["golden.jsonl"].splitlines()]
    drawn = known + [
        {one.name: _drawn(baseline["features"][one.name], one, chance) for one in inputs}
        for _ in range(DRAWN)
    ]
    answers: list[Any] = Pipeline.offline(artifact).answers([Features.model_validate(row) for row in drawn])
    dimensions = [
        (
            [_bin(baseline["features"][one.name], row[one.name]) for row in drawn],
            baseline["features"][one.name],
        )
        for one in inputs
    ]
    if "values" in baseline:
        spread = baseline["values"]
        dimensions.append(([_bin(spread, one.value) for one in answers], spread))
    else:
        labels = list(baseline["labels"])
        shares = {"counts": list(baseline["labels"].values())}
        dimensions.append(([labels.index(label_key(one.label)) for one in answers], shares))
        scores = baseline["scores"]
        dimensions.append(([_bin(scores, one.score) for one in answers], scores))
    weights = _raked(dimensions, len(drawn))
    return chance.choices(drawn, weights.tolist(), k=count)


def _raked(dimensions: list[tuple[list[int], Instance]], count: int) -> NDArray[np.float64]:
    """Weights by which the shares of every dimension's bins are those of its counts, as nearly as can be."""
    weights = np.full(count, 1 / count)
    for _ in range(ROUNDS):
        for bins, spread in dimensions:
            wanted = np.array([*spread["counts"], spread.get("other", 0), spread.get("missing", 0)], float)
            there = np.bincount(bins, weights, len(wanted))
            factors = np.divide(wanted / wanted.sum(), there, out=np.ones_like(wanted), where=there > 0)
            weights = weights * factors[bins]
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _drawn(feature: Instance, one: Input, chance: random.Random) -> Any:
    """A value of a feature, each bin as often as in training."""
    counts = [*feature["counts"], feature.get("other", 0), feature.get("missing", 0)]
    (at,) = chance.choices(range(len(counts)), counts)
    if at == len(counts) - 1:
        return None
    if "categories" in feature:
        strangers = [name for name in one.categories or () if name not in feature["categories"]]
        return [*feature["categories"], chance.choice(strangers or ["something else"])][at]
    least, most = one.training_range or (0.0, 1.0)
    edges = [least, *feature["edges"], most]
    low, high = max(edges[at], least), min(edges[at + 1], most)
    if one.dtype == "bool":
        return high > 0
    if one.dtype == "int64":
        return chance.randint(min(math.floor(low) + (at > 0), math.floor(high)), math.floor(high))
    return high - chance.random() * (high - low) if at else low + chance.random() * (high - low)


def _bin(feature: Instance, value: Any) -> int:
    """The bin of a value; after the bins come those that are in none, and those that are missing."""
    bins = len(feature["counts"])
    if value is None:
        return bins + 1
    if "categories" in feature:
        known = feature["categories"]
        return known.index(value) if value in known else bins
    return bisect_left(feature["edges"], value)
