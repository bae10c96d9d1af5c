"""From typed instances to typed predictions: preprocess -> infer -> postprocess, one deployed artifact.

    predict(instances) -> rows -> [inline | micro-batched | micro-batched in a thread] -> Prediction each

Which of the three is chosen once, at warm-up, from what the model costs on this machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from app.core.batcher import Batch, Batcher, Observer, Row
from app.core.errors import InvalidInput, ModelError, NonFiniteOutput, ServiceError
from app.core.runtimes import Matrix, Runtime
from app.core.store import Artifact
from app.schemas.predict import Prediction

Execution = Literal["inline", "batch", "thread"]

MAX_LOOP_SECONDS = 0.002  # a call that holds the event loop longer than this goes to the thread
MIN_BATCH_GAIN = 1.25  # batching must save this factor per row, or rows are run as they come
WARM_UP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Policy:
    """The decisions an operator may change without a new model."""

    review_threshold: float | None = None  # None: the manifest's
    out_of_range: Literal["accept", "review", "reject"] = "review"
    batch_max_rows: int = 64
    batch_max_wait_seconds: float = 0.0
    execution: Execution | None = None  # None: chosen by the warm-up


class Pipeline:
    """A loaded model behind one `async predict(instances)`."""

    def __init__(self, artifact: Artifact, runtime: Runtime, observer: Observer, policy: Policy) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.version = manifest.version
        self._runtime, self._observer, self._policy = runtime, observer, policy
        self._names = [entry.name for entry in manifest.inputs]
        self._labels = manifest.outputs.labels
        self._threshold = (
            manifest.outputs.review_threshold if policy.review_threshold is None else policy.review_threshold
        )
        ranges = [entry.training_range or (-math.inf, math.inf) for entry in manifest.inputs]
        self._low = np.array([low for low, _ in ranges], np.float32)
        self._high = np.array([high for _, high in ranges], np.float32)
        self._example: Row = tuple(entry.example for entry in manifest.inputs)
        self.seconds_per_call, self.seconds_per_row = self._warm_up()
        self.execution = policy.execution or self._choose()
        self.batcher = Batcher(
            self._run,
            observer,
            max_rows=policy.batch_max_rows,
            max_wait_seconds=policy.batch_max_wait_seconds,
            threaded=self.execution == "thread",
        )

    async def predict(
        self, instances: Sequence[BaseModel], ids: Sequence[str], deadline: float
    ) -> list[Prediction]:
        """One prediction per validated instance, in order.

        `deadline` is a time of `perf_counter`. Raises ServiceError; of several bad rows the first one's.
        """
        rows = [tuple(instance.__dict__.values()) for instance in instances]
        if self._policy.out_of_range == "reject":
            self._reject_out_of_range(rows)
        if self.execution == "inline":
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

    def close(self) -> None:
        """Release the thread, if there is one."""
        self.batcher.close()

    def _run(self, rows: Sequence[Row]) -> Batch:
        start = perf_counter()
        matrix = np.asarray(rows, np.float32)
        outside, counts = self._outside(matrix)
        ready = perf_counter()
        probabilities = self._infer(matrix)
        inferred = perf_counter()
        answers = [self._answer(one, index in outside) for index, one in enumerate(probabilities)]
        return Batch(answers, (ready - start, inferred - ready, perf_counter() - inferred), counts)

    def _outside(self, matrix: Matrix) -> tuple[set[int], dict[str, int]]:
        """Rows to review for a value outside the training range, and such values by feature; NaN is missing."""
        beyond = (matrix < self._low) | (matrix > self._high)
        if not beyond.any():
            return set(), {}
        counts = {name: n for name, n in zip(self._names, beyond.sum(axis=0).tolist(), strict=True) if n}
        rows = np.flatnonzero(beyond.any(axis=1)).tolist() if self._policy.out_of_range == "review" else ()
        return set(rows), counts

    def _infer(self, matrix: Matrix) -> list[Any]:
        """Probabilities per row; where the model raises, halves find the row whose fault it is."""
        try:
            answer: list[Any] = self._runtime.infer(matrix).tolist()
            return answer
        except Exception as error:  # whatever a model raises is this row's answer, not the service's end
            if len(matrix) == 1:
                failure = ModelError()
                failure.__cause__ = error
                return [failure]
            half = len(matrix) // 2
            return self._infer(matrix[:half]) + self._infer(matrix[half:])

    def _answer(self, probabilities: Any, outside: bool) -> Prediction | ServiceError:
        if isinstance(probabilities, ServiceError):
            return probabilities
        score = max(probabilities)
        # A sum is finite only if every term is; comparing alone would let a NaN hide behind a larger number.
        if not math.isfinite(sum(probabilities)):
            return NonFiniteOutput()
        return Prediction(
            "",
            self.version,
            self._labels[probabilities.index(score)],  # type: ignore[arg-type]  # the contract's labels, verified
            score,
            dict(zip(self._labels, probabilities, strict=True)),  # type: ignore[arg-type]  # likewise
            "review" if outside or score < self._threshold else "accept",
        )

    def _reject_out_of_range(self, rows: Sequence[Row]) -> None:
        errors = [
            {"loc": ["body", *([] if len(rows) == 1 else ["instances", index]), name], "msg": "outside the range seen in training",
             "type": "out_of_range"}
            for index, row in enumerate(rows)
            for name, value, low, high in zip(self._names, row, self._low, self._high, strict=True)
            if value is not None and not low <= np.float32(value) <= high
        ]  # fmt: skip
        if errors:
            raise InvalidInput(errors=errors)

    def _warm_up(self) -> tuple[float, float]:
        """Seconds of a call with one row, and per row of a full call: the best of several, to shed the noise."""
        best = []
        for rows in ([self._example], [self._example] * self._policy.batch_max_rows):
            matrix, fastest, began = np.asarray(rows, np.float32), math.inf, perf_counter()
            for _ in range(20):
                start = perf_counter()
                self._infer(matrix)
                fastest = min(fastest, perf_counter() - start)
                if perf_counter() - began > WARM_UP_SECONDS / 2:
                    break
            best.append(fastest)
        return best[0], best[1] / self._policy.batch_max_rows

    def _choose(self) -> Execution:
        longest = max(self.seconds_per_call, self.seconds_per_row * self._policy.batch_max_rows)
        if longest > MAX_LOOP_SECONDS:
            return "thread"
        return "batch" if self.seconds_per_call > MIN_BATCH_GAIN * self.seconds_per_row else "inline"
