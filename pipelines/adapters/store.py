"""The LoRAs that are loaded for one model."""

from __future__ import annotations

import threading
from collections.abc import Callable

from pipelines.adapters.layers import Adapter, Mixture
from pipelines.cache import LruCache
from pipelines.plan import LoraUse, StagePlan

LORA_BYTES = 2**30
"""Default budget of a store: some ten SDXL adapters in half precision."""


_Key = tuple[str, str | None, str | None, str]


class LoraStore:
    """Loaded adapters of one model, the least recently used leaving when their bytes exceed the budget.

    Thread-safe: adapters are loaded off the engine's thread, each once; who wants another one does not wait for it. A
    job holds its own reference, so one that leaves the store stays alive until its last job ends.
    """

    def __init__(
        self, load: Callable[[LoraUse, str], Adapter], part: str = "unet", max_bytes: int = LORA_BYTES
    ) -> None:
        """Load by a use and its base UNet with `load` what LoRAs have for a part, keep up to `max_bytes`."""
        self._load = load
        self._part = part
        self.cache: LruCache[_Key, Adapter] = LruCache(max_bytes, lambda adapter: adapter.nbytes)
        self._lock = threading.Lock()
        self._loading: dict[_Key, threading.Lock] = {}

    def mixture(self, stage: StagePlan) -> Mixture:
        """The LoRAs of a stage, loaded now where they have to be."""
        weights = ((use, use.weight_of(self._part)) for use in stage.loras)
        return tuple((self._get(use, stage.component), weight) for use, weight in weights if weight)

    def _get(self, use: LoraUse, base: str) -> Adapter:
        key = (use.name, use.file, use.version, base)
        with self._lock:
            if found := self.cache.get(key):
                return found
            turn = self._loading.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if found := self.cache.get(key):  # by the thread that had the turn before
                    return found
            try:
                loaded = self._load(use, base)
                with self._lock:
                    return self.cache.put(key, loaded)
            finally:
                with self._lock:
                    self._loading.pop(key, None)
