"""Every version gives the answers that were recorded when it was made, through the code that serves it."""

import asyncio
import math
from collections.abc import Sequence
from time import perf_counter

import pytest

from app.core.batcher import Batch
from app.core.pipeline import Execution, Pipeline, Policy
from app.core.runtimes import load_runtime
from app.core.store import read_artifact
from app.schemas.predict import Features, Prediction
from tests.golden.answers import ARTIFACTS, VERSIONS, assert_golden, golden_set


class Silent:
    """An observer that nobody reads."""

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """See `Observer`."""

    def shed(self, reason: str) -> None:
        """See `Observer`."""


def pipeline_of(version: str, execution: Execution = "inline") -> Pipeline:
    """The version as the service loads it."""
    artifact = read_artifact(ARTIFACTS, version)
    return Pipeline(artifact, load_runtime(artifact), Silent(), Policy(execution=execution))


async def answers(pipeline: Pipeline, instances: list[Features]) -> list[Prediction]:
    """Predictions of one call."""
    names = [str(index) for index in range(len(instances))]
    return await pipeline.predict(instances, names, perf_counter() + 60)


@pytest.mark.parametrize("execution", ["inline", "batch", "thread"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_repeats_its_golden_answers(version: str, execution: Execution) -> None:
    """Label and probabilities of every golden row come out as recorded, however the rows are run."""
    golden = golden_set(version)
    instances = [Features.model_validate(row["features"]) for row in golden]
    got = asyncio.run(answers(pipeline_of(version, execution), instances))
    for row, prediction in zip(golden, got, strict=True):
        assert_golden(row, prediction.label, prediction.probabilities)
        assert prediction.score == prediction.probabilities[prediction.label]
        assert math.isclose(sum(prediction.probabilities.values()), 1, abs_tol=1e-5)
        assert prediction.model_version == version


@pytest.mark.parametrize("version", VERSIONS)
def test_a_row_is_answered_alike_alone_and_in_company(version: str) -> None:
    """A golden row gets the same answer by itself as among all the others."""
    pipeline = pipeline_of(version)

    async def one_by_one() -> list[Prediction]:
        return [
            (await answers(pipeline, [Features.model_validate(row["features"])]))[0]
            for row in golden_set(version)
        ]

    for row, prediction in zip(golden_set(version), asyncio.run(one_by_one()), strict=True):
        assert_golden(row, prediction.label, prediction.probabilities)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_golden_set_covers_every_label(version: str) -> None:
    """A golden set that missed a label could not notice that the label went wrong."""
    labels = {row["label"] for row in golden_set(version)}
    assert labels == set(read_artifact(ARTIFACTS, version).manifest.outputs.labels)
