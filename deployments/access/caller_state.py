"""State of callers between requests (API-10): their options, their requests in flight, and orders to these.

Everything belongs to the name of a key; without keys everybody on this machine is one caller. Each ingress replica has
its own state. Where limits are counted in Redis the replicas share it through Redis, so that a request finds the
options that were set at another replica, and an order reaches a request wherever it runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from deployments.access.limits import STORE_REST_S, STORE_TIMEOUT_S

logger = logging.getLogger(__name__)
T = TypeVar("T")

Order = Literal["interrupt", "skip", "show"]
ORDERS: tuple[Order, ...] = ("interrupt", "skip", "show")
TELLING_S = 0.5
"""Seconds between two checks of a request in flight for orders from other replicas."""
FORGOTTEN_S = 30
"""Seconds without an update after which a request counts as lost with its replica."""


class Work(Protocol):
    """A request in flight."""

    id: str

    def state(self) -> dict[str, Any]:
        """Its state, ready for JSON."""

    def follow(self, order: Order) -> None:
        """Obey `interrupt` (end all of it), `skip` (end the first unfinished batch) or `show` (make previews)."""


class CallerState:
    """Options and requests in flight of each key, in this replica or shared through Redis."""

    def __init__(self, store: str) -> None:
        """Share through `store` if it is a Redis; `memory://` shares nothing."""
        self._options: dict[str, dict[str, Any]] = {}
        self._work: dict[str, dict[str, Work]] = {}
        self._shared = _Shared(store) if store.startswith("redis") else None

    async def close(self) -> None:
        """Let go of the connections to Redis."""
        if self._shared is not None:
            await self._shared.close()

    async def options(self, key: str | None) -> dict[str, Any]:
        """The options that a caller set last, here or at another replica."""
        own = self._options.get(_owner(key), {})
        if self._shared is None:
            return own
        return await self._shared.options(_owner(key), own)

    async def keep_options(self, key: str | None, options: Mapping[str, Any]) -> None:
        """Replace the options of a caller."""
        self._options[_owner(key)] = dict(options)
        if self._shared is not None:
            await self._shared.keep_options(_owner(key), options)

    @asynccontextmanager
    async def at_work(self, key: str | None, work: Work) -> AsyncIterator[None]:
        """Within the block, the caller sees `work` among the states and may give it orders."""
        own = self._work.setdefault(_owner(key), {})
        own[work.id] = work
        telling = asyncio.create_task(self._shared.keep_telling(_owner(key), work)) if self._shared else None
        try:
            yield
        finally:
            del own[work.id]
            if not own:
                self._work.pop(_owner(key), None)
            if telling is not None:
                telling.cancel()
                await asyncio.wait((telling,))

    async def states(self, key: str | None) -> list[dict[str, Any]]:
        """The states of a caller's work, the oldest first."""
        states = {work.id: work.state() for work in self._work.get(_owner(key), {}).values()}
        if self._shared is not None:
            states = await self._shared.states(_owner(key)) | states
        return sorted(states.values(), key=lambda state: float(state.get("began", 0)))

    async def order(self, key: str | None, order: Order) -> int:
        """Give an order to all requests of a caller; returns how many it reached."""
        own = list(self._work.get(_owner(key), {}).values())
        for work in own:
            work.follow(order)
        if self._shared is None:
            return len(own)
        return len(own) + await self._shared.order(_owner(key), order, {work.id for work in own})


def _owner(key: str | None) -> str:
    return key or ""


class _Shared:
    """The part in Redis. If Redis does not answer, a replica uses its own state."""

    def __init__(self, address: str) -> None:
        wait = STORE_TIMEOUT_S
        self._redis: Any = Redis.from_url(  # of no type: redis says of its methods that they may not be awaitable
            address, decode_responses=True, socket_timeout=wait, socket_connect_timeout=wait
        )
        self._rests_until = 0.0

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    async def _asked(self, ask: Callable[[], Awaitable[T]], otherwise: T) -> T:
        if time.monotonic() < self._rests_until:
            return otherwise
        try:
            return await ask()
        except (RedisError, OSError, TimeoutError) as error:
            self._rests_until = time.monotonic() + STORE_REST_S
            logger.warning("the limits store does not answer, so this replica knows only its own requests: %s", error)
            return otherwise

    async def options(self, owner: str, own: dict[str, Any]) -> dict[str, Any]:
        async def read() -> dict[str, Any]:
            text = await self._redis.get(_name(owner, "options"))
            return dict(json.loads(text)) if text else {}

        return await self._asked(read, own)

    async def keep_options(self, owner: str, options: Mapping[str, Any]) -> None:
        text = json.dumps(options)
        await self._asked(lambda: self._redis.set(_name(owner, "options"), text), None)

    async def keep_telling(self, owner: str, work: Work) -> None:
        """Tell of `work` and follow what is ordered, until this is cancelled."""
        followed = dict.fromkeys(ORDERS, 0)
        try:
            while True:
                orders = await self._asked(lambda: self._tell(owner, work), list(followed.values()))
                for order, times in zip(ORDERS, orders, strict=True):
                    for _ in range(times - followed[order]):
                        work.follow(order)
                    followed[order] = times  # counts end with their hash, and begin again
                await asyncio.sleep(TELLING_S)
        finally:
            await self._asked(lambda: self._forget(owner, work.id), None)

    async def _tell(self, owner: str, work: Work) -> list[int]:
        """How often each order was given so far."""
        told = json.dumps(work.state() | {"told": time.time()})
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hset(_name(owner, "work"), work.id, told)
            pipe.expire(_name(owner, "work"), FORGOTTEN_S)
            pipe.hmget(_name(owner, "orders"), [f"{work.id} {order}" for order in ORDERS])
            *_, given = await pipe.execute()
        return [int(times or 0) for times in given]

    async def _forget(self, owner: str, work_id: str) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hdel(_name(owner, "work"), work_id)
            pipe.hdel(_name(owner, "orders"), *(f"{work_id} {order}" for order in ORDERS))
            await pipe.execute()

    async def states(self, owner: str) -> dict[str, dict[str, Any]]:
        async def read() -> dict[str, dict[str, Any]]:
            told = await self._redis.hgetall(_name(owner, "work"))
            states = {work_id: dict(json.loads(text)) for work_id, text in told.items()}
            return {k: s for k, s in states.items() if time.time() - s["told"] < FORGOTTEN_S}

        return await self._asked(read, {})

    async def order(self, owner: str, order: Order, reached: set[str]) -> int:
        """Give an order to what is not `reached` yet; says to how many requests it went."""
        others = set(await self.states(owner)) - reached

        async def write() -> int:
            async with self._redis.pipeline(transaction=False) as pipe:
                for work_id in others:
                    pipe.hincrby(_name(owner, "orders"), f"{work_id} {order}", 1)
                pipe.expire(_name(owner, "orders"), FORGOTTEN_S)
                await pipe.execute()
            return len(others)

        return await self._asked(write, 0) if others else 0


def _name(owner: str, what: str) -> str:
    return f"sdgraph/desk/{owner}/{what}"
