"""The catalog of an ingress, which changes with the folders of the library beside it."""

from __future__ import annotations

import asyncio
import logging
import time

from config.catalog import Catalog
from pipelines.library.files import MOST_WAITING_S, SETTLE_S
from pipelines.library.library import Library
from pipelines.plan import GenerationPlan
from pipelines.weights.versions import version_of

logger = logging.getLogger(__name__)

RESCAN_S = 1.0
"""Least seconds between two walks through the folders that nobody asked for."""


class LibraryWatch:
    """Reads the library again when somebody might miss what is new in it: nothing runs in between.

    A request that names what is not there, one whose LoRA's file has changed, and whoever reads a listing sees the
    folders as they are, at most `RESCAN_S` old. Every ingress does so for itself; the other replicas are told by the
    plan which file is meant.
    """

    def __init__(self, built: Catalog) -> None:
        """Begin with the catalog that the graph was built with."""
        self._library = Library(built) if built.library else None
        self.catalog = self._library.read() if self._library else built
        self._read_at = time.monotonic()
        self._reading: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Read the folders now; all who ask meanwhile share one reading that begins after they asked."""
        if self._library is None:
            return
        if self._reading is not None:
            await asyncio.shield(self._reading)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(self._library))
        await asyncio.shield(self._reading)

    async def settle(self) -> None:
        """Read the folders until no file in them was written a moment ago, or `MOST_WAITING_S` have passed."""
        end = time.monotonic() + MOST_WAITING_S
        await self.refresh()
        while any(entry.is_new for entry in self.catalog.unserved) and time.monotonic() < end:
            await asyncio.sleep(SETTLE_S)
            await self.refresh()

    async def changed(self) -> bool:
        """Whether the catalog is another one after a look at folders that were read more than `RESCAN_S` ago."""
        if self._library is None or time.monotonic() - self._read_at < RESCAN_S:
            return False
        before = self.catalog
        await self.refresh()
        return self.catalog != before

    async def holds(self, plan: GenerationPlan) -> bool:
        """Whether the files of the library that a plan means are still the ones it means."""
        files = {(use.file, use.version) for stage in plan.stages for use in stage.loras if use.file is not None}
        texts = (stage.text.embeddings for stage in plan.stages)
        files |= {(use.file, use.version) for uses in texts for use in uses if use.file is not None}
        if not files:
            return True

        def same() -> bool:
            roots = self.catalog.library
            return all(any(version_of(root / file) == version for root in roots) for file, version in files)

        return await asyncio.to_thread(same)

    async def _read(self, library: Library) -> None:
        before = {lora.name for lora in self.catalog.loras}
        self.catalog = await asyncio.to_thread(library.read)
        self._read_at = time.monotonic()
        now = {lora.name for lora in self.catalog.loras}
        if now != before:
            logger.info("library: new LoRAs %s, gone %s", sorted(now - before), sorted(before - now))
