"""Counts and observations, collected on the hot path and written off it.

    count, observe -> dictionaries of this process -> every FLUSH_SECONDS -> Prometheus children -> /metrics

Writing a child costs microseconds in multiprocess mode; adding up for a few milliseconds first makes that a
fraction for each request. A scrape waits until everything that was answered before it has been written.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram

from app.observability.metrics import observe_many

FLUSH_SECONDS = 0.02


class Source(Protocol):
    """Collects on its own and writes with the recorder's flush: calls of the models, levels of queues."""

    def write(self, everything: bool) -> object:
        """Write to Prometheus; `everything` includes values that may otherwise wait longer than a flush."""


class Recorder:
    """Counters and histograms of one event loop, written a few milliseconds later."""

    def __init__(self, sources: Sequence[Source] = ()) -> None:
        self._sources = sources
        self._counts: defaultdict[tuple[Counter, tuple[str, ...]], float] = defaultdict(int)
        self._values: defaultdict[tuple[Histogram, tuple[str, ...]], list[tuple[float, int]]]
        self._values = defaultdict(list)
        self._scheduled = False

    def count(self, counter: Counter, *labels: str) -> None:
        """One more."""
        self._counts[counter, labels] += 1
        if not self._scheduled:
            self._schedule()

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """One value."""
        self._values[histogram, labels].append((value, 1))
        if not self._scheduled:
            self._schedule()

    async def settle(self) -> None:
        """Wait until every worker has written its answers from before now."""
        await asyncio.sleep(2 * FLUSH_SECONDS)
        self.flush(everything=True)

    def flush(self, everything: bool = False) -> None:
        """Write the collected counts and values, and those of the sources."""
        self._scheduled = False
        for (counter, labels), times in self._counts.items():
            (counter.labels(*labels) if labels else counter).inc(times)
        self._counts.clear()
        for (histogram, labels), values in self._values.items():
            observe_many(histogram.labels(*labels) if labels else histogram, values)
        self._values.clear()
        for source in self._sources:
            source.write(everything)

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)
