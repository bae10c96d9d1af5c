"""The variables of the capability `tracing`."""

from typing import Annotated

from app import settings

_URL = settings.form(r"https?://[^/@\s]+(/\S*)?", "a URL such as http://collector:4318, without a password")


class Settings(settings.Settings):
    """The address of the collector."""

    # No user and password: they would be credentials, in a value that is shown and logged.
    tracing_endpoint: Annotated[str, _URL] | None = None
