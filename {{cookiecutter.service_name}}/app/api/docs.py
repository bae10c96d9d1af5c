"""OpenAPI as this service answers, and /docs with assets of its own, so that it works offline."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from app.api.errors import MEDIA_TYPE


def add_docs(app: FastAPI) -> None:
    """Serve /docs and its assets."""

    async def docs(_request: Request) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title} - API",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )

    app.add_route("/docs", docs, include_in_schema=False)
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))


def openapi(app: FastAPI) -> dict[str, Any]:
    """The schema with the media type and headers of errors, which FastAPI's `responses` cannot say."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for operations in app.openapi_schema["paths"].values():
            for status, response in (
                pair for one in operations.values() for pair in one["responses"].items()
            ):
                if status >= "400":
                    response["content"] = {MEDIA_TYPE: response["content"].pop("application/json")}
                if status in ("429", "503"):
                    response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return app.openapi_schema
