"""Passes of a network that are recorded once and replayed: on a GPU, CUDA graphs (REC-1 to REC-4).

A network of a thousand kernels is bound by launching them one by one. A CUDA graph launches all of them at once, but it
repeats exactly what was recorded: the same kernels over the same addresses. So a recorded pass reads its inputs from
tensors that stay where they are (`StaticRows`), leaves its result in another, and is padded to one of a few numbers of
rows. Everything else it makes lies in a pool that all recordings of a process share: it is lost at the next replay.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from pipelines.cache import LruCache

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 6, 8, 12, 16)
"""Rows of recorded passes. Not powers of two alone: where rows are not free, 6 filled up to 8 cost a third more."""
EAGER_PASSES = 3
"""Passes of a kind before it is recorded: recording costs some passes, which a shape that came once never earns."""
LIMIT = 16
"""Recordings that a network keeps: each holds its inputs and a few MB of the driver's, the pool is shared."""
REMEMBERED_KINDS = 256
WARM_UPS = 3
"""Passes before a recording, in which libraries choose algorithms and allocate for themselves (PyTorch, "CUDA
semantics: Using CUDA graphs")."""

T = TypeVar("T")
Part = Callable[[], None]


class Capturer(Protocol):
    """Turns a pass into a recording that can be replayed."""

    def capture(
        self, parts: Sequence[Part], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Sequence[Part]:
        """Record a pass; on the thread that runs the network, with valid inputs in place.

        Args:
            parts: the pass. Several where something outside must happen in between; what one leaves to the next is
                kept until then, for nothing else is replayed between the parts of one pass.
            reads: every tensor that changes from pass to pass and is read; it keeps its address.
            writes: every tensor that is read afterwards; it keeps its address.

        Returns:
            The replay of each part.
        """
        ...


class CudaCapturer:
    """Records CUDA graphs. One for a process: its recordings share a pool of memory.

    One stream for all of them, for torch's allocator hands memory back only to the stream it came from: on streams of
    their own recordings would not share the pool. `thread_local`: other threads go on to load LoRAs meanwhile.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def capture(
        self, parts: Sequence[Part], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Sequence[Part]:
        """As the protocol says; torch itself knows what is read and written."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                for part in parts:
                    part()
        current.wait_stream(self._stream)
        graphs = []
        for part in parts:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                part()
            graphs.append(graph)
        return [graph.replay for graph in graphs]


def capturer_for(device: str, graphs: bool) -> Capturer | None:
    """What records the passes of a process on this device; None where they are all evaluated as they come."""
    return CudaCapturer() if graphs and device == "cuda" and torch.cuda.is_available() else None


class StaticRows:
    """Inputs of a recorded pass, at fixed addresses."""

    def __init__(self, like: Sequence[torch.Tensor], rows: int) -> None:
        """Room for `rows` rows of tensors such as `like`, `[any number, ...]` each."""
        self.tensors = tuple(tensor.new_empty(rows, *tensor.shape[1:]) for tensor in like)

    def fill(self, given: Sequence[torch.Tensor]) -> None:
        """Set the rows; the last one is repeated to fill the rest."""
        for target, source in zip(self.tensors, given, strict=True):
            count = len(source)
            target[:count].copy_(source)
            if count < len(target):
                target[count:].copy_(source[-1:].expand_as(target[count:]))


def padded_rows(count: int) -> int | None:
    """Rows of the recorded pass that holds `count` rows; None if there is none so large."""
    return next((rows for rows in ROWS if rows >= count), None)


class Recorder(Generic[T]):
    """Decides which passes of one network are recorded, and keeps the recordings, the least recently used leaving.

    A kind of pass that could not be recorded is evaluated as usual from then on.
    """

    def __init__(self, limit: int = LIMIT, eager_passes: int = EAGER_PASSES) -> None:
        """Keep `limit` recordings, made after so many passes of a kind."""
        self._recordings: LruCache[Hashable, T] = LruCache(limit)
        self._limit = limit
        self._eager_passes = eager_passes
        self._passes: LruCache[Hashable, int] = LruCache(REMEMBERED_KINDS)
        self._failed: set[Hashable] = set()
        self.failures: Counter[str] = Counter()
        """Kinds that could not be recorded, by the type of the error."""

    def __len__(self) -> int:
        """Recordings there are."""
        return len(self._recordings)

    def due(self, kind: Hashable, at_once: bool = False) -> bool:
        """Whether a pass of this kind should be recorded; called once for each pass.

        Args:
            kind: shapes, and whatever else is known before the pass.
            at_once: it is, however often it came.
        """
        if kind in self._failed:
            return False
        passes = (self._passes.get(kind) or 0) + 1
        self._passes.put(kind, self._eager_passes + 1 if at_once else passes)
        return at_once or passes > self._eager_passes

    def find(self, kind: Hashable, key: Hashable, make: Callable[[], T]) -> T | None:
        """The recording of a kind of pass, made now if need be; None where that failed.

        Args:
            kind: as in `due`.
            key: what else the recording depends on.
            make: records the pass.
        """
        recording = self._recordings.get((kind, key))
        if recording is not None or kind in self._failed:
            return recording
        problem: str | None = None
        try:
            return self._recordings.put((kind, key), make())
        except Exception as error:  # whatever it is, the pass itself may still succeed
            problem = f"{type(error).__name__}: {error}"
            self.failures[type(error).__name__] += 1
        # Outside of the except block, whose traceback holds the memory of the pass that failed.
        self._failed.add(kind)
        logger.warning("passes of %s are no longer recorded: %s", kind, problem)
        return None

    def forget(self) -> None:
        """Let go of all recordings and their memory; they are made again when they are due."""
        self._recordings = LruCache(self._limit)
