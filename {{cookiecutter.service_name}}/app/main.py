"""The one place that knows everyone.

create_app(settings) -> FastAPI; its lifespan loads and warms the model, and yields the typed State
"""

import asyncio
import gc
import os
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict
from zlib import crc32

from fastapi import FastAPI, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from app.api.call import Service
from app.api.docs import add_docs, openapi
from app.api.errors import handle
from app.api.middleware import CrossOrigin, ServiceMiddleware
from app.api.routes import inference, operations
from app.api.routing import JSONRoute
from app.api.security import SCHEMES, Guard
from app.core.admission import Admission
from app.core.errors import ArtifactError, ServiceError, reason_of
from app.core.manifest import VERSION_PATTERN
from app.core.model import Policy
from app.core.pipeline import Pipeline
from app.core.store import Artifact, read_manifest
from app.monitoring.drift import Drift
from app.monitoring.feedback import Feedback
from app.observability.logging import LineWriter, configure_logging
from app.observability.metrics import Metrics, Recorder, scrape
from app.rollout.canary import JUDGE_SECONDS, Canary
from app.rollout.fleet import FLEET, Fleet, read_fallback, read_served
from app.rollout.release import Follower, Role, Wanted
from app.rollout.shadow import BUSY, Shadow
from app.schemas.contract import contract_inputs, contract_outputs, label_key, served_contract_sha256
from app.settings import Settings, load_settings

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
GC_ALLOCATIONS = 10_000  # between two collections of what is young; a request leaves hardly any cycles
HANDLED = (HTTPException, RequestValidationError, ServiceError, Exception)
BOOT_ERROR = 3  # gunicorn stops on this exit code of a worker, instead of starting it again for ever


class State(TypedDict):
    """What the lifespan gives every request."""

    service: Service


def _label(drifts: dict[str, Any], answer: Any) -> str:
    """What metrics call an answer: its label, or the bin that its value had in training."""
    if hasattr(answer, "label"):
        return label_key(answer.label)
    drift = drifts.get(answer.model_version)
    return drift.bin_of(answer.value) if drift else "value"


def _feedback(fleet: Fleet) -> Feedback:
    place, versions = fleet.settings.artifacts_dir, None
    if isinstance(place, Path):
        found = [path for path in place.glob("v*") if re.fullmatch(VERSION_PATTERN, path.name)]
        versions = {path.name: _tolerance(path) for path in found}
    return Feedback(contract_outputs()["labels"], versions, served_contract_sha256(), fleet.given)


def _tolerance(folder: Path) -> float:
    with suppress(ArtifactError):
        return read_manifest(folder).outputs.feedback_tolerance
    return 0.0  # of what will not serve either


@cache
def project() -> dict[str, Any]:
    """The `project` table of pyproject.toml: name, version, description."""
    table: dict[str, Any] = tomllib.loads(PROJECT_FILE.read_text("utf-8"))["project"]
    return table


def create_app(settings: Settings | None = None, fleet: Fleet | None = None) -> FastAPI:
    """The ASGI application; without arguments that of the master's fleet, or else of the environment."""
    fleet = fleet or (Fleet(settings) if settings else FLEET.get(None) or Fleet(load_settings()))
    settings = fleet.settings
    log, request_line, writer = configure_logging(settings.log_level, settings.log_format)
    metrics = Metrics()
    writer.on_drop = metrics.dropped_lines.inc
    tracing = None
    about = project()
    telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
    if settings.tracing_endpoint:
        from app.observability.tracing import Tracing  # here, because nobody else needs its libraries

        endpoint, on_drop = settings.tracing_endpoint, metrics.dropped_spans.inc
        tracing = Tracing(about["name"], about["version"], endpoint, on_drop)
        telemetry |= {"tracing": True, "tracer_provider": tracing.provider, "operation_spans": False}
    service = Service(
        name=about["name"],
        version=about["version"],
        settings=settings,
        log=log,
        request_line=request_line,
        admission=Admission(settings.max_concurrency + settings.max_queue, settings.request_deadline_seconds),
        guard=Guard(settings, log, metrics.fallbacks.inc),
        recorder=Recorder(metrics),
        feedback=_feedback(fleet),
        flight=fleet.flight,
        fleet=fleet,
        tracing=tracing,
    )
    service.recorder.label = partial(_label, service.recorder.drifts)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[State]:
        # In the background, so that /health and /ready tell the truth while a large model loads; but a worker
        # that replaces another takes no requests before it can answer them.
        replaces = fleet.replaces
        loading = asyncio.create_task(_load(service, metrics, writer))
        follower = _follower(service, metrics)
        if replaces:
            metrics.restarts.inc()
            await loading
            await follower.look()  # what the master verified may have been replaced since
        following = asyncio.create_task(follower.follow(loading))
        try:
            yield {"service": service}
        finally:
            loading.cancel()
            following.cancel()
            service.recorder.shadow = None
            served = service.pipeline.batcher if service.pipeline else None
            for one in (served, service.canary, service.shadow):
                if one is not None:
                    one.close()
            service.recorder.flush()
            service.recorder.count()
            for drift in service.recorder.drifts.values():
                drift.write_line()
            log.info("stopped")
            if tracing is not None:
                await asyncio.to_thread(tracing.close)
            await asyncio.to_thread(writer.close)

    app = FastAPI(
        title=service.name,
        version=service.version,
        description=about["description"],
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry,
        exception_handlers=dict.fromkeys(HANDLED, handle),
    )
    keys = [Security(scheme) for scheme in SCHEMES] if settings.api_keys else []
    app.include_router(inference, dependencies=keys)
    app.include_router(operations)
    app.openapi = partial(openapi, app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    if settings.docs:
        add_docs(app)
    if settings.metrics_enabled:
        _expose_metrics(app, metrics, service.recorder)
    direct = {route.path: route for route in inference.routes if isinstance(route, JSONRoute)}
    features = frozenset(entry["name"] for entry in contract_inputs())
    # Outermost, so that a prediction passes none of the layers that know nothing of it.
    stack: ASGIApp = ServiceMiddleware(app.build_middleware_stack(), service, direct, features)
    if settings.cors_origins:
        headers = ["authorization", "content-type", "idempotency-key", "traceparent", "x-api-key"]
        headers += ["x-request-id", *filter(None, [settings.canary_header])]
        exposed = ("retry-after", "x-request-id")
        stack = CrossOrigin(stack, settings.cors_origins, ("GET", "POST"), headers, expose_headers=exposed)
    app.middleware_stack = stack
    return app


async def _load(service: Service, metrics: Metrics, writer: LineWriter) -> None:
    """Verify, load and warm up; a model that cannot be served ends the process."""
    try:
        pipeline, fallen = await asyncio.to_thread(_build_usable, service, metrics)
    except Exception as error:
        service.log.error("cannot start", reason=reason_of(error))
        writer.close()
        # A worker that replaces another is tried again, and the others go on meanwhile.
        os._exit(1 if service.fleet.replaces else BOOT_ERROR)
    # Half of the tail latency is the collector walking what never changes: take it out of its sight.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS)
    pipeline.stands_in = bool(fallen)
    _serve(service, metrics, pipeline)
    if fallen:
        service.log.error("fallback serves", reason=fallen, model_version=pipeline.version)
    service.fleet.note_loaded()


def _build_usable(service: Service, metrics: Metrics) -> tuple[Pipeline, str]:
    """See `read_usable`; a version that looks well may still not load, or answer otherwise than it should."""
    settings = service.settings
    artifact, fallen = service.fleet.served()
    try:
        return _build(service, metrics, artifact), fallen
    except Exception as error:
        return _build(service, metrics, read_fallback(settings, error)), reason_of(error)


def _build(service: Service, metrics: Metrics, artifact: Artifact, role: Role = "serving") -> Pipeline:
    began, settings = perf_counter(), service.settings
    policy = Policy(
        review_threshold=settings.review_threshold,
        out_of_range=settings.out_of_range,
        batch_max_rows=min(settings.batch_max_rows, settings.max_concurrency),
        batch_max_wait_seconds=settings.batch_max_wait_ms / 1000,
    )
    pipeline = Pipeline.load(artifact, service.recorder, policy)
    if role != "shadow":  # which answers nobody
        _expect(service, metrics, artifact)
    pipeline.load_seconds = perf_counter() - began
    return pipeline


def _serve(service: Service, metrics: Metrics, pipeline: Pipeline | None, _: Wanted | None = None) -> None:
    """Let `pipeline` answer from now on; what the one before has begun it ends."""
    if pipeline is None:  # somebody always serves
        return
    admission, old, manifest = service.admission, service.pipeline, pipeline.artifact.manifest
    if old is not None:
        before = old.artifact.manifest
        metrics.model_info.labels(before.version, old.artifact.sha256, before.runtime).set(0)
        metrics.execution.labels(old.execution).set(0)
        old.batcher.retire()
    metrics.model_info.labels(manifest.version, pipeline.artifact.sha256, manifest.runtime).set(1)
    metrics.execution.labels(pipeline.execution).set(1)
    metrics.model_load.set(pipeline.load_seconds)
    metrics.fallback.set(pipeline.stands_in)
    admission.expect(pipeline.costs.per_row)
    pipeline.batcher.on_call = admission.learn
    _know(service, metrics, pipeline)
    service.pipeline = pipeline
    _watch(service)
    service.recorder.flush()
    service.flight.version(pipeline.version)
    service.log.info(
        "ready",
        model_version=pipeline.version,
        replaces=old and old.version,
        execution=pipeline.execution,
        seconds=pipeline.load_seconds,
    )


def _know(service: Service, metrics: Metrics, pipeline: Pipeline) -> None:
    """Labels may come back for what `pipeline` answers."""
    for outcome in ("correct", "incorrect"):
        metrics.feedback.labels(pipeline.version, outcome)  # 0 until a label comes back
    service.feedback.know(pipeline.version, pipeline.artifact.manifest.outputs.feedback_tolerance)


def _watch(service: Service) -> None:
    """What waits, for metrics, and what lingers, for admission: of all that answer."""
    admission, pipeline, canary = service.admission, service.pipeline, service.canary
    if pipeline is not None:
        first, second = pipeline.batcher, canary.pipeline.batcher if canary else None
        admission.lingering = lambda: first.abandoned + (second.abandoned if second else 0)
        service.recorder.levels = lambda: (
            admission.inside,
            first.waiting + (second.waiting if second else 0),
            admission.limit,
        )
    service.recorder.compares = canary is not None or service.shadow is not None


def _accompany(service: Service, metrics: Metrics, pipeline: Pipeline | None, _: Wanted | None) -> None:
    """Let `pipeline` be the shadow from now on."""
    admission, recorder = service.admission, service.recorder
    if service.shadow is not None:
        service.shadow.close()
    service.shadow = recorder.shadow = None
    if pipeline is not None:
        service.shadow = shadow = Shadow(pipeline, lambda: admission.inside > BUSY * admission.limit, metrics)
        # What a canary has answered is compared by its own counts.
        recorder.shadow = lambda batches: shadow.offer(
            [one for one in batches if service.pipeline and one.version == service.pipeline.version]
        )
    _watch(service)
    service.log.info("shadow", model_version=pipeline and pipeline.version)


def _try(service: Service, metrics: Metrics, pipeline: Pipeline | None, wanted: Wanted | None) -> None:
    """Let `pipeline` be the canary from now on, unless a worker has found it worse already."""
    if service.canary is not None:
        service.canary.pipeline.batcher.retire()
    counts, key = service.fleet.counts, crc32(repr(wanted).encode())
    stopped, service.canary = counts.begin(key), None
    if pipeline is not None and wanted is not None and not stopped:
        service.canary = canary = Canary(pipeline, wanted.percent, counts, key)
        for version in (wanted.beside, pipeline.version):  # 0 until the first
            metrics.canary_requests.labels(version)
            metrics.canary_failures.labels(version)
        _know(service, metrics, pipeline)
        asyncio.get_running_loop().call_later(JUDGE_SECONDS, _judge, service, metrics, canary)
    percent = service.canary.percent if service.canary else 0
    metrics.canary_percent.set(percent)
    metrics.canary_stopped.set(stopped)
    _watch(service)
    service.log.info("canary", model_version=wanted and wanted.version, percent=percent, stopped=stopped)


def _judge(service: Service, metrics: Metrics, canary: Canary) -> None:
    """Once a second; a canary that does worse ends here and, within a second, in the other workers."""
    if service.canary is not canary:
        return
    if (verdict := canary.judge()) is None:
        asyncio.get_running_loop().call_later(JUDGE_SECONDS, _judge, service, metrics, canary)
        return
    service.canary = None
    canary.pipeline.batcher.retire()
    metrics.canary_percent.set(0)
    metrics.canary_stopped.set(1)
    _watch(service)
    service.log.error("canary stopped", model_version=canary.pipeline.version, **verdict)


def _refuse(service: Service, metrics: Metrics, role: str, reason: str) -> None:
    """Say and count that what is released is not used."""
    metrics.reload_failures.inc()
    served = service.pipeline.version if service.pipeline else None
    service.log.error("release refused", role=role, reason=reason, model_version=served)


def _follower(service: Service, metrics: Metrics) -> Follower:
    """Follows release.json in a local folder, unless APP_MODEL_VERSION pins a version."""
    settings = service.settings
    local = settings.artifacts_dir if isinstance(settings.artifacts_dir, Path) else None

    def build(role: Role, version: str) -> Pipeline:
        own = settings.model_copy(update={"model_version": version})
        return _build(service, metrics, read_served(own), role)

    return Follower(
        None if settings.model_version else local,
        # What stands in is not served: if it is released, it has to take over from itself.
        served=lambda: one.version if (one := service.pipeline) and not one.stands_in else "",
        build=build,
        use={
            "serving": partial(_serve, service, metrics),
            "canary": partial(_try, service, metrics),
            "shadow": partial(_accompany, service, metrics),
        },
        refuse=partial(_refuse, service, metrics),
    )


def _expect(service: Service, metrics: Metrics, artifact: Artifact) -> None:
    """Count rows of this version beside its baseline, if it has one; raises ArtifactError."""
    version, baseline = artifact.manifest.version, artifact.files.get("baseline.json")
    if baseline is None or version in service.recorder.drifts or not service.settings.metrics_enabled:
        return
    names = [entry.name for entry in artifact.manifest.inputs]
    try:
        service.recorder.drifts[version] = Drift(version, baseline, names, metrics, service.log)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{version}/baseline.json: cannot be used ({type(error).__name__})") from error


def _expose_metrics(app: FastAPI, metrics: Metrics, recorder: Recorder) -> None:
    """/metrics, and the counts of every route that FastAPI's router answers."""

    def record(info: Info) -> None:
        handler = info.modified_handler
        recorder.request(info.method, handler, int(info.modified_status), info.modified_duration)

    instrumentator = Instrumentator(
        should_group_status_codes=False, should_group_untemplated=True, registry=metrics.registry
    )
    instrumentator.add(record).instrument(app)

    @app.get("/metrics", include_in_schema=False)
    def scraped() -> Response:
        return Response(scrape(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})
