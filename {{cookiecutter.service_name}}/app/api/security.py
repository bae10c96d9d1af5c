"""Who may call, and how often. Decided from the headers alone, before the body is read."""

import hashlib
import hmac
from functools import lru_cache
from time import time
from typing import Any

from fastapi.security import APIKeyHeader, HTTPBearer

from app.api.errors import Forbidden, RateLimited, Unauthorized
from app.settings import Settings

CHALLENGE = 'Bearer realm="service", ApiKey header="X-API-Key"'

# These two only describe the keys in OpenAPI; the middleware has called `Guard` before a route is reached.
api_key_header = APIKeyHeader(
    name="X-API-Key", auto_error=False, description="The key; the service knows its sha256."
)
bearer = HTTPBearer(auto_error=False, description="The same key as a bearer token.")


class Guard:
    """Authentication and rate limit of one process."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [bytes.fromhex(key.get_secret_value()) for key in settings.api_keys]
        self._limit = None
        if settings.rate_limit:
            from limits import parse  # here, so that a service without quotas does not pay for it
            from limits.aio.strategies import MovingWindowRateLimiter

            self._limit = parse(settings.rate_limit)
            self._limiter = MovingWindowRateLimiter(_storage(settings.rate_limit_storage.get_secret_value()))

    @property
    def limits(self) -> bool:
        """Whether there is a rate limit."""
        return self._limit is not None

    def authenticate(self, key: bytes | None, address: str) -> str:
        """The client's name for logs and quotas, hashed; raises Unauthorized or Forbidden."""
        if not self._digests:
            return _hashed(address)
        if not key:
            raise _challenged(Unauthorized("send the key as X-API-Key or as a bearer token"))
        digest = hashlib.sha256(key).digest()
        # All keys are compared, so that the time tells nothing about which one matched.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise _challenged(Forbidden("this key is not accepted"))
        return digest.hex()[:12]

    async def spend(self, client: str) -> None:
        """Take one request from the client's quota; raises RateLimited."""
        if self._limit is not None and not await self._limiter.hit(self._limit, client):
            window = await self._limiter.get_window_stats(self._limit, client)
            error = RateLimited(f"the quota is {self._limit}")
            error.headers["retry-after"] = str(max(1, round(window.reset_time - time())))
            raise error


def _challenged(error: Unauthorized | Forbidden) -> Unauthorized | Forbidden:
    error.headers["www-authenticate"] = CHALLENGE
    return error


def _storage(uri: str) -> Any:
    from limits.storage import storage_from_string

    options = {} if uri.startswith("memory") else {"implementation": "redispy"}
    return storage_from_string(f"async+{uri}", **options)


@lru_cache(maxsize=4096)
def _hashed(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:12]
