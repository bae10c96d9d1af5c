"""The application: all parts are created here, in the order of their dependencies.

settings, fleet -> metrics, log -> feedback, models -> service -> routes, documents, middleware -> FastAPI
"""

from functools import partial

from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from app.api.call import Service
from app.api.errors import handle
from app.api.middleware import CrossOrigin, ServiceMiddleware
from app.api.operations import add_docs, add_metrics, lifespan, openapi, operations
from app.api.routes import inference
from app.api.security import SCHEMES, Guard
from app.core.errors import ServiceError
from app.monitoring.feedback import Feedback, tolerances
from app.observability.logging import configure_logging
from app.observability.metrics import Metrics, Recorder
from app.rollout.fleet import FLEET, Fleet
from app.rollout.models import Models
from app.schemas.contract import contract_outputs, served_contract_sha256
from app.settings import Settings, install, load_settings, project

HANDLED = (HTTPException, RequestValidationError, ServiceError, Exception)


def create_app(settings: Settings | None = None, fleet: Fleet | None = None) -> FastAPI:
    """The ASGI application. Default: gunicorn's fleet, or without gunicorn settings from the environment."""
    fleet = fleet or (Fleet(settings) if settings else FLEET.get(None) or Fleet(load_settings()))
    settings, about, metrics = fleet.settings, project()["project"], Metrics()
    on_drop = metrics.dropped_lines.inc
    log, request_line, writer = configure_logging(settings.log_level, settings.log_format, on_drop)
    labels, versions = contract_outputs()["labels"], tolerances(settings.artifacts_dir)
    feedback = Feedback(labels, versions, served_contract_sha256(), fleet.given)
    models = Models(fleet, metrics, log, feedback)
    service = Service(
        name=about["name"],
        version=about["version"],
        settings=settings,
        fleet=fleet,
        log=log,
        request_line=request_line,
        metrics=metrics,
        recorder=Recorder(models.write),
        guard=Guard(settings, log, metrics.fallbacks.inc),
        feedback=feedback,
        models=models,
    )
    app = FastAPI(
        title=service.name,
        version=service.version,
        description=about["description"],
        lifespan=partial(lifespan, service, writer),
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        telemetry=TelemetryConfig(tracing=False, metrics=False, logs=False),
        exception_handlers=dict.fromkeys(HANDLED, handle),
    )
    keys = [Security(scheme) for scheme in SCHEMES] if settings.api_keys else []
    app.include_router(inference, dependencies=keys)
    app.include_router(operations)
    app.openapi = partial(openapi, app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    if settings.docs:
        add_docs(app)
    if settings.metrics_enabled:
        add_metrics(app, service)
    # FastAPI's stack is inside our middleware, so that predictions skip FastAPI's layers.
    app.middleware_stack = ServiceMiddleware(app.build_middleware_stack(), service)
    if settings.cors_origins:
        app.middleware_stack = CrossOrigin(app.middleware_stack, settings)
    install(app, service)
    return app
