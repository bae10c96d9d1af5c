"""The variables of the capability `object-store`."""

from typing import ClassVar

from app import settings


class Settings(settings.Settings):
    """Addresses in APP_ARTIFACTS_DIR, and the hosts that are allowed."""

    # No user, password or query: they would be credentials, in a value that is shown and logged.
    addresses: ClassVar[str | None] = r"((s3|gs|az)://[\w.-]+|https://[\w.-]+(:[0-9]+)?)(/[\w./-]*)?"

    artifacts_allow_private: bool = False
