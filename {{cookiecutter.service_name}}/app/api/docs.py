"""OpenAPI as this service answers, and /docs with assets of its own: no content delivery network, works offline."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from app.api.errors import MEDIA_TYPE

ASSETS = "/docs/assets"
_RETRYABLE = ("429", "503")


def add_docs(app: FastAPI) -> None:
    """Serve /docs and its assets."""
    folder = str(files("fastapi_offline") / "static")
    app.mount(ASSETS, StaticFiles(directory=folder), name="docs-assets")

    async def docs(_request: Request) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title} - API",
            swagger_js_url="docs/assets/swagger-ui-bundle.js",
            swagger_css_url="docs/assets/swagger-ui.css",
            swagger_favicon_url="docs/assets/favicon.png",
        )

    app.add_route("/docs", docs, include_in_schema=False)


def describe_errors(app: FastAPI) -> None:
    """Make `app.openapi()` give errors their media type and headers, which FastAPI's `responses` cannot say."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            for operations in schema["paths"].values():
                for operation in operations.values():
                    for status, response in operation["responses"].items():
                        if status >= "400":
                            response["content"] = {MEDIA_TYPE: response["content"].pop("application/json")}
                        if status in _RETRYABLE:
                            response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
