"""The catalog of an ingress, which follows the folders of its library."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

from config.catalog import Catalog
from pipelines.errors import SilentLibraryError
from pipelines.library.files import MOST_WAITING_S, SETTLE_S
from pipelines.library.library import Library
from pipelines.plan import GenerationPlan
from pipelines.weights.versions import version_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

RESCAN_S = 1.0
"""Least seconds between two automatic readings of the folders."""
FOLDERS_TIMEOUT_S = 3.0
"""Seconds that a request waits for the folders; a volume that hangs may take for ever."""


class LibraryWatch:
    """Reads the library again when a request may need a new file; nothing runs in between (GRA-21).

    A request that names what is not there, one whose LoRA's file has changed, and whoever reads a listing sees the
    folders as they are, at most `RESCAN_S` old. Every ingress does so for itself; the other replicas are told by the
    plan which file is meant.

    Where the volume does not answer, the last known catalog is served, and only the first request waits (GRA-20).
    """

    def __init__(self, built: Catalog) -> None:
        """Begin with the catalog that the graph was built with, and read the folders on a thread of their own."""
        self.catalog = built
        self._read_at = time.monotonic()
        self._reading: asyncio.Future[None] | None = None
        self._silent = False
        """Whether a request timed out while waiting for the folders, which still do not answer."""
        self._built = built
        self._library: Library | None = None
        self._thread = ThreadPoolExecutor(1, "library")
        if built.library:
            first = self._thread.submit(self._read)
            wait([first], timeout=FOLDERS_TIMEOUT_S)
            if first.done():
                first.result()

    async def refresh(self) -> None:
        """Read the folders now; all who ask meanwhile share one reading that begins after they asked.

        Raises:
            SilentLibraryError: they do not answer.
        """
        if not self._built.library:
            return
        if self._reading is not None and not self._reading.done():
            await self._patiently(self._reading)
        if self._reading is None or self._reading.done():
            self._reading = self._beside(self._read)
        await self._patiently(self._reading)

    async def settle(self) -> None:
        """Read the folders until no file in them was written a moment ago, or `MOST_WAITING_S` have passed."""
        end = time.monotonic() + MOST_WAITING_S
        await self.refresh()
        while any(entry.is_new for entry in self.catalog.unserved) and time.monotonic() < end:
            await asyncio.sleep(SETTLE_S)
            await self.refresh()

    async def changed(self) -> bool:
        """Whether the catalog is another one after a look at folders that were read more than `RESCAN_S` ago."""
        if not self._built.library or time.monotonic() - self._read_at < RESCAN_S:
            return False
        before = self.catalog
        with suppress(SilentLibraryError):
            await self.refresh()
        return self.catalog != before

    async def holds(self, plan: GenerationPlan) -> bool:
        """Whether the files of the library that a plan means are still the ones it means, or nobody can tell."""
        files = {(use.file, use.version) for stage in plan.stages for use in stage.loras if use.file is not None}
        texts = (stage.text.embeddings for stage in plan.stages)
        files |= {(use.file, use.version) for uses in texts for use in uses if use.file is not None}
        if not files:
            return True

        def same() -> bool:
            roots = self.catalog.library
            return all(any(version_of(root / file) == version for root in roots) for file, version in files)

        try:
            return await self._patiently(self._beside(same))
        except SilentLibraryError:
            return True

    def _beside(self, function: Callable[[], T]) -> asyncio.Future[T]:
        if self._silent:
            raise SilentLibraryError
        return asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _patiently(self, answer: asyncio.Future[T]) -> T:
        if not answer.done():
            if self._silent:
                raise SilentLibraryError
            await asyncio.wait((answer,), timeout=FOLDERS_TIMEOUT_S)
        if answer.done():
            return answer.result()
        self._silent = True
        logger.warning("the library's folders have not answered for %g s", FOLDERS_TIMEOUT_S)
        answer.add_done_callback(self._answered)
        raise SilentLibraryError

    def _answered(self, _: asyncio.Future[T]) -> None:
        self._silent = False

    def _read(self) -> None:
        """On the library's thread."""
        if self._library is None:
            self._library = Library(self._built)
        before = {lora.name for lora in self.catalog.loras}
        self.catalog = self._library.read()
        self._read_at = time.monotonic()
        now = {lora.name for lora in self.catalog.loras}
        if now != before:
            logger.info("library: new LoRAs %s, gone %s", sorted(now - before), sorted(before - now))
