"""The variables of the capability `tracing`."""

from typing import Annotated

from pydantic import Field

from app import settings


class Settings(settings.Settings):
    """Where the spans go."""

    # No user and password: those would be credentials, in a value that is shown and logged.
    tracing_endpoint: Annotated[str | None, Field(pattern=r"^https?://[^/@\s]+(/\S*)?$")] = None
