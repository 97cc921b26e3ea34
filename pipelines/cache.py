"""An LRU cache that counts hits and misses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


def _one(_: object) -> int:
    return 1


class LruCache(Generic[K, V]):
    """Keeps values within a budget; the newest stays even if it alone exceeds it. Not thread-safe."""

    def __init__(self, budget: int, cost: Callable[[V], int] = _one) -> None:
        """Keep values whose `cost` adds up to `budget` at most: a number of entries by default."""
        self._budget = budget
        self._cost = cost
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.hits = 0
        """Lookups that found something, since the start."""
        self.misses = 0
        """Lookups that found nothing."""

    def get(self, key: K) -> V | None:
        """The value, or None; counted as a hit or a miss."""
        value = self._entries.get(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> V:
        """Keep a value, and hand it back."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > 1 and sum(map(self._cost, self._entries.values())) > self._budget:
            self._entries.popitem(last=False)
        return value

    def __len__(self) -> int:
        return len(self._entries)
