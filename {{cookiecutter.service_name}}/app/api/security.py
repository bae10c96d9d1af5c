"""Authentication and quotas. Decided from the headers alone, before the body is read.

    key -> sha256 -> compared with every known one -> the client's name -> its quota, and that of failures

Quotas are counted in Redis, for all workers together; without Redis, or while it is away, by each worker.
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

# These only describe the keys in OpenAPI; the middleware has asked `Guard` before a route is reached.
SCHEMES = (APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False))

MAX_CLIENTS, MAX_HITS = 10_000, 1_000_000  # that one worker remembers: some 40 MB at most
ANSWER_SECONDS = 0.5  # for Redis to answer, before the worker counts by itself
PAUSE_SECONDS = 5.0  # until a Redis that did not answer is asked again
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
# Names of keys, and of nothing else: `author` and `keyword` are words like any other.
_KEY_NAMES = re.compile(r"(x[-_]?)?(api|access|auth|client)?[-_]?(key|token|secret)|auth(orization)?", re.I)
_HOW = "send the key in the header X-API-Key, or as Authorization: Bearer"


class Limit(NamedTuple):
    """At most `amount` in any `seconds`."""

    amount: int
    seconds: int
    text: str

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """From the like of `600/minute`."""
        amount, unit = text.split("/")
        return cls(int(amount), _SECONDS[unit], text)


# A right key is accepted even then: behind a shared address, one caller must not lock out the others. Keys
# cannot be guessed because of their length; this tells a loop with a wrong key to stop.
FAILURES = Limit.parse("30/minute")


class Windows:
    """Moving windows in this process's memory; beyond its bounds the client idle longest is forgotten."""

    def __init__(self) -> None:
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()
        self._total = 0

    def hit(self, limit: Limit, name: str) -> float:
        """Take one and return 0, or the seconds until there is one to take."""
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
    """The same in Redis: exact over all workers. While Redis is away every worker counts by itself."""

    def __init__(self, uri: str, log: Logger, on_fallback: Callable[[], None]) -> None:
        from limits import RateLimitItemPerSecond  # here, so that a service without Redis does not pay for it
        from limits.aio.strategies import MovingWindowRateLimiter
        from limits.storage import storage_from_string
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # Retried once, because a connection from the pool may have been closed meanwhile.
        pool = BlockingConnectionPool.from_url(uri, timeout=None, retry=Retry(NoBackoff(), 1))
        options: dict[str, Any] = {"implementation": "redispy", "connection_pool": pool}
        self._shared = MovingWindowRateLimiter(storage_from_string(f"async+{uri}", **options))
        self._item, self._own = RateLimitItemPerSecond, Windows()
        self._log, self._on_fallback = log, on_fallback
        self._ask_again = 0.0  # while it is away, the time to ask it again; else 0

    async def hit(self, limit: Limit, name: str) -> float:
        """See `Windows.hit`; never raises."""
        if (now := monotonic()) >= self._ask_again:
            if self._ask_again:  # one request tries; the others do not wait for its result
                self._ask_again = now + PAUSE_SECONDS
            item, left = self._item(limit.amount, limit.seconds), 0.0
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if not await self._shared.hit(item, name):
                        window = await self._shared.get_window_stats(item, name)
                        left = max(0.001, window.reset_time - time())
            except Exception as error:  # a failing Redis is no reason to refuse a request
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
        """The client's name for logs and quotas, hashed, and whether it may call."""
        if not self._digests:
            return _hashed(address), True
        digest = hashlib.sha256(key or b"").digest()
        # All keys are compared, so that the time tells nothing about which one matched.
        known = sum(hmac.compare_digest(digest, one) for one in self._digests)
        if key and known and not (query and _in_query(query)):
            return digest.hex()[:12], True
        return _hashed(address), False

    async def refuse(self, client: str, key: bytes | None, query: bytes) -> NoReturn:
        """Raise the ServiceError for a request that `identify` did not let in; too many of them are 429."""
        await self.spend(FAILURES, f"failed:{client}")
        detail = "this key is not accepted" if key else _HOW
        if query and _in_query(query):
            detail = f"a key in the URL ends up in logs: replace it, and {_HOW}"
        error = ServiceError("unauthorized", detail)
        reason = ', error="invalid_token"' if key else ""  # RFC 6750: only where a key was sent
        error.headers["www-authenticate"] = f'Bearer realm="service"{reason}, ApiKey header="X-API-Key"'
        raise error

    async def spend(self, limit: Limit, name: str) -> None:
        """Take one request from what the limit grants to a name; raises ServiceError."""
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
    """One name for one client: IPv4 in IPv6's clothes is IPv4, and an IPv6 client has a whole /64."""
    with suppress(ValueError):
        ip = ip_address(address)
        if isinstance(ip, IPv6Address):
            address = str(ip.ipv4_mapped or ip_network((int(ip) >> 64 << 64, 64)))
    return hashlib.sha256(address.encode()).hexdigest()[:12]
