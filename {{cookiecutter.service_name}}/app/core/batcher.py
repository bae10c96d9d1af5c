"""Micro-batching without a timer: what arrives while the last batch runs is the next batch.

    submit(rows) -> queue -> take up to max_rows -> run(rows) on the loop or in one thread -> each caller its own

`run` never raises for one bad row: it returns, per row, an answer or the error that is this row's own.
A job that nobody waits for any more, or whose deadline passed, is dropped when its turn comes, never run.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, Protocol

from app.core.errors import ModelTimeout

Row = tuple[Any, ...]


@dataclass(slots=True)
class Batch:
    """What one call of the model gave."""

    answers: list[Any]  # per row an answer, or the exception that is this row's own
    stages: tuple[float, float, float]  # seconds of preprocess, inference, postprocess
    out_of_range: dict[str, int]  # values outside the training range, by feature


class Observer(Protocol):
    """Whoever keeps the metrics; called on the event loop only."""

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """One call of the model, and the seconds each request in it waited."""

    def shed(self, reason: Literal["deadline"]) -> None:
        """A request whose deadline passed before its answer."""


@dataclass(slots=True, eq=False)
class _Job:
    rows: Sequence[Row]
    future: asyncio.Future[list[Any]]
    queued: float
    deadline: float
    running: bool = False


class Batcher:
    """Collects rows of concurrent requests into calls of at most `max_rows` rows.

    `threaded` runs the calls in one worker thread, so that a slow model leaves the event loop free.
    """

    def __init__(
        self,
        run: Callable[[list[Row]], Batch],
        observer: Observer,
        *,
        max_rows: int,
        max_wait_seconds: float = 0.0,
        threaded: bool = False,
    ) -> None:
        self._run, self._observer = run, observer
        self._max_rows, self._max_wait = max_rows, max_wait_seconds
        self._executor = ThreadPoolExecutor(1, "inference") if threaded else None
        self._queue: deque[_Job] = deque()
        self._draining: asyncio.Task[None] | None = None
        self._scheduled = False
        self._alarm: asyncio.TimerHandle | None = None
        self._started: tuple[_Job, ...] = ()
        self.in_flight = 0  # rows in the model now
        self.abandoned = 0  # requests that nobody waits for any more while their rows still run

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    async def submit(self, rows: Sequence[Row], deadline: float) -> list[Any]:
        """The answer, or the row's own exception, of each row in order; ModelTimeout at `deadline` (perf_counter)."""
        loop = asyncio.get_running_loop()
        job = _Job(rows, loop.create_future(), perf_counter(), deadline)
        self._queue.append(job)
        if self._executor is None:
            if not self._scheduled:
                self._scheduled = True
                # After everything that is ready on the loop now, so that its requests join.
                if self._max_wait:
                    loop.call_later(self._max_wait, self._drain_here)
                else:
                    loop.call_soon(self._drain_here)
        else:
            if self._draining is None:
                self._draining = loop.create_task(self._drain_in_thread(self._executor))
            if self._alarm is None:
                self._set_alarm(loop)
        try:
            return await job.future
        except asyncio.CancelledError:
            if job.running:
                self.abandoned += 1
            raise

    def close(self) -> None:
        """Let the thread end once its current call has."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[_Job]:
        """Jobs for one call: at least one, and no more rows than fit."""
        jobs: list[_Job] = []
        rows, now = 0, perf_counter()
        while self._queue:
            job = self._queue[0]
            if job.future.done():  # its caller has gone, or was told of the timeout
                self._queue.popleft()
                continue
            if job.deadline <= now:
                self._queue.popleft()
                self._expire(job)
                continue
            if jobs and rows + len(job.rows) > self._max_rows:
                break
            jobs.append(self._queue.popleft())
            rows += len(job.rows)
        return jobs

    def _drain_here(self) -> None:
        self._scheduled = False
        jobs = self._take()
        if jobs:
            started = perf_counter()
            self._finish(jobs, started, self._call(jobs))
        if self._queue:  # one call each turn of the loop, so that probes and new requests get theirs
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._drain_here)

    async def _drain_in_thread(self, executor: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._max_wait)  # 0 lets what is ready join
        while jobs := self._take():
            started = perf_counter()
            self.in_flight = sum(len(job.rows) for job in jobs)
            self._started = tuple(jobs)
            for job in jobs:
                job.running = True
            batches = await loop.run_in_executor(executor, self._call, jobs)
            self.in_flight = 0
            self._started = ()
            self.abandoned -= sum(job.future.done() for job in jobs)
            self._finish(jobs, started, batches)
        self._draining = None

    def _call(self, jobs: Sequence[_Job]) -> list[Batch]:
        rows = [row for job in jobs for row in job.rows]
        return [self._run(rows[i : i + self._max_rows]) for i in range(0, len(rows), self._max_rows)]

    def _finish(self, jobs: Sequence[_Job], started: float, batches: Sequence[Batch]) -> None:
        answers = (
            batches[0].answers if len(batches) == 1 else [one for batch in batches for one in batch.answers]
        )
        at = 0
        for job in jobs:
            end = at + len(job.rows)
            if not job.future.done():
                job.future.set_result(answers[at:end])
            at = end
        waits = [started - job.queued for job in jobs]
        for batch in batches:
            self._observer.batch(batch, waits)

    def _expire(self, job: _Job) -> None:
        if job.running:
            self.abandoned += 1
        self._observer.shed("deadline")
        job.future.set_exception(ModelTimeout())

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all: deadlines are equally long, so the oldest outstanding job is the next to expire."""
        outstanding = [job for job in (*self._started, *self._queue) if not job.future.done()]
        self._alarm = None
        if outstanding:
            self._alarm = loop.call_later(max(outstanding[0].deadline - perf_counter(), 0), self._ring)

    def _ring(self) -> None:
        now = perf_counter()
        for job in (*self._started, *self._queue):
            if job.deadline <= now and not job.future.done():
                self._expire(job)
        self._set_alarm(asyncio.get_running_loop())
