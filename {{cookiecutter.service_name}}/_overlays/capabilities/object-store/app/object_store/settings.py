"""The variables of the capability `object-store`."""

from typing import ClassVar

from app import settings


class Settings(settings.Settings):
    """Lets APP_ARTIFACTS_DIR be an address, and says which hosts it may lead to."""

    # No user, password or query: those would be credentials, in a value that is shown and logged.
    addresses: ClassVar[str | None] = r"((s3|gs|az)://[\w.-]+|https://[\w.-]+(:[0-9]+)?)(/[\w./-]*)?"

    artifacts_allow_private: bool = False
