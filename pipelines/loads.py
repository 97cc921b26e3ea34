"""What is read from files when a request needs it, and kept: adapters, textual inversions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from pipelines.cache import LruCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Loads(Generic[K, V]):
    """Loaded values by key, the least recently used leaving when their cost exceeds the budget.

    Thread-safe: each value is loaded once, on the calling thread, and loading one does not block another. A value that
    left the cache is still found while somebody holds it.
    """

    def __init__(self, load: Callable[[K], V], cache: LruCache[K, V]) -> None:
        """Load with `load`, keep in `cache`."""
        self._load = load
        self.cache = cache
        self._held: WeakValueDictionary[K, V] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._loading: dict[K, threading.Lock] = {}

    def found(self, key: K) -> V | None:
        """The value if it is loaded; returns at once, and no cache counts it."""
        return self._held.get(key)

    def get(self, key: K) -> V:
        """The value, loaded now if it has to be."""
        with self._lock:
            if (found := self._found(key)) is not None:
                return found
            turn = self._loading.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if (found := self._found(key)) is not None:  # by the thread that had the turn before
                    return found
            try:
                loaded = self._load(key)
                with self._lock:
                    self._held[key] = loaded
                    return self.cache.put(key, loaded)
            finally:
                with self._lock:
                    self._loading.pop(key, None)

    def _found(self, key: K) -> V | None:
        return self.cache.get(key) or self._held.get(key)


@dataclass(frozen=True)
class Needed:
    """A value that some work will need: holding it while the work runs saves reading it again."""

    loads: Loads[Any, Any]
    key: Hashable

    def found(self) -> object | None:
        """The value if it is loaded."""
        return self.loads.found(self.key)

    def get(self) -> object:
        """The value, loaded now if it has to be."""
        return self.loads.get(self.key)
