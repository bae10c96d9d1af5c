"""GET /metrics, and the counts of every route that FastAPI's router answers."""

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info

from app.api.call import Service
from app.observability.metrics import scrape


def add_metrics(app: FastAPI, service: Service) -> None:
    """Serve /metrics; the middleware has the recorder settle before it gets here."""
    registry = service.metrics.registry

    def record(info: Info) -> None:
        handler, status = info.modified_handler, int(info.modified_status)
        service.count_answer(info.method, handler, status, info.modified_duration)

    instrumentator = Instrumentator(
        should_group_status_codes=False, should_group_untemplated=True, registry=registry
    )
    instrumentator.add(record).instrument(app)

    @app.get("/metrics", include_in_schema=False)
    def scraped() -> Response:
        return Response(scrape(registry), headers={"content-type": CONTENT_TYPE_LATEST})
