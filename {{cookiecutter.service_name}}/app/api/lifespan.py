"""The life of one process: load the model, follow the release, write everything at the end."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypedDict

from fastapi import FastAPI

from app.api.call import Service
from app.core.errors import reason_of
from app.observability.logging import LineWriter

BOOT_ERROR = 3  # gunicorn stops on this exit code of a worker, instead of starting it again for ever


class State(TypedDict):
    """Given to every request by the lifespan."""

    service: Service


def lifespan(service: Service, writer: LineWriter) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """FastAPI's lifespan of this service; `writer` is closed last."""

    @asynccontextmanager
    async def running(_app: FastAPI) -> AsyncIterator[State]:
        # In the background, so that /health and /ready tell the truth while a large model loads.
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

    return running


async def _load(service: Service, writer: LineWriter) -> None:
    """Load the version to serve; without any, the process ends."""
    try:
        await service.models.load()
    except Exception as error:
        service.log.error("cannot start", reason=reason_of(error))
        writer.close()
        # A worker that replaces another is tried again, and the others go on meanwhile.
        os._exit(1 if service.fleet.replaces else BOOT_ERROR)
