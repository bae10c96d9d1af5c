"""Authentication and quotas. Both use the headers only, before the body is read.

    key -> sha256 -> compared with every known hash -> client name -> quota of the client, quota of failures

Quotas are counted in Redis for all workers together; without Redis, or while it is down, by each worker.
"""

import asyncio
import hashlib
import hmac
import re
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from time import monotonic, time
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl

from fastapi.security import APIKeyHeader, HTTPBearer

from app.core.errors import ServiceError
from app.observability.logging import Logger
from app.settings import Settings

# For the OpenAPI document only: the middleware calls `Guard` before any route.
SCHEMES = (APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False))

MAX_CLIENTS, MAX_HITS = 10_000, 1_000_000  # remembered by each worker: about 40 MB at most
ANSWER_SECONDS = 0.5  # timeout for Redis; then the worker counts by itself
PAUSE_SECONDS = 5.0  # before a Redis that failed is asked again
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
# Parameters that hold a key; must not match `author` or `keyword`.
_KEY_NAMES = re.compile(r"(x[-_]?)?(api|access|auth|client)?[-_]?(key|token|secret)|auth(orization)?", re.I)
_HOW = "send the key in the header X-API-Key, or as Authorization: Bearer"


class Limit(NamedTuple):
    """At most `amount` in any `seconds`."""

    amount: int
    seconds: int
    text: str

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """A limit from text such as `600/minute`."""
        amount, unit = text.split("/")
        return cls(int(amount), _SECONDS[unit], text)


# A valid key is accepted beyond this limit: clients behind a shared address must not lock each other out.
# The length of keys prevents guessing; this limit slows down clients that loop with a wrong key.
FAILURES = Limit.parse("30/minute")


class Windows:
    """Moving windows in the memory of this process; at the limits the longest idle client is forgotten."""

    def __init__(self) -> None:
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()
        self._total = 0

    def hit(self, limit: Limit, name: str) -> float:
        """Count a hit and return 0, or return the seconds until the next hit is allowed."""
        now, hits = monotonic(), self._hits.setdefault(name, deque(maxlen=limit.amount))
        self._hits.move_to_end(name)
        if len(hits) < limit.amount:
            self._total += 1
        elif (left := hits[0] + limit.seconds - now) > 0:
            return left
        hits.append(now)
        while len(self._hits) > MAX_CLIENTS or self._total > MAX_HITS:
            self._total -= len(self._hits.popitem(last=False)[1])
        return 0.0


class SharedWindows:
    """Moving windows in Redis, exact over all workers. While Redis is down each worker counts by itself."""

    def __init__(self, uri: str, log: Logger, on_fallback: Callable[[], None]) -> None:
        from limits import RateLimitItemPerSecond  # here: slow, and only needed with Redis
        from limits.aio.strategies import MovingWindowRateLimiter
        from limits.storage import storage_from_string
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # One retry, because Redis may have closed a pooled connection.
        pool = BlockingConnectionPool.from_url(uri, timeout=None, retry=Retry(NoBackoff(), 1))
        options: dict[str, Any] = {"implementation": "redispy", "connection_pool": pool}
        self._shared = MovingWindowRateLimiter(storage_from_string(f"async+{uri}", **options))
        self._item, self._own = RateLimitItemPerSecond, Windows()
        self._log, self._on_fallback = log, on_fallback
        self._ask_again = 0.0  # time of the next try while Redis is down; else 0

    async def hit(self, limit: Limit, name: str) -> float:
        """See `Windows.hit`; never raises."""
        if (now := monotonic()) >= self._ask_again:
            if self._ask_again:  # one request tries; others do not wait for it
                self._ask_again = now + PAUSE_SECONDS
            item, left = self._item(limit.amount, limit.seconds), 0.0
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if not await self._shared.hit(item, name):
                        window = await self._shared.get_window_stats(item, name)
                        left = max(0.001, window.reset_time - time())
            except Exception as error:  # a failing Redis must not refuse requests
                if not self._ask_again:
                    self._log.error("rate limit storage away, counting per worker", exc_info=error)
                self._ask_again = monotonic() + PAUSE_SECONDS
            else:
                if self._ask_again:
                    self._ask_again = 0.0
                    self._log.info("rate limit storage back")
                return left
        self._on_fallback()
        return self._own.hit(limit, name)


class Guard:
    """Authentication and quotas of one process."""

    def __init__(self, settings: Settings, log: Logger, on_fallback: Callable[[], None]) -> None:
        self._digests = [bytes.fromhex(key.get_secret_value()) for key in settings.api_keys]
        self.quota = Limit.parse(settings.rate_limit) if settings.rate_limit else None
        uri = settings.rate_limit_storage.get_secret_value()
        self._shared = None if uri.startswith("memory") else SharedWindows(uri, log, on_fallback)
        self._own = Windows()

    def identify(self, key: bytes | None, query: bytes, address: str) -> tuple[str, bool]:
        """The client's hashed name for logs and quotas, and whether the client is accepted."""
        if not self._digests:
            return _hashed(address), True
        digest = hashlib.sha256(key or b"").digest()
        # Compare with all keys, so that the duration does not reveal which key matched.
        known = sum(hmac.compare_digest(digest, one) for one in self._digests)
        if key and known and not (query and _in_query(query)):
            return digest.hex()[:12], True
        return _hashed(address), False

    async def refuse(self, client: str, key: bytes | None, query: bytes) -> NoReturn:
        """Raise 401 for a request that `identify` did not accept, or 429 after too many of them."""
        await self.spend(FAILURES, f"failed:{client}")
        detail = "this key is not accepted" if key else _HOW
        if query and _in_query(query):
            detail = f"a key in the URL ends up in logs: replace it, and {_HOW}"
        error = ServiceError("unauthorized", detail)
        reason = ', error="invalid_token"' if key else ""  # RFC 6750: only if a key was sent
        error.headers["www-authenticate"] = f'Bearer realm="service"{reason}, ApiKey header="X-API-Key"'
        raise error

    async def spend(self, limit: Limit, name: str) -> None:
        """Count a request of `name`; raises ServiceError if it exceeds the limit."""
        left = await self._shared.hit(limit, name) if self._shared else self._own.hit(limit, name)
        if left > 0:
            kind = "without an accepted key" if limit is FAILURES else "for a client"
            error = ServiceError("rate_limited", f"at most {limit.text} {kind}")
            error.headers["retry-after"] = str(ceil(left))
            raise error


def _in_query(query: bytes) -> bool:
    names = (name for name, _ in parse_qsl(query.decode("latin-1").replace(";", "&"), keep_blank_values=True))
    return any(map(_KEY_NAMES.fullmatch, names))


@lru_cache(maxsize=4096)
def _hashed(address: str) -> str:
    """A hashed address: IPv4 mapped to IPv6 counts as IPv4, and a /64 of IPv6 counts as one client."""
    with suppress(ValueError):
        ip = ip_address(address)
        if isinstance(ip, IPv6Address):
            address = str(ip.ipv4_mapped or ip_network((int(ip) >> 64 << 64, 64)))
    return hashlib.sha256(address.encode()).hexdigest()[:12]
