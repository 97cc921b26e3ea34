"""CUDA graphs on a CPU, as far as correctness goes: what was recorded is repeated, over the same addresses.

A recording is a list of torch's operations with the tensors they were called with. A replay runs them again and puts
every result where the first one lay, so it knows nothing of Python: a number that was computed on the host, a branch,
an attribute that points elsewhere by now, all stay as they were when it was recorded.

What a graph would silently get wrong is made to show:

- before a replay its outputs and everything it makes on the way are spoiled, as other recordings of the pool would do;
- after a replay its inputs are spoiled: whoever does not set all of them each time reads NaN;
- tensors from outside that are neither inputs nor outputs (weights, slots of adapters) are not kept alive, and must
  still be there at each replay: a graph would read memory that belongs to somebody else;
- an operation for which a host would wait, or a copy from the host, is refused: a capture fails there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pipelines.recordings import Part

WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "lift_fresh"}


class CaptureError(RuntimeError):
    """What CUDA would refuse, or get wrong."""


@dataclass(frozen=True)
class _Outside:
    """A tensor that was there before: its place in memory, without a hold on the memory."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Outside:
        weak = StorageWeakRef(tensor.untyped_storage())
        return cls(weak, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise CaptureError(f"a replay reads {list(self.size)} of memory that was given back")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass
class _Recording(TorchDispatchMode):
    """The operations of one part, and what was made in them and in the parts before."""

    known: set[int]
    """Storages of inputs and outputs."""
    made: dict[int, torch.Tensor]
    """Storage -> a tensor of it, which keeps it."""
    operations: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise CaptureError(f"{name} cannot be captured")
        result = func(*args, **(kwargs or {}))
        given = tree_map_only(torch.Tensor, self._reference, (args, kwargs or {}))
        taken = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        fresh = tree_map_only(torch.Tensor, lambda tensor: None if _key(tensor) in taken else tensor, result)
        for tensor in tree_leaves(fresh):
            if isinstance(tensor, torch.Tensor):
                self.made.setdefault(_key(tensor), tensor)
        self.operations.append((func, *given, fresh))
        return result

    def _reference(self, tensor: torch.Tensor) -> Any:
        key = _key(tensor)
        return tensor if key in self.known or key in self.made else _Outside.of(tensor)

    def replay(self) -> None:
        for func, args, kwargs, fresh in self.operations:
            args, kwargs = tree_map_only(_Outside, _Outside.tensor, (args, kwargs))
            result = func(*args, **kwargs)
            for old, new in zip(tree_leaves(fresh), tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class FakeCapturer:
    """A Capturer for tests. `captures` and `replays` count; `fail` raises at the next capture."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.fail: Exception | None = None

    def capture(
        self, parts: Sequence[Part], reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]
    ) -> Sequence[Part]:
        """Record the parts; see the module."""
        if self.fail is not None:
            raise self.fail
        self.captures += 1
        known = {_key(tensor) for tensor in (*reads, *writes)}
        made: dict[int, torch.Tensor] = {}
        recordings = []
        for part in parts:
            with _Recording(known, made) as recording:
                part()
            recordings.append(recording)

        def replay(number: int) -> None:
            with torch.inference_mode():
                if number == 0:
                    self.replays += 1
                    for tensor in (*writes, *made.values()):
                        _spoil(tensor)
                recordings[number].replay()
                if number == len(recordings) - 1:
                    for tensor in reads:
                        _spoil(tensor)

        return [lambda number=number: replay(number) for number in range(len(recordings))]  # type: ignore[misc]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _spoil(tensor: torch.Tensor) -> None:
    """Fill with what nobody can take for a result."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
