"""The versions of one process: the serving one, and a canary or a shadow beside it.

    load:  Fleet.served -> verified artifact -> load, warm up, replay (in a thread) -> serve
    look:  release.json changed -> per role: read, verify -> load, warm up, replay (in a thread) -> start
    judge: once a second -> a canary that does worse than the serving version stops, in all workers

If a new version fails at any step, the serving version continues.
"""

import asyncio
import gc
import math
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Literal, NamedTuple
from zlib import crc32

from app.core.batcher import Admission
from app.core.errors import ServiceError, reason_of
from app.core.lookup import Lookup, own_lookup
from app.core.pipeline import Pipeline, Policy
from app.core.store import RELEASE, Artifact, Release, read_release
from app.monitoring.drift import Calls
from app.monitoring.feedback import Feedback
from app.observability.logging import Logger
from app.observability.metrics import Metrics
from app.rollout.canary import JUDGE_SECONDS, Canary
from app.rollout.fleet import Fleet, read_fallback, read_served
from app.rollout.shadow import Shadow

LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0  # a version's files may arrive after the release.json that names it

GC_ALLOCATIONS = 10_000  # between collections of young objects; requests leave few cycles

Role = Literal["serving", "canary", "shadow"]


class Wanted(NamedTuple):
    """The version that a role should have; if any field changes, the role is started again."""

    version: str
    percent: int = 100  # of the clients
    beside: str = ""  # the version that the other clients get


def wanted(release: Release) -> dict[Role, Wanted | None]:
    """Wanted version per role; None if unset or equal to the serving version."""
    serving, percent = release.serving, release.canary_percent
    canary = release.canary if percent and release.canary != serving else None
    shadow = release.shadow if release.shadow != serving else None
    return {
        "serving": Wanted(serving),
        "canary": Wanted(canary, percent, serving) if canary else None,
        "shadow": Wanted(shadow) if shadow else None,
    }


class Models:
    """Loads versions, starts and stops them, and chooses the version for a request."""

    def __init__(self, fleet: Fleet, metrics: Metrics, log: Logger, feedback: Feedback) -> None:
        settings = self._settings = fleet.settings
        self._fleet, self._metrics, self._log, self._feedback = fleet, metrics, log, feedback
        bound = None if settings.max_queue is None else settings.max_concurrency + settings.max_queue
        self.admission = Admission(
            settings.request_deadline_seconds,
            bound,
            lambda: sum(one.batcher.abandoned for one in self._answering()),
        )
        self.serving: Pipeline | None = None  # None until the first version is loaded and warm
        self.canary: Canary | None = None
        self.shadow: Shadow | None = None
        self._wanted: dict[Role, Wanted | None] = {}  # from release.json, when the role was started
        self._calls = Calls(metrics, log)
        degrade = settings.lookup_on_miss == "degrade"
        own = own_lookup(degrade)
        self._lookup = Lookup(own, degrade, metrics, log) if own else None
        place = settings.artifacts_dir
        # The folder whose release.json is watched, and the state of that file when it was last read.
        self._root = place if isinstance(place, Path) and not settings.model_version else None
        self._seen: tuple[int, ...] = ()
        self._again = 0.0  # time of the next try of the same release
        self._policy = Policy(
            review_threshold=settings.review_threshold,
            out_of_range=settings.out_of_range,
            batch_max_rows=min(settings.batch_max_rows, settings.max_concurrency),
            batch_max_wait_seconds=settings.batch_max_wait_ms / 1000,
        )

    def pipeline_for(self, client: str) -> tuple[Pipeline, Canary | None]:
        """The pipeline that answers, and the canary that counts the answer; raises ServiceError.

        Without a client the call is no prediction, and no canary counts it.
        """
        pipeline, canary = self.serving, self.canary
        if pipeline is None:
            raise ServiceError("model_not_ready", "check `model` fails: it is still loading")
        if canary is None or not client:
            return pipeline, None
        return canary.pipeline if canary.takes(client) else pipeline, canary

    def wait_for(self, client: str) -> float:
        """Estimated seconds before the model runs a new request of this client."""
        pipeline = self.serving if self.canary is None else self.pipeline_for(client)[0]
        return pipeline.batcher.wait if pipeline is not None else 0.0

    def check_ready(self) -> None:
        """Raise ServiceError, which names the failing check, until every worker can answer."""
        self.pipeline_for("")
        if not self._fleet.all_loaded:
            raise ServiceError("model_not_ready", "check `workers` fails: one is still loading the model")

    @property
    def threaded(self) -> bool:
        """Whether the serving model runs in a thread, so that the event loop stays free."""
        return self.serving is not None and self.serving.execution == "thread"

    @property
    def busy_seconds(self) -> float:
        """Seconds since the serving model's current call began; 0 without one."""
        return self.serving.batcher.busy_seconds if self.serving else 0.0

    async def load(self) -> None:
        """Load the version to serve, or the fallback version; raises if neither can be loaded."""
        pipeline, problem, seconds = await asyncio.to_thread(self._build_usable)
        # Half of the tail latency came from garbage collection of objects that never change: exempt them.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS)
        # A fallback is not the wanted version: if it is released itself, it is loaded again.
        self._serve(pipeline, None if problem else Wanted(pipeline.version), seconds)
        if problem:
            self._log.error("fallback serves", reason=problem, model_version=pipeline.version)
        self._fleet.note_loaded()

    async def follow(self, loading: "asyncio.Task[None]") -> None:
        """When the first version is loaded, check release.json every second, until cancelled."""
        await asyncio.shield(loading)
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Start the released version of each role if it changed; refuse a bad version and retry it later."""
        root, seen = self._root, tuple[int, ...]()
        if root is None:
            return
        with suppress(OSError):
            found = (root / RELEASE).stat()
            seen = found.st_mtime_ns, found.st_ino, found.st_size
        if seen == self._seen and perf_counter() < self._again:
            return
        self._seen, self._again = seen, math.inf
        try:
            roles = wanted(await asyncio.to_thread(read_release, root))
        except Exception as error:
            self._refuse("release.json", error)
            return
        for role, want in roles.items():
            if want != self._wanted.get(role):
                await self._start(role, want)

    def write(self, everything: bool) -> None:
        """At a flush of the recorder: write calls, the canary's requests, and the levels of the queues."""
        batches = self._calls.write(everything, self.canary is not None or self.shadow is not None)
        if self.canary is not None:
            self.canary.write()
        if batches and self.shadow is not None and self.serving is not None:
            # Only the serving version's answers: the canary has its own comparison.
            self.shadow.offer([one for one in batches if one.version == self.serving.version])
        self._metrics.in_flight.set(self.admission.inside)
        self._metrics.queue_depth.set(sum(one.batcher.waiting for one in self._answering()))
        if self.serving is not None:
            in_time = self.admission.budget * self.serving.batcher.requests_per_second
            self.admission.limit = max(1, min(self.admission.most, int(in_time)))
        self._metrics.admission_limit.set(self.admission.limit)

    def close(self) -> None:
        """Stop all threads after their current call, and log the last rows."""
        for pipeline in self._answering():
            pipeline.batcher.close()
        if self.shadow is not None:
            self.shadow.close()
        self._calls.close()

    def _answering(self) -> list[Pipeline]:
        return [one for one in (self.serving, self.canary and self.canary.pipeline) if one]

    def _build_usable(self) -> tuple[Pipeline, str, float]:
        """The pipeline to serve, the reason if it is the fallback, and the seconds that loading took."""
        artifact, problem = self._fleet.served()
        began = perf_counter()
        try:
            pipeline = self._build(artifact, "serving")
        except Exception as error:
            pipeline = self._build(read_fallback(self._settings, error), "serving")
            problem = reason_of(error)
        return pipeline, problem, perf_counter() - began

    def _build(self, artifact: Artifact, role: Role) -> Pipeline:
        """Load, warm up and replay a version, in any thread; raises ArtifactError."""
        pipeline = Pipeline.load(artifact, self._calls, self._policy, lookup=self._lookup)
        if role != "shadow" and self._settings.metrics_enabled:  # a shadow answers no client
            self._calls.know(artifact)
        return pipeline

    async def _start(self, role: Role, want: Wanted | None) -> None:
        """Start the wanted version in a role; a refused canary or shadow leaves its role empty."""
        pipeline, began = None, perf_counter()
        try:
            if want is not None:
                settings = self._settings.model_copy(update={"model_version": want.version})
                pipeline = await asyncio.to_thread(lambda: self._build(read_served(settings), role))
        except Exception as error:  # of any kind: the serving version continues
            self._refuse(role, error)
            want = None
        if role == "canary":
            self._start_canary(pipeline, want)
        elif role == "shadow":
            self._start_shadow(pipeline, want)
        elif pipeline is not None:
            self._serve(pipeline, want, perf_counter() - began)

    def _serve(self, pipeline: Pipeline, want: Wanted | None, seconds: float) -> None:
        """Let `pipeline` answer from now on; the previous pipeline finishes its requests."""
        old, metrics = self.serving, self._metrics
        if old is not None:
            self._show(old, 0)
            old.batcher.retire()
        self._show(pipeline, 1)
        metrics.model_load.set(seconds)
        metrics.fallback.set(want is None)
        self._expect_feedback(pipeline)
        self.serving, self._wanted["serving"] = pipeline, want
        self.write(everything=False)  # the levels, before the first request
        fields = {"replaces": old and old.version, "execution": pipeline.execution, "seconds": seconds}
        self._log.info("ready", model_version=pipeline.version, **fields)

    def _show(self, pipeline: Pipeline, value: int) -> None:
        artifact, metrics = pipeline.artifact, self._metrics
        metrics.model_info.labels(pipeline.version, artifact.sha256, artifact.manifest.runtime).set(value)
        metrics.execution.labels(pipeline.execution).set(value)

    def _expect_feedback(self, pipeline: Pipeline) -> None:
        for outcome in ("correct", "incorrect"):
            self._metrics.feedback.labels(pipeline.version, outcome)  # 0 until there is feedback
        self._feedback.know(pipeline.version, pipeline.artifact.manifest.outputs.feedback_tolerance)

    def _start_shadow(self, pipeline: Pipeline | None, want: Wanted | None) -> None:
        """Compare answers with those of `pipeline` from now on; None stops the comparison."""
        if self.shadow is not None:
            self.shadow.close()
        self.shadow = Shadow(pipeline, self.admission, self._metrics) if pipeline else None
        self._wanted["shadow"] = want
        self._log.info("shadow", model_version=pipeline and pipeline.version)

    def _start_canary(self, pipeline: Pipeline | None, want: Wanted | None) -> None:
        """Start `pipeline` as the canary, unless a worker has already stopped this canary."""
        self._retire_canary()
        self._wanted["canary"] = want
        counts, key = self._fleet.counts, crc32(repr(want).encode())
        stopped = counts.begin(key)
        if pipeline is not None and want is not None and not stopped:
            self._expect_feedback(pipeline)
            self.canary = Canary(pipeline, want.beside, want.percent, counts, key, self._metrics)
            asyncio.get_running_loop().call_later(JUDGE_SECONDS, self._judge, self.canary)
        percent = self.canary.percent if self.canary else 0
        self._metrics.canary_percent.set(percent)
        self._metrics.canary_stopped.set(stopped)
        self._log.info("canary", model_version=want and want.version, percent=percent, stopped=stopped)

    def _retire_canary(self) -> None:
        if self.canary is not None:
            self.canary.write()
            self.canary.pipeline.batcher.retire()
            self.canary = None

    def _judge(self, canary: Canary) -> None:
        """Each second: stop a canary that does worse; the other workers stop it within a second."""
        if self.canary is not canary:
            return
        if (verdict := canary.judge()) is None:
            asyncio.get_running_loop().call_later(JUDGE_SECONDS, self._judge, canary)
            return
        self._retire_canary()
        self._metrics.canary_percent.set(0)
        self._metrics.canary_stopped.set(1)
        self._log.error("canary stopped", model_version=canary.pipeline.version, **verdict)

    def _refuse(self, role: str, error: Exception) -> None:
        """Log and count that a released version is not used, and schedule another try."""
        self._again = perf_counter() + RETRY_SECONDS
        self._metrics.reload_failures.inc()
        served = self.serving.version if self.serving else None
        self._log.error("release refused", role=role, reason=reason_of(error), model_version=served)
