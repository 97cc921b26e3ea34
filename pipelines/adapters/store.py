"""The LoRAs that are loaded for one model."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipelines.adapters.rows import Mixture, RowLora
from pipelines.cache import LruCache
from pipelines.plan import StagePlan

LORA_BYTES = 2**30
"""Default budget of a store: some ten SDXL adapters in half precision."""


class LoraStore:
    """Loaded adapters of one model, the least recently used leaving when their bytes exceed the budget.

    Thread-safe: adapters are loaded off the engine's thread. A job holds its own reference, so one that leaves the
    store stays alive until its last job ends.
    """

    def __init__(self, load: Callable[[str, str], RowLora], max_bytes: int = LORA_BYTES) -> None:
        """Load by public name and base UNet with `load`, keep up to `max_bytes`."""
        self._load = load
        self.cache: LruCache[tuple[str, str], RowLora] = LruCache(max_bytes, lambda lora: lora.nbytes)
        self._lock = threading.Lock()

    def mixture(self, stage: StagePlan) -> Mixture:
        """The LoRAs of a stage, loaded now where they have to be."""
        return tuple((self._get(use.name, stage.component), use.weight) for use in stage.loras)

    def _get(self, name: str, base: str) -> RowLora:
        with self._lock:
            return self.cache.get((name, base)) or self.cache.put((name, base), self._load(name, base))
