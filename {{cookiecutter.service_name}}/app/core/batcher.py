"""Micro-batching without a timer: requests that arrive while a batch runs form the next batch.

    submit(rows) -> queue -> at most max_rows -> run, on the loop or in one thread -> each caller its own

`run` never raises for a bad row: it returns an answer or an error for each row.
A job whose caller is gone, or whose deadline passed, is dropped from the queue without running.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

from app.core.errors import ServiceError

MAX_BYTES = 128 * 2**20  # held by admitted requests, per worker
REQUEST_BYTES, BODY_FACTOR = 16_384, 10  # a request: a fixed part, and its body with its parsed values
MEMORY = 0.9  # weight of earlier calls in a model's pace, at each new call
HTTP_SECONDS = 1e-4  # of HTTP work per row, for models that run on the event loop

Row = tuple[Any, ...]


class Admission:
    """Refuses requests that would wait longer than half of the deadline, or exceed the memory limit.

    `bound` is the maximum of admitted requests, if APP_MAX_QUEUE is set. `lingering` counts requests that
    were answered at their deadline while their rows still run; they keep their places.
    """

    def __init__(
        self, deadline_seconds: float, bound: int | None = None, lingering: Callable[[], int] = lambda: 0
    ) -> None:
        self.budget = deadline_seconds / 2  # the other half is a reserve
        self.most = min(bound or MAX_BYTES, MAX_BYTES // REQUEST_BYTES)
        self.limit = self.most  # requests that fit at the current pace; for metrics and shadows
        self.inside = self.bytes = 0
        self._bound, self._lingering = bound, lingering

    def check(self, wait: float) -> None:
        """Raise ServiceError if a request would wait too long or exceed a limit; reserves nothing.

        `wait` is the estimated number of seconds before the model runs the request.
        """
        full = self._bound is not None and self.inside + self._lingering() >= self._bound
        if full or wait > self.budget or self.bytes > MAX_BYTES:
            error = ServiceError("overloaded", "too many requests are waiting")
            error.headers["retry-after"] = str(max(1, ceil(wait)))  # when the queue should be empty
            raise error

    def enter(self, wait: float, body_bytes: int) -> None:
        """Admit a request; call `leave` when it ends. Raises ServiceError like `check`."""
        self.check(wait)
        self.inside += 1
        self.bytes += REQUEST_BYTES + BODY_FACTOR * body_bytes

    def leave(self, body_bytes: int) -> None:
        """Release the place and the memory that `enter` reserved."""
        self.inside -= 1
        self.bytes -= REQUEST_BYTES + BODY_FACTOR * body_bytes


class Pace:
    """Current duration of a model's calls: the cost at warm-up times the slowdown of recent calls.

    A call costs `fixed` seconds plus `each` seconds per row. Recent calls count more than older ones.
    """

    def __init__(self, fixed: float, each: float) -> None:
        self._fixed, self._each = fixed, each
        self._expected = self._taken = self.expected(1)
        self.rows_per_request = 1.0

    def expected(self, rows: int) -> float:
        """Seconds that a call took at warm-up."""
        return self._fixed + self._each * rows

    def seconds(self, rows: int) -> float:
        """Seconds that a call takes now."""
        return self.expected(rows) * self._taken / self._expected

    def learn(self, seconds: float, rows: int, requests: int) -> None:
        """Record the duration of a call with these numbers of rows and requests."""
        self._expected = MEMORY * self._expected + self.expected(rows)
        self._taken = MEMORY * self._taken + seconds
        self.rows_per_request += (1 - MEMORY) * (rows / requests - self.rows_per_request)


@dataclass(slots=True)
class Batch:
    """The result of one call of the model."""

    answers: list[Any]  # one answer or exception per row
    stages: tuple[float, float, float]  # seconds of preprocess, inference, postprocess
    out_of_range: dict[str, int]  # values outside the training range, by feature
    matrix: Any = None  # the model's input, kept until drift has counted it
    version: str = ""  # of the model; empty if the call failed
    rows: Sequence[Row] = ()  # as the client sent them, for a shadow


class Observer:
    """Receives every call of the model, on the event loop. This base class ignores them."""

    def batch(self, batch: Batch, waits: Sequence[float]) -> None:
        """Take a call of the model, and the seconds that each of its requests waited."""

    def shed(self, reason: str) -> None:
        """Take the reason why a request was given up: its deadline passed before its answer."""


@dataclass(slots=True, eq=False)
class _Job:
    rows: Sequence[Row]
    future: asyncio.Future[list[Any]]
    queued: float
    deadline: float
    waits: bool = True  # counted in `_rows`; False once it is taken or its caller is gone


def _rows_in(jobs: Sequence[_Job]) -> int:
    return sum(len(job.rows) for job in jobs)


class Batcher:
    """Joins rows of concurrent requests; `threaded` keeps a slow model off the event loop."""

    def __init__(
        self,
        run: Callable[[list[Row]], Batch],
        observer: Observer,
        *,
        max_rows: int,
        max_wait_seconds: float,
        threaded: bool,
        pace: Pace,
    ) -> None:
        self._run, self._observer, self._pace = run, observer, pace
        self._max_rows, self._max_wait = max_rows, max_wait_seconds
        self._executor = ThreadPoolExecutor(1, "inference") if threaded else None
        self._queue: deque[_Job] = deque()
        self._rows = 0  # in the queue, without those of callers that are gone
        self._running: list[_Job] = []  # jobs of the current call in the thread
        self._began = 0.0  # thread: start of the current call; loop: end of the last if more waited, else 0
        self._draining: asyncio.Handle | asyncio.Task[None] | None = None
        self._retired = False

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def wait(self) -> float:
        """Estimated seconds before a new request runs: the queue, plus the overrun of the current call."""
        expected = self._pace.seconds(_rows_in(self._running)) if self._running else 0.0
        late = max(0.0, self.busy_seconds - expected) if self._running else 0.0
        calls = self._rows / self._max_rows
        return late + (calls * self._pace.seconds(self._max_rows) if calls else 0.0)

    @property
    def requests_per_second(self) -> float:
        """Requests that full calls answer per second at the current pace."""
        return self._max_rows / self._pace.seconds(self._max_rows) / self._pace.rows_per_request

    @property
    def abandoned(self) -> int:
        """Requests in the current call whose caller is gone or already answered."""
        return sum(job.future.done() for job in self._running) if self._running else 0

    @property
    def busy_seconds(self) -> float:
        """Seconds since the current call in the thread began; 0 without one."""
        return perf_counter() - self._began if self._running else 0.0

    async def submit(self, rows: Sequence[Row], deadline: float) -> list[Any]:
        """An answer or exception per row; raises ServiceError at `deadline` (a time of perf_counter)."""
        loop = asyncio.get_running_loop()
        job = _Job(rows, loop.create_future(), perf_counter(), deadline)
        self._queue.append(job)
        self._rows += len(rows)
        if self._draining is None:
            if self._executor is not None:
                self._draining = loop.create_task(self._drain_in_thread(loop, self._executor))
            elif self._max_wait:
                self._draining = loop.call_later(self._max_wait, self._drain_here)
            else:  # after all callbacks that are ready now, so that their requests join
                self._draining = loop.call_soon(self._drain_here)
        try:
            if self._executor is None:
                return await job.future
            async with asyncio.timeout(deadline - job.queued):  # the loop is free while the model works
                return await job.future
        except TimeoutError:
            raise self._expired() from None
        finally:
            self._count_out(job)

    def retire(self) -> None:
        """Answer the queued requests, then close; new requests go to another model."""
        self._retired = True
        if self._draining is None:
            self.close()

    def close(self) -> None:
        """Stop the thread after its current call."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _drain_here(self) -> None:
        """Run one call per iteration of the loop, so that probes and new requests are served in between."""
        if jobs := self._take():
            started = perf_counter()
            self._finish(jobs, started, self._call(jobs))
            # Between two calls the loop reads and answers requests: this time counts in the pace.
            began, self._began = self._began or started, perf_counter() if self._queue else 0.0
            self._pace.learn(perf_counter() - began, _rows_in(jobs), len(jobs))
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
            self._pace.learn(perf_counter() - started, _rows_in(jobs), len(jobs))
            self._finish(jobs, started, batches)
        self._draining = None
        if self._retired:
            self.close()

    def _take(self) -> list[_Job]:
        """Jobs for the next call: at most `max_rows` rows, unless the first job alone has more."""
        jobs: list[_Job] = []
        rows, now = 0, perf_counter()
        while self._queue and not (jobs and rows + len(self._queue[0].rows) > self._max_rows):
            job = self._queue.popleft()
            if job.future.done():  # its caller is gone
                continue
            self._count_out(job)
            if job.deadline > now:
                jobs.append(job)
                rows += len(job.rows)
            elif self._executor is None:  # in a thread, the timeout in `submit` answers
                job.future.set_exception(self._expired())
        return jobs

    def _count_out(self, job: _Job) -> None:
        if job.waits:
            job.waits = False
            self._rows -= len(job.rows)

    def _call(self, jobs: Sequence[_Job]) -> list[Batch]:
        """Run the model. If it raises, the rows of that call get an error and the next call goes on."""
        rows, batches = [row for job in jobs for row in job.rows], []
        for at in range(0, len(rows), self._max_rows):
            part = rows[at : at + self._max_rows]
            try:
                batches.append(self._run(part))
            except Exception as error:
                failure = ServiceError("internal_error")
                failure.__cause__ = error
                batches.append(Batch([failure] * len(part), (0.0, 0.0, 0.0), {}))
        return batches

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
