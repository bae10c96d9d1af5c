"""Who may call, and how often. Decided from the headers alone, before the body is read."""

import hashlib
import hmac
from functools import lru_cache
from time import time

from fastapi.security import APIKeyHeader, HTTPBearer

from app.core.errors import ServiceError
from app.settings import Settings

# These only describe the keys in OpenAPI; the middleware has asked `Guard` before a route is reached.
SCHEMES = (APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False))


class Guard:
    """Authentication and rate limit of one process."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [bytes.fromhex(key.get_secret_value()) for key in settings.api_keys]
        self.limited = settings.rate_limit is not None
        if settings.rate_limit is not None:
            from limits import parse  # here, so that a service without quotas does not pay for it
            from limits.aio.strategies import MovingWindowRateLimiter
            from limits.storage import storage_from_string

            uri = settings.rate_limit_storage.get_secret_value()
            options = {} if uri.startswith("memory") else {"implementation": "redispy"}
            self._limiter = MovingWindowRateLimiter(storage_from_string(f"async+{uri}", **options))
            self._limit = parse(settings.rate_limit)

    def authenticate(self, key: bytes | None, address: str) -> str:
        """The client's name for logs and quotas, hashed; raises ServiceError."""
        if not self._digests:
            return _hashed(address)
        digest = hashlib.sha256(key or b"").digest()
        # All keys are compared, so that the time tells nothing about which one matched.
        if sum(hmac.compare_digest(digest, known) for known in self._digests):
            return digest.hex()[:12]
        error = ServiceError("forbidden", "this key is not accepted") if key else ServiceError("unauthorized")
        error.headers["www-authenticate"] = 'Bearer realm="service", ApiKey header="X-API-Key"'
        raise error

    async def spend(self, client: str) -> None:
        """Take one request from the client's quota; raises ServiceError."""
        if not await self._limiter.hit(self._limit, client):
            error = ServiceError("rate_limited", f"the quota is {self._limit}")
            reset = (await self._limiter.get_window_stats(self._limit, client)).reset_time
            error.headers["retry-after"] = str(max(1, round(reset - time())))
            raise error


@lru_cache(maxsize=4096)
def _hashed(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:12]
