"""The application: every part is made here, in the order in which the parts need each other.

settings, fleet -> metrics, log -> feedback, models -> service -> routes, documents, middleware -> FastAPI
"""

import tomllib
from functools import cache, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from app import capabilities
from app.api.call import Service
from app.api.docs import add_docs, openapi
from app.api.errors import handle
from app.api.lifespan import lifespan
from app.api.metrics import add_metrics
from app.api.middleware import CrossOrigin, ServiceMiddleware
from app.api.routes import inference, operations
from app.api.routing import JSONRoute
from app.api.security import SCHEMES, Guard
from app.core.errors import ServiceError
from app.monitoring.feedback import Feedback, tolerances
from app.observability.logging import configure_logging
from app.observability.metrics import Metrics
from app.observability.recorder import Recorder
from app.rollout.fleet import FLEET, Fleet
from app.rollout.models import Models
from app.schemas.contract import contract_inputs, contract_outputs, served_contract_sha256
from app.settings import Settings, load_settings

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
HANDLED = (HTTPException, RequestValidationError, ServiceError, Exception)


@cache
def project() -> dict[str, Any]:
    """The `project` table of pyproject.toml: name, version, description."""
    table: dict[str, Any] = tomllib.loads(PROJECT_FILE.read_text("utf-8"))["project"]
    return table


def create_app(settings: Settings | None = None, fleet: Fleet | None = None) -> FastAPI:
    """The ASGI application; without arguments that of the master's fleet, or else of the environment."""
    fleet = fleet or (Fleet(settings) if settings else FLEET.get(None) or Fleet(load_settings()))
    settings, about, metrics = fleet.settings, project(), Metrics()
    on_drop = metrics.dropped_lines.inc
    log, request_line, writer = configure_logging(settings.log_level, settings.log_format, on_drop)
    labels, versions = contract_outputs()["labels"], tolerances(settings.artifacts_dir)
    feedback = Feedback(labels, versions, served_contract_sha256(), fleet.given)
    models = Models(fleet, metrics, log, feedback)
    service = Service(
        name=about["name"],
        version=about["version"],
        settings=settings,
        log=log,
        request_line=request_line,
        metrics=metrics,
        recorder=Recorder([models]),
        guard=Guard(settings, log, metrics.fallbacks.inc),
        feedback=feedback,
        models=models,
        fleet=fleet,
    )
    app = FastAPI(
        title=service.name,
        version=service.version,
        description=about["description"],
        lifespan=lifespan(service, writer),
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
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
    app.middleware_stack = _stack(app, service)
    capabilities.install(app, service)
    return app


def _stack(app: FastAPI, service: Service) -> ASGIApp:
    """FastAPI's stack inside our middleware, so that a prediction passes only layers that know it."""
    settings = service.settings
    direct = {route.path: route for route in inference.routes if isinstance(route, JSONRoute)}
    features = frozenset(entry["name"] for entry in contract_inputs())
    stack: ASGIApp = ServiceMiddleware(app.build_middleware_stack(), service, direct, features)
    if not settings.cors_origins:
        return stack
    headers = ["authorization", "content-type", "idempotency-key", "traceparent", "x-api-key", "x-request-id"]
    headers += filter(None, [settings.canary_header])
    exposed = ("retry-after", "x-request-id")
    return CrossOrigin(stack, settings.cors_origins, ("GET", "POST"), headers, expose_headers=exposed)
