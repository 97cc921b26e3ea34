"""Limits of a key: requests a minute, pixel-steps a day."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from limits import RateLimitItem, RateLimitItemPerDay, parse
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from redis.asyncio import ConnectionPool

from pipelines.errors import SdgraphError

logger = logging.getLogger(__name__)

STORE_TIMEOUT_S = 1.0
STORE_REST_S = 5.0
"""Seconds in which a store that did not answer is not asked: one that hangs would delay every request."""
Unit = Literal["requests", "pixel-steps"]


class RateLimitedError(SdgraphError):
    """A rate or quota is exceeded; `retry_after` is whole seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, retry_after)
        self.message = message
        self.retry_after = retry_after


@dataclass(frozen=True)
class KeyLimits:
    """The limits of each key."""

    rate: str | None = None
    """Requests, in `limits` notation such as `60/minute`; None or empty for any number."""
    pixel_steps_per_day: int | None = None
    """Sum of steps x width x height in the 24 hours from a key's first picture; None for any."""
    store: str = field(default="memory://", repr=False)
    """Where counts are kept: `memory://`, each ingress replica for itself, or `redis://[:password@]host:port`."""


class UsageLimiter:
    """Counts the requests of keys in a moving window and their pixel-steps by the day (API-5)."""

    def __init__(self, limits: KeyLimits) -> None:
        """Count by `limits`.

        Raises:
            ValueError: a rate or a store of another notation.
        """
        self._rate = parse(limits.rate) if limits.rate else None
        self._quota = RateLimitItemPerDay(limits.pixel_steps_per_day) if limits.pixel_steps_per_day else None
        self._pool = _pool(limits.store)
        self._shared = _Counters(_store(limits.store, self._pool))
        self._own = _Counters(MemoryStorage())
        self._store_rests_until = 0.0

    async def request(self, key: str) -> None:
        """Count one request; raises RateLimitedError when the window is full."""
        if self._rate is not None and (wait := await self._count("requests", self._rate, key, 1)):
            raise RateLimitedError(f"rate limit of {self._rate} exceeded; try again in {wait} s", wait)

    async def pixel_steps(self, key: str, amount: int) -> None:
        """Count the work of a picture that is about to be drawn; raises RateLimitedError when the day's is used up."""
        if self._quota is not None and (wait := await self._count("pixel-steps", self._quota, key, amount)):
            raise RateLimitedError(
                f"daily quota of {self._quota.amount} pixel-steps (steps x width x height) exceeded: "
                f"this picture takes {amount}; try again in {wait} s",
                wait,
            )

    async def _count(self, unit: Unit, item: RateLimitItem, key: str, cost: int) -> int:
        """Seconds to wait, 0 if it was counted. If the store is unreachable, this process counts in memory (API-6)."""
        if time.monotonic() >= self._store_rests_until:
            try:
                return await self._shared.hit(unit, item, key, cost)
            except StorageError as error:
                self._store_rests_until = time.monotonic() + STORE_REST_S
                logger.warning("the limits store does not answer, so this replica counts on its own: %s", error)
        return await self._own.hit(unit, item, key, cost)

    async def close(self) -> None:
        """Let go of the connections to Redis."""
        if self._pool is not None:
            await self._pool.aclose()


class _Counters:
    """The two ways of counting over one store."""

    def __init__(self, store: Storage) -> None:
        self._limiters: Mapping[Unit, RateLimiter] = {
            "requests": MovingWindowRateLimiter(store),
            # A moving window keeps an entry for each unit, and a picture costs millions.
            "pixel-steps": FixedWindowRateLimiter(store),
        }

    async def hit(self, unit: Unit, item: RateLimitItem, key: str, cost: int) -> int:
        limiter = self._limiters[unit]
        # Test before hit: a fixed window also counts what it refuses, so one large picture would lock small ones out.
        if await limiter.test(item, unit, key, cost=cost) and await limiter.hit(item, unit, key, cost=cost):
            return 0
        reset = (await limiter.get_window_stats(item, unit, key)).reset_time
        return max(1, math.ceil(reset - time.time()))


def _pool(uri: str) -> ConnectionPool | None:
    """The connections to a Redis, which `limits` itself would never close; None for another store."""
    if not uri.startswith("redis"):
        return None
    try:
        return ConnectionPool.from_url(uri, socket_timeout=STORE_TIMEOUT_S, socket_connect_timeout=STORE_TIMEOUT_S)
    except ValueError:  # not chained: its words repeat the password
        raise _refusal(uri) from None


def _store(uri: str, pool: ConnectionPool | None) -> Storage:
    if uri.startswith("memory://"):
        return MemoryStorage()
    options = {"implementation": "redispy", "connection_pool": pool}
    try:
        store = storage_from_string(f"async+{uri}", wrap_exceptions=True, key_prefix="sdgraph", **options)  # type: ignore[arg-type]
    except (ValueError, ConfigurationError):  # not chained: its words repeat the password
        raise _refusal(uri) from None
    assert isinstance(store, Storage)
    return store


def _refusal(uri: str) -> ValueError:
    return ValueError(
        f"limits store {uri.partition('://')[0]!r}: allowed are memory:// and redis://[:password@]host:port"
    )
