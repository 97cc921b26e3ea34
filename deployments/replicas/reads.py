"""Files that a request needs of a volume, read on threads beside."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deployments.replicas.worker import Worker

if TYPE_CHECKING:
    from pipelines.loads import Needed

READING_THREADS = 16
"""Files that are read at a time; only those on a volume that hangs take long."""


class Reads:
    """Reads each file once, however many requests wait for it, so that one that hangs takes one thread.

    A request whose files are loaded does not use these threads. Belongs to one event loop.
    """

    def __init__(self, worker: Worker) -> None:
        """Have threads beside `worker`."""
        self._threads = worker.beside("read", READING_THREADS)
        self._under_way: dict[Needed, asyncio.Task[object]] = {}

    async def all(self, needed: Sequence[Needed]) -> list[object]:
        """Everything that is needed; as long as it is held, looking for it reads nothing.

        A request that leaves does not stop the reading: the next one finds the file loaded.

        Raises:
            Exception: what reading raised.
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
            task.exception()  # who waited is told; if nobody did any more, nobody misses it
