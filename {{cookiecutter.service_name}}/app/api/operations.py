"""Endpoints for operators: health, readiness, version, metrics, documentation; and the app's lifespan."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Response
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.staticfiles import StaticFiles

from app.api.call import CurrentCall, Service
from app.api.errors import MEDIA_TYPE
from app.core.errors import reason_of
from app.observability.logging import LineWriter
from app.observability.metrics import scrape
from app.schemas.service import ANSWERS, Health, Ready, ServedModel, Version

BOOT_ERROR = 3  # gunicorn stops if a worker exits with this code, instead of restarting it

operations = APIRouter(tags=["operations"])


@operations.get("/health", summary="Is the process alive?")
async def health() -> Health:
    """Liveness: touches nothing, not even the model."""
    return Health()


@operations.get("/ready", summary="Can it predict?", responses={503: ANSWERS[503]})
async def ready(call: CurrentCall) -> Ready:
    """Readiness: 503 with the failing check named until a model is loaded and warm."""
    call.service.models.check_ready()
    return Ready(call.pipeline.version)


@operations.get("/version", summary="What is running?")
async def version(call: CurrentCall) -> Version:
    """The service, its API and the served model."""
    service, served = call.service, None
    if pipeline := service.models.serving:
        artifact, manifest = pipeline.artifact, pipeline.artifact.manifest
        data = manifest.training.data_sha256 if manifest.training else None
        how = data, manifest.libraries, pipeline.execution
        files = {name: manifest.files[name].sha256 for name in artifact.model_files}
        served = ServedModel(manifest.version, artifact.sha256, files, manifest.runtime, *how)
    return Version(service.name, service.version, "v1", served)


def add_metrics(app: FastAPI, service: Service) -> None:
    """Serve /metrics, and count the answers of FastAPI's router; the middleware counts all others."""
    registry = service.metrics.registry

    def record(info: Info) -> None:
        handler, status = info.modified_handler, int(info.modified_status)
        method = "HEAD" if "head" in info.request.scope else info.method
        service.count_answer(method, handler, status, info.modified_duration)

    instrumentator = Instrumentator(
        should_group_status_codes=False, should_group_untemplated=True, registry=registry
    )
    instrumentator.add(record).instrument(app)

    @app.get("/metrics", include_in_schema=False)
    def metrics(accept: Annotated[str, Header()] = "") -> Response:
        text, media_type = scrape(registry, accept)
        return Response(text, headers={"content-type": media_type})


def add_docs(app: FastAPI) -> None:
    """Serve /docs with local assets, so that it works offline."""

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title} - API",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )

    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))


def openapi(app: FastAPI) -> dict[str, Any]:
    """The schema with the media type and headers of errors, which FastAPI's `responses` cannot express."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = FastAPI.openapi(app)
    calls = [call for path in schema["paths"].values() for call in path.values()]
    for status, response in (pair for call in calls for pair in call["responses"].items()):
        if status >= "400":
            response["content"] = {MEDIA_TYPE: response["content"].pop("application/json")}
        if status in ("429", "503"):
            response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return schema


async def _load(service: Service, writer: LineWriter) -> None:
    try:
        await service.models.load()
    except Exception as error:
        service.log.error("cannot start", reason=reason_of(error))
        writer.close()
        # Exit 1: a replacement worker is started again, while the other workers continue.
        os._exit(1 if service.fleet.replaces else BOOT_ERROR)


@asynccontextmanager
async def lifespan(service: Service, writer: LineWriter, _app: FastAPI) -> AsyncIterator[dict[str, Service]]:
    """FastAPI's lifespan: load the model, follow the release, write metrics and logs at the end."""
    # In the background, so that /health and /ready answer while a large model loads.
    models, loading = service.models, asyncio.create_task(_load(service, writer))
    if service.fleet.replaces:  # another worker answers until this one can
        service.metrics.restarts.inc()
        await loading
        await models.look()  # the version that the master verified may have been replaced since
    following = asyncio.create_task(models.follow(loading))
    try:
        yield {"service": service}
    finally:
        loading.cancel()
        following.cancel()
        service.recorder.flush(everything=True)
        models.close()
        service.log.info("stopped")
        await asyncio.to_thread(writer.close)
