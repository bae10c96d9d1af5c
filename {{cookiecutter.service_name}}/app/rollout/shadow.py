"""A version that predicts the same rows as the serving version, after the clients got their answers.

    answers -> at most QUEUE_ROWS waiting -> one call at a time, in a thread -> agree, disagree, error
            -> `dropped`: no place in the queue, or the service is busy

No client gets its answers. It uses at most SHARE of the time: after each call it pauses. If that is too
little for all rows, it gets a sample.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from app.core.batcher import Admission, Batch, Row
from app.core.pipeline import Pipeline
from app.observability.metrics import AGREEMENTS, Metrics, observe_many

SHARE = 0.05  # of the time, per worker
QUEUE_ROWS = 256
CALL_SECONDS = 0.002  # maximum of a call: it may hold Python's lock, which the service needs
BUSY = 0.5  # share of the admission limit in use above which all rows are dropped


class Shadow:
    """Compares the answers of `pipeline` with those that clients got, and counts agreements."""

    def __init__(self, pipeline: Pipeline, admission: Admission, metrics: Metrics) -> None:
        self.pipeline, self._admission, version = pipeline, admission, pipeline.version
        self._counts = {one: metrics.shadow_predictions.labels(version, one) for one in AGREEMENTS}
        self._duration = metrics.call_duration.labels(version)
        value = metrics.shadow_value  # None for a classifier
        self._number = "score" if value is None else "value"
        self._spread = (value or metrics.shadow_score).labels(version)
        self._tolerance = pipeline.artifact.manifest.outputs.feedback_tolerance  # of values
        self._rows = max(1, min(QUEUE_ROWS, int(CALL_SECONDS / max(pipeline.costs.per_row, 1e-9))))
        self._queue: deque[tuple[Row, Any]] = deque()
        self._thread = ThreadPoolExecutor(1, "shadow")
        self._working: asyncio.Task[None] | None = None

    def offer(self, batches: Sequence[Batch]) -> None:
        """Queue answered rows for comparison; drop those that do not fit."""
        asked = [pair for one in batches for pair in zip(one.rows, one.answers, strict=False)]
        pairs = [pair for pair in asked if not isinstance(pair[1], Exception)]
        busy = self._admission.inside > BUSY * self._admission.limit
        places = 0 if busy else QUEUE_ROWS - len(self._queue)
        self._queue.extend(pairs[:places])
        self._counts["dropped"].inc(len(pairs[places:]))
        if self._queue and self._working is None:
            self._working = asyncio.get_running_loop().create_task(self._work())

    def close(self) -> None:
        """Drop the queue; the current call finishes in its thread."""
        if self._working is not None:
            self._working.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.pipeline.batcher.retire()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            pairs = [self._queue.popleft() for _ in range(min(self._rows, len(self._queue)))]
            began = loop.time()
            try:
                batch = await loop.run_in_executor(
                    self._thread, self.pipeline.model.run, [row for row, _ in pairs]
                )
                found = Counter(map(self._compare, [given for _, given in pairs], batch.answers))
                self._duration.observe(sum(batch.stages))
                answers = [one for one in batch.answers if hasattr(one, self._number)]
                observe_many(self._spread, [(getattr(one, self._number), 1) for one in answers])
            except Exception:  # an error of a shadow affects no client
                found = Counter(error=len(pairs))
            for agreement, rows in found.items():
                self._counts[agreement].inc(rows)
            await asyncio.sleep((loop.time() - began) * (1 / SHARE - 1))
        self._working = None

    def _compare(self, given: Any, own: Any) -> str:
        if isinstance(own, Exception):
            return "error"
        if hasattr(own, "label"):
            return "agree" if own.label == given.label else "disagree"
        return "agree" if abs(own.value - given.value) <= self._tolerance else "disagree"
