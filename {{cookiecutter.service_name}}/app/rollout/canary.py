"""A new version for a share of the clients; it stops if it does worse than the serving version.

    client -> sha256 with the version -> below the released percentage: the canary, else the serving version
    status, seconds -> Counts, in memory that all workers share -> once a second: worse? -> stop

A client gets the same version from every worker and replica, and keeps it when the percentage grows.
"""

import math
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.core.pipeline import Pipeline
from app.monitoring.feedback import SharedMemory
from app.observability.metrics import Metrics

JUDGE_SECONDS = 1.0
MIN_REQUESTS = 100  # of each version before it is judged
SIGMAS = 3.0  # chance alone exceeds this once in a thousand times
ERROR_MARGIN = 0.01  # the canary's share of failures may exceed the served version's by this
# By definition this share of the served version's answers is slower than its p95. The same share of the
# canary's answers may be slower than that p95 times the factor plus the seconds.
SLOW_SHARE, LATENCY_FACTOR, LATENCY_SECONDS = 0.05, 1.5, 0.005
REASONS = (None, "errors", "latency")

_SHORTEST, _STEP, _BUCKETS = 1e-4, 1.2, 72  # seconds: from a tenth of a millisecond to 42
_BOUNDS = _SHORTEST * _STEP ** np.arange(_BUCKETS)
_WIDTH = 1 + _BUCKETS
Arm = NDArray[np.int64]  # requests for a version: [failures, answers by latency]


def p95(arm: Arm) -> float:
    """The 95th percentile of latency in seconds, overestimated by at most a fifth."""
    reached = np.cumsum(arm[1:])
    return float(_BOUNDS[np.searchsorted(reached, (1 - SLOW_SHARE) * reached[-1])])


def worse(served: Arm, canary: Arm) -> int:
    """Index in REASONS: why the canary is worse by more than the margin and chance; 0 if it is not."""
    theirs, own = int(served.sum()), int(canary.sum())
    if own < MIN_REQUESTS:
        return 0
    both = int(served[0] + canary[0]) / (theirs + own)
    chance = math.sqrt(both * (1 - both) * (1 / own + (1 / theirs if theirs else 0)))
    if canary[0] / own - served[0] / max(theirs, 1) > max(ERROR_MARGIN, SIGMAS * chance):
        return 1
    bucket = np.searchsorted(_BOUNDS, LATENCY_FACTOR * p95(served) + LATENCY_SECONDS)
    slow = int(canary[bucket + 2 :].sum()) / own
    chance = math.sqrt(SLOW_SHARE * (1 - SLOW_SHARE) / own)
    return 2 if theirs >= MIN_REQUESTS and slow > SLOW_SHARE + SIGMAS * chance else 0


class Counts:
    """Requests for both versions, summed over all workers, while the same canary is released."""

    def __init__(self) -> None:
        self._shared = SharedMemory(8 * (2 + 2 * _WIDTH))
        numbers = np.frombuffer(self._shared.content, np.int64)
        self._head, self._arms = numbers[:2], numbers[2:].reshape(2, _WIDTH)  # head: key, reason of the stop

    def begin(self, key: int) -> bool:
        """Count for `key`, from 0 if no other worker has begun; returns whether this canary has stopped."""
        with self._shared.locked():
            if self._head[0] != key:
                self._head[:], self._arms[:] = (key, 0), 0
            return bool(self._head[1])

    def add(self, key: int, own: Any) -> dict[str, Any] | None:
        """Add one worker's requests [served, canary]; returns why the canary must stop, or None."""
        with self._shared.locked():
            if self._head[0] != key:  # another canary has been released since
                return None
            self._arms += own
            self._head[1] = self._head[1] or worse(*self._arms)
            served, canary, reason = *self._arms.copy(), REASONS[self._head[1]]
        if reason is None:
            return None
        return {"reason": reason} | {
            name: {"requests": int(arm.sum()), "errors": int(arm[0]), "p95": p95(arm)}
            for name, arm in {"canary": canary, "served": served}.items()
        }


class Canary:
    """One worker's part in a canary: `percent` of the clients get it, the others the version `beside`."""

    def __init__(
        self, pipeline: Pipeline, beside: str, percent: int, counts: Counts, key: int, metrics: Metrics
    ) -> None:
        self.pipeline, self.percent = pipeline, percent
        self._counts, self._key, self._metrics = counts, key, metrics
        self._versions = beside, pipeline.version
        self._ended: list[tuple[bool, bool, float]] = []  # requests since the last flush
        self._own = [[0] * _WIDTH, [0] * _WIDTH]  # by latency, since the last `judge`
        for version in self._versions:  # 0 until the first
            metrics.canary_requests.labels(version)
            metrics.canary_failures.labels(version)

    def takes(self, client: str) -> bool:
        """Whether this client gets the canary."""
        digest = sha256(f"{self.pipeline.version} {client}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < self.percent

    def note(self, taken: bool, status: int, seconds: float) -> None:
        """Record the end of a request, `taken` by the canary or else by the version beside it."""
        self._ended.append((taken, status >= 500, seconds))

    def write(self) -> None:
        """Write the noted requests to the metrics."""
        for taken, failed, seconds in self._ended:
            steps = math.ceil(math.log(max(seconds / _SHORTEST, 1), _STEP))
            self._own[taken][0 if failed else 1 + min(steps, _BUCKETS - 1)] += 1
            version = self._versions[taken]
            self._metrics.canary_requests.labels(version).inc()
            self._metrics.canary_failures.labels(version).inc(failed)
            self._metrics.canary_duration.labels(version).observe(seconds)
        self._ended.clear()

    def judge(self) -> dict[str, Any] | None:
        """Add this worker's requests to the shared counts; returns the reason to stop the canary, or None."""
        self.write()
        own, self._own = self._own, [[0] * _WIDTH, [0] * _WIDTH]
        return self._counts.add(self._key, own)
