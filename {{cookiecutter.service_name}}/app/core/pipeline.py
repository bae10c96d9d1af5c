"""From typed instances to typed predictions: preprocess -> infer -> postprocess, one deployed artifact.

    predict(instances) -> rows -> [inline | micro-batched | micro-batched in a thread] -> Prediction each

Which of the three is chosen once, at warm-up, from what the model costs on this machine.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from app.core.batcher import Batch, Batcher, Observer, Row
from app.core.errors import ArtifactError, ServiceError
from app.core.runtimes import Matrix, Runtime
from app.core.store import Artifact
from app.schemas.predict import Features, Prediction

Execution = Literal["inline", "batch", "thread"]

MAX_LOOP_SECONDS = 0.002  # a call that holds the event loop longer than this goes to the thread
MAX_CALL_SECONDS = 0.05  # rows are joined up to this: longer calls save nothing and keep others waiting
MIN_BATCH_GAIN = 1.25  # batching must save this factor per row, or rows are run as they come
GOLDEN = "golden.jsonl"
WARM_UP_CALLS, WARM_UP_SECONDS = 20, 0.25


@dataclass(frozen=True, slots=True)
class Policy:
    """The decisions an operator may change without a new model; None leaves one to manifest or warm-up."""

    review_threshold: float | None = None
    out_of_range: Literal["accept", "review", "reject"] = "review"
    batch_max_rows: int = 64
    batch_max_wait_seconds: float = 0.0
    execution: Execution | None = None


def choose_execution(seconds_per_call: float, seconds_per_row: float, max_rows: int) -> Execution:
    """How to run a model that costs so much for a call with one row, and per row of a full call."""
    if max(seconds_per_call, seconds_per_row * max_rows) > MAX_LOOP_SECONDS:
        return "thread"
    return "batch" if seconds_per_call > MIN_BATCH_GAIN * seconds_per_row else "inline"


def rows_of_a_call(seconds_per_row: float, max_rows: int) -> int:
    """How many rows to join at most, of a model that costs so much per row of a full call."""
    return max(1, min(max_rows, int(MAX_CALL_SECONDS / max(seconds_per_row, 1e-9))))


class Pipeline:
    """A loaded model behind one `async predict(instances)`."""

    def __init__(self, artifact: Artifact, runtime: Runtime, observer: Observer, policy: Policy) -> None:
        self.artifact, self.version = artifact, artifact.manifest.version
        self.load_seconds = 0.0  # to verify, load and warm up; known to whoever does it
        inputs, outputs = artifact.manifest.inputs, artifact.manifest.outputs
        self._runtime, self._observer, self._policy = runtime, observer, policy
        self._names: list[str] = [entry.name for entry in inputs]
        self._labels: list[Any] = list(outputs.labels)
        own = policy.review_threshold
        self._threshold = outputs.review_threshold if own is None else own
        # For the record of what was decided by them.
        self.thresholds = {"review": self._threshold, "out_of_range": policy.out_of_range}
        ranges = [entry.training_range or (-math.inf, math.inf) for entry in inputs]
        self._low, self._high = np.array(ranges, np.float32).T
        self.seconds_per_call, self.seconds_per_row = self._warm_up([entry.example for entry in inputs])
        self.execution = policy.execution or choose_execution(
            self.seconds_per_call, self.seconds_per_row, policy.batch_max_rows
        )
        self.batcher = Batcher(
            self._run,
            observer,
            max_rows=rows_of_a_call(self.seconds_per_row, policy.batch_max_rows),
            max_wait_seconds=policy.batch_max_wait_seconds,
            threaded=self.execution == "thread",
        )

    async def predict(
        self, instances: Sequence[BaseModel], ids: Sequence[str], deadline: float, *, single: bool = False
    ) -> list[Prediction]:
        """One prediction per validated instance, in order; `deadline` is a time of `perf_counter`.

        Raises ServiceError; where several rows fail, the first one's.
        """
        rows = [tuple(instance.__dict__.values()) for instance in instances]
        if self._policy.out_of_range == "reject":
            self._reject(rows, single)
        if self.execution == "inline" and len(rows) <= self._policy.batch_max_rows:
            batch = self._run(rows)
            self._observer.batch(batch, (0.0,))
            answers = batch.answers
        else:
            answers = await self.batcher.submit(rows, deadline)
        for answer, prediction_id in zip(answers, ids, strict=True):
            if isinstance(answer, ServiceError):
                raise answer
            answer.prediction_id = prediction_id
        return answers

    def replay(self) -> None:
        """Raise ArtifactError unless every golden row gets the answer recorded when the version was made."""
        lines = [json.loads(line) for line in self.artifact.files.get(GOLDEN, b"").splitlines()]
        rows = [tuple(Features.model_validate(line["features"]).__dict__.values()) for line in lines]
        answers = self._run(rows).answers if rows else []
        for index, (line, answer) in enumerate(zip(lines, answers, strict=True), 1):
            if isinstance(answer, ServiceError) or any(
                abs(answer.probabilities[label] - recorded) > line["tolerance"]
                for label, recorded in line["probabilities"].items()
            ):
                raise ArtifactError(f"{self.version}/{GOLDEN}: line {index} has another answer than recorded")

    def _run(self, rows: Sequence[Row]) -> Batch:
        start = perf_counter()
        matrix = np.asarray(rows, np.float32)
        beyond = (matrix < self._low) | (matrix > self._high)  # NaN, a missing value, is neither
        outside, counts = self._outside(beyond) if beyond.any() else (frozenset(), {})
        ready = perf_counter()
        probabilities = self._infer(matrix)
        inferred = perf_counter()
        answers = [self._answer(one, index in outside) for index, one in enumerate(probabilities)]
        return Batch(
            answers,
            (ready - start, inferred - ready, perf_counter() - inferred),
            counts,
            matrix,
            self.version,
        )

    def _outside(self, beyond: Any) -> tuple[frozenset[int], dict[str, int]]:
        """Rows to review for a value outside the training range, and the number of such values by feature."""
        counts = {name: n for name, n in zip(self._names, beyond.sum(axis=0).tolist(), strict=True) if n}
        rows = np.flatnonzero(beyond.any(axis=1)).tolist()
        return frozenset(rows if self._policy.out_of_range == "review" else ()), counts

    def _infer(self, matrix: Matrix) -> list[Any]:
        """Probabilities per row; where the model raises, halves find the row whose fault it is."""
        try:
            rows = self._runtime.infer(matrix)
            if len(rows) != len(matrix) or len(rows[0]) != len(self._labels):
                raise ValueError("the model answered in another shape than it was asked")
            return rows
        except Exception as error:  # whatever a model raises is this row's answer, not the service's end
            if len(matrix) == 1:
                failure = ServiceError("model_error")
                failure.__cause__ = error
                return [failure]
            half = len(matrix) // 2
            return self._infer(matrix[:half]) + self._infer(matrix[half:])

    def _answer(self, probabilities: Any, outside: bool) -> Prediction | ServiceError:
        if isinstance(probabilities, ServiceError):
            return probabilities
        if not math.isfinite(sum(probabilities)):  # one NaN or infinity among them is enough
            return ServiceError("non_finite_output")
        score = max(probabilities)
        label = self._labels[probabilities.index(score)]
        action: Literal["accept", "review"] = "review" if outside or score < self._threshold else "accept"
        by_label = dict(zip(self._labels, probabilities, strict=True))
        return Prediction("", self.version, label, score, by_label, action)

    def _reject(self, rows: Sequence[Row], single: bool) -> None:
        matrix = np.asarray(rows, np.float32)
        where = np.argwhere((matrix < self._low) | (matrix > self._high)).tolist()
        message = {"msg": "outside the range seen in training", "type": "out_of_range"}
        locations = [([] if single else ["instances", row], self._names[column]) for row, column in where]
        errors = [{"loc": ["body", *row, name], **message} for row, name in locations]
        if errors:
            raise ServiceError("invalid_input", errors=errors)

    def _warm_up(self, example: list[Any]) -> tuple[float, float]:
        """Seconds of a call with one row, and per row of a full call; the best of several sheds the noise."""
        best = {}
        for rows in (1, self._policy.batch_max_rows):
            matrix, began, times = np.asarray([example] * rows, np.float32), perf_counter(), [math.inf]
            while len(times) <= WARM_UP_CALLS and perf_counter() - began < WARM_UP_SECONDS:
                start = perf_counter()
                self._infer(matrix)
                times.append(perf_counter() - start)
            if any(isinstance(answer, ServiceError) for answer in self._run([tuple(example)] * rows).answers):
                raise ArtifactError(f"{self.version}: the model cannot predict the manifest's own example")
            best[rows] = min(times) / rows
        return best[1], best[self._policy.batch_max_rows]
