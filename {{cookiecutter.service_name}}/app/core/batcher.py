"""Micro-batching without a timer: requests that arrive while a batch runs are the next batch.

    submit(rows) -> queue -> at most max_rows -> run, on the loop or in one thread -> each caller its own

`run` never raises for a bad row: it returns, per row, an answer or the error that is this row's own.
A job whose caller has gone, or whose deadline passed, is dropped when its turn comes, never run.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from app.core.errors import ServiceError

PACE_WEIGHT = 0.1  # of the latest call in the moving average

Row = tuple[Any, ...]


class Admission:
    """Counts the requests inside, and refuses the one too many in microseconds: `with admission: ...`.

    `lingering` says how many requests were answered at their deadline while their rows still run.
    """

    def __init__(self, limit: int, deadline_seconds: float, lingering: Callable[[], int] = lambda: 0) -> None:
        self.limit, self.inside, self._lingering = limit, 0, lingering
        self._most, self._budget = limit, deadline_seconds / 2  # the other half is a reserve
        self._seconds = 0.0  # of the model, for a request

    def expect(self, seconds: float) -> None:
        """Start again for a model that needs so many seconds for a request."""
        self._seconds = 0.0
        self.learn(seconds, 1)

    def learn(self, seconds: float, requests: int) -> None:
        """Admit as many as can be answered in time at the recent pace of the model."""
        latest = seconds / requests
        self._seconds += (latest - self._seconds) * (PACE_WEIGHT if self._seconds else 1)
        self.limit = max(1, min(self._most, int(self._budget / max(self._seconds, 1e-9))))

    def check(self) -> None:
        """Raise ServiceError when there is no slot; takes none, so that a slow sender holds none."""
        if self.inside + self._lingering() >= self.limit:
            raise ServiceError("overloaded", "too many requests are waiting")

    def __enter__(self) -> None:
        self.check()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


@dataclass(slots=True)
class Batch:
    """The result of one call of the model."""

    answers: list[Any]  # per row an answer, or the exception that is this row's own
    stages: tuple[float, float, float]  # seconds of preprocess, inference, postprocess
    out_of_range: dict[str, int]  # values outside the training range, by feature
    matrix: Any = None  # the rows as the model saw them, until they are counted
    version: str = ""  # of the model; none if it saw nothing
    rows: Sequence[Row] = ()  # as they were sent, for a shadow


class Observer:
    """Is told of every call of the model, on the event loop only; this one keeps nothing."""

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """One call of the model, and the seconds each request in it waited."""

    def shed(self, reason: str) -> None:
        """A request whose deadline passed before its answer."""


@dataclass(slots=True, eq=False)
class _Job:
    rows: Sequence[Row]
    future: asyncio.Future[list[Any]]
    queued: float
    deadline: float


class Batcher:
    """Joins rows of concurrent requests; `threaded` keeps a slow model off the event loop.

    `on_call` is told the seconds of each call in the thread, and the number of requests in it.
    """

    def __init__(
        self,
        run: Callable[[list[Row]], Batch],
        observer: Observer,
        *,
        max_rows: int,
        max_wait_seconds: float,
        threaded: bool,
        on_call: Callable[[float, int], None] | None = None,
    ) -> None:
        self._run, self._observer, self._on_call = run, observer, on_call
        self._max_rows, self._max_wait = max_rows, max_wait_seconds
        self._executor = ThreadPoolExecutor(1, "inference") if threaded else None
        self._queue: deque[_Job] = deque()
        self._running: list[_Job] = []  # in the thread now
        self._began = 0.0  # when they got there
        self._draining: asyncio.Handle | asyncio.Task[None] | None = None
        self._retired = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def abandoned(self) -> int:
        """Requests whose caller has gone or was answered while their rows still run."""
        return sum(job.future.done() for job in self._running) if self._running else 0

    @property
    def busy_seconds(self) -> float:
        """For how long the call that is in the thread now has been there."""
        return perf_counter() - self._began if self._running else 0.0

    async def submit(self, rows: Sequence[Row], deadline: float) -> list[Any]:
        """An answer or exception per row; raises ServiceError at `deadline` (a time of perf_counter)."""
        loop = asyncio.get_running_loop()
        job = _Job(rows, loop.create_future(), perf_counter(), deadline)
        self._queue.append(job)
        if self._draining is None:
            if self._executor is not None:
                self._draining = loop.create_task(self._drain_in_thread(loop, self._executor))
            elif self._max_wait:
                self._draining = loop.call_later(self._max_wait, self._drain_here)
            else:  # after everything that is ready on the loop now, so that its requests join
                self._draining = loop.call_soon(self._drain_here)
        if self._executor is None:
            return await job.future
        try:  # the loop is free while the model works, so a deadline is met on time
            async with asyncio.timeout(deadline - job.queued):
                return await job.future
        except TimeoutError:
            raise self._expired() from None

    def retire(self) -> None:
        """Answer the requests that are here, then end: another model takes the next ones."""
        self._retired = True
        if self._draining is None:
            self.close()

    def close(self) -> None:
        """Let the thread end once its current call has."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _drain_here(self) -> None:
        """One call each turn of the loop, so that probes and new requests get theirs."""
        if jobs := self._take():
            started = perf_counter()
            self._finish(jobs, started, self._call(jobs))
        self._draining = asyncio.get_running_loop().call_soon(self._drain_here) if self._queue else None
        if self._retired and self._draining is None:
            self.close()

    async def _drain_in_thread(self, loop: asyncio.AbstractEventLoop, executor: ThreadPoolExecutor) -> None:
        await asyncio.sleep(self._max_wait)  # 0 lets requests that are ready join
        while jobs := self._take():
            started = self._began = perf_counter()
            self._running = jobs
            batches = await loop.run_in_executor(executor, self._call, jobs)
            self._running = []
            if self._on_call is not None:
                self._on_call(perf_counter() - started, len(jobs))
            self._finish(jobs, started, batches)
        self._draining = None
        if self._retired:
            self.close()

    def _take(self) -> list[_Job]:
        """Jobs for one call: at least one, and otherwise no more rows than fit."""
        jobs: list[_Job] = []
        rows, now = 0, perf_counter()
        while self._queue and not (jobs and rows + len(self._queue[0].rows) > self._max_rows):
            job = self._queue.popleft()
            if job.future.done():  # its caller has gone
                continue
            if job.deadline > now:
                jobs.append(job)
                rows += len(job.rows)
            elif self._executor is None:  # otherwise its own timeout answers
                job.future.set_exception(self._expired())
        return jobs

    def _call(self, jobs: Sequence[_Job]) -> list[Batch]:
        rows = [row for job in jobs for row in job.rows]
        return [self._guarded(rows[at : at + self._max_rows]) for at in range(0, len(rows), self._max_rows)]

    def _guarded(self, rows: list[Row]) -> Batch:
        """If this call fails in any way, its callers get an answer and the next call its turn."""
        try:
            return self._run(rows)
        except Exception as error:
            failure = ServiceError("internal_error")
            failure.__cause__ = error
            return Batch([failure] * len(rows), (0.0, 0.0, 0.0), {})

    def _finish(self, jobs: Sequence[_Job], started: float, batches: Sequence[Batch]) -> None:
        answers = [one for batch in batches for one in batch.answers]
        waits, at = [started - job.queued for job in jobs], 0
        for job in jobs:
            if not job.future.done():
                job.future.set_result(answers[at : at + len(job.rows)])
            at += len(job.rows)
        for batch in batches:
            self._observer.batch(batch, waits)

    def _expired(self) -> ServiceError:
        self._observer.shed("deadline")
        return ServiceError("model_timeout", "the deadline passed")
