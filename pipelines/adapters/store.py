"""The LoRAs that are loaded for one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipelines.adapters.layers import Adapter, Mixture
from pipelines.cache import LruCache
from pipelines.loads import Loads, Needed
from pipelines.plan import LoraUse, StagePlan

LORA_BYTES = 2**30
"""Default budget of a store: some ten SDXL adapters in half precision."""


class LoraKey(NamedTuple):
    """What makes two loaded adapters the same."""

    name: str
    file: str | None
    version: str | None
    base: str


class LoraStore:
    """Loaded adapters of one model, the least recently used leaving when their bytes exceed the budget.

    Thread-safe: each adapter is loaded once, off the engine's thread, and loading one does not block another. A
    job holds its own reference, so one that leaves the store stays alive until its last job ends.
    """

    def __init__(
        self, load: Callable[[LoraUse, str], Adapter], part: str = "unet", max_bytes: int = LORA_BYTES
    ) -> None:
        """Load by a use and its base UNet with `load` what LoRAs have for a part, keep up to `max_bytes`."""
        self._part = part
        self.cache: LruCache[LoraKey, Adapter] = LruCache(max_bytes, lambda adapter: adapter.nbytes)
        self._loads = Loads(lambda key: load(_use(key), key.base), self.cache)

    def mixture(self, stage: StagePlan) -> Mixture:
        """The LoRAs of a stage, loaded now where they have to be."""
        return tuple((self._loads.get(_key(use, stage)), weight) for use, weight in self._weighted(stage))

    def needed(self, stage: StagePlan) -> Sequence[Needed]:
        """The adapters that `mixture` needs for a stage."""
        return [Needed(self._loads, _key(use, stage)) for use, _ in self._weighted(stage)]

    def _weighted(self, stage: StagePlan) -> list[tuple[LoraUse, float]]:
        weights = ((use, use.weight_of(self._part)) for use in stage.loras)
        return [(use, weight) for use, weight in weights if weight]


def _key(use: LoraUse, stage: StagePlan) -> LoraKey:
    return LoraKey(use.name, use.file, use.version, stage.component)


def _use(key: LoraKey) -> LoraUse:
    return LoraUse(name=key.name, file=key.file, version=key.version, weight=1)
