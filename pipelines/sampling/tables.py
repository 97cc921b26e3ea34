"""The tables of a model's samplers, kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from pipelines.cache import LruCache
from pipelines.plan import ScheduleSlice
from pipelines.sampling.probing import NotATableError, read_table
from pipelines.sampling.samplers import make_sampler
from pipelines.sampling.table import Table

logger = logging.getLogger(__name__)

MOST_TICKS = 256
"""Longer schedules keep the solver's own steps: their noise would be drawn ahead for minutes of work."""
KEPT_TABLES = 256
"""Tables of an engine: some 60 KB each at most."""


class SamplerTables:
    """The tables of one model's scheduler configuration, each made when it is first asked for. Thread-safe."""

    def __init__(self, config: Mapping[str, Any], most_ticks: int = MOST_TICKS) -> None:
        """Tables of at most `most_ticks` ticks over a model's `scheduler_config.json`."""
        self._config = config
        self._most_ticks = most_ticks
        self._kept: LruCache[tuple[str, ScheduleSlice, bool], tuple[Table | None]] = LruCache(KEPT_TABLES)
        self._lock = threading.Lock()

    def get(self, name: str, part: ScheduleSlice, masked: bool = False) -> Table | None:
        """The table of a sampler on a part of a schedule; None where the solver must take its own steps.

        `masked`: for a picture of which a part stays, `Table.with_kept`.
        """
        with self._lock:
            kept = self._kept.get((name, part, masked))
        if kept is None:
            # Two threads may probe the same at once: neither waits for the other, and both find the same.
            kept = (self._read(name, part, masked),)
            with self._lock:
                self._kept.put((name, part, masked), kept)
        return kept[0]

    def _read(self, name: str, part: ScheduleSlice, masked: bool) -> Table | None:
        sampler = make_sampler(name, self._config, part, seed=0)
        if len(sampler.timesteps) > self._most_ticks:
            return None
        try:
            table = read_table(sampler, img2img=part.strength is not None, masked=masked)
            return table.with_kept() if masked else table
        except NotATableError as error:
            logger.info("sampler %s has no table and takes its own steps: %s", name, error)
        except Exception:  # of somebody's own sampler, which may work on latents that are no probe
            logger.warning(
                "sampler %s has no table, because it cannot be probed, and takes its own steps", name, exc_info=True
            )
        return None
