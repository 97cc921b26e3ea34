"""Sleeping deployments are woken all at once, not one after another as a request gets to them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

SURELY_AWAKE_S = 60.0
"""Shorter than any delay before a deployment goes to sleep."""


class Waking:
    """Knocks at deployments that nobody was sent to for a while."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._knocking: set[asyncio.Task[None]] = set()

    def knock(self, handles: Iterable[Any]) -> None:
        """A request is about to visit these: those that may sleep start now. Nothing is waited for."""
        now = asyncio.get_running_loop().time()
        for handle in handles:
            if now - self._last.get(id(handle), -SURELY_AWAKE_S) >= SURELY_AWAKE_S:
                task = asyncio.create_task(self._knock(handle))
                self._knocking.add(task)
                task.add_done_callback(self._knocking.discard)
            self._last[id(handle)] = now

    async def _knock(self, handle: Any) -> None:
        with contextlib.suppress(Exception):  # whatever is wrong there, the request itself will meet it
            await handle.awake.remote()
