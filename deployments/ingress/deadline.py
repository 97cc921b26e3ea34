"""When a request must be finished."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from pipelines.errors import DeadlineError

T = TypeVar("T")


class Deadline:
    """Some seconds from when it is made."""

    def __init__(self, seconds: float) -> None:
        """Count from now."""
        self.seconds = seconds
        self._at = asyncio.get_running_loop().time() + seconds

    async def bound(self, work: Awaitable[T]) -> T:
        """Await `work` until then; raises DeadlineError."""
        try:
            async with asyncio.timeout_at(self._at) as scope:
                return await work
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineError(f"not finished within {self.seconds:g} seconds") from None
