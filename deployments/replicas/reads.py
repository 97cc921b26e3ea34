"""Reading the files that requests need from a volume, on separate threads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deployments.replicas.worker import Worker

if TYPE_CHECKING:
    from pipelines.loads import Needed

READING_THREADS = 16
"""Number of files that are read at the same time. Reads take long only on a volume that hangs."""


class Reads:
    """Reads each file once, however many requests wait for it, so that a read that hangs occupies only one thread.

    A request whose files are loaded does not use these threads. An instance belongs to one event loop.
    """

    def __init__(self, worker: Worker) -> None:
        """Create the threads, whose errors `worker` reports."""
        self._threads = worker.beside("read", READING_THREADS)
        self._under_way: dict[Needed, asyncio.Task[object]] = {}

    async def all(self, needed: Sequence[Needed]) -> list[object]:
        """Load everything in `needed` and return it; while the caller holds it, no later lookup reads a file.

        A request that is cancelled does not stop the read: the next request finds the file loaded.

        Raises:
            Exception: the exception of the read.
        """
        held = [value.found() for value in needed]
        missing = [value for value, found in zip(needed, held, strict=True) if found is None]
        read = await asyncio.gather(*(asyncio.shield(self._reading(value)) for value in missing))
        return [value for value in held if value is not None] + read

    def _reading(self, value: Needed) -> asyncio.Task[object]:
        if value not in self._under_way:
            task = asyncio.create_task(self._threads.run(value.get))
            self._under_way[value] = task
            task.add_done_callback(lambda done: self._done(value, done))
        return self._under_way[value]

    def _done(self, value: Needed, task: asyncio.Task[object]) -> None:
        del self._under_way[value]
        if not task.cancelled():
            task.exception()  # waiting callers get the error; without any, asyncio would log it
