"""Slots: the low-rank pairs of the adapters in use, side by side in tensors that stay where they are.

Every adapted module has room for the same number of ranks, and an adapter takes the same ranks in all (ADP-2). One
tensor of weights, `[rows, ranks]`, serves the whole model, a change of LoRAs is a copy between ticks, and what a
captured graph or a compiled block reads never moves. Two products a layer suffice for any number of adapters and rows.

A row's product with the ranks of others is multiplied by zero, so it must be finite: the rows of A are scaled until the
magnitudes of each add up to at most 1/2 (`settled`, ADP-3), and no product is larger than its input.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipelines.adapters.layers import Adapter, Layer
from pipelines.adapters.linear_changes import LoraLayer
from pipelines.adapters.modules import SlottedModule

BUCKETS = (32, 64, 128)
"""Ranks that the slots of a model may have; a captured graph is for one of these, so that there are few."""


def settled(layer: LoraLayer, dtype: torch.dtype) -> LoraLayer | None:
    """The same layer in float32, scaled so that no row of another job overflows on A; None if B would overflow.

    Each row of A is divided by a power of two, and the column of B multiplied by it: exact in binary numbers.
    """
    down, up = layer.down.float(), layer.up.float() * layer.scale
    sums = down.flatten(1).double().abs().sum(1)
    exponents = torch.where(sums > 0, torch.floor(-1 - torch.log2(sums)), 0.0)
    factors = torch.exp2(exponents).to(down)
    down = down * factors.view(-1, *[1] * (down.ndim - 1))
    up = up / factors.view(1, -1, *[1] * (up.ndim - 2))
    if not bool(up.abs().max() <= torch.finfo(dtype).max) or not bool(down.isfinite().all()):
        return None
    return LoraLayer(down, up)


def pairs(adapter: Adapter) -> dict[str, LoraLayer]:
    """An adapter's low-rank pairs, by module."""
    return {name: layer for name, own in adapter.layers.items() for layer in own if isinstance(layer, LoraLayer)}


def in_slots(adapter: Adapter) -> bool:
    """Whether all of an adapter goes by the slots of a model, so that none of it needs hooks."""
    own = [layer for layers in adapter.layers.values() for layer in layers]
    return adapter.slot_ranks > 0 and all(isinstance(layer, LoraLayer) for layer in own)


@dataclass
class _Place:
    """The ranks of one adapter."""

    start: int
    ranks: int
    used: int
    """When it was used last, counted in passes."""

    @property
    def end(self) -> int:
        return self.start + self.ranks


@dataclass(frozen=True)
class Placed:
    """The slots that a pass reads."""

    places: Mapping[Adapter, slice]
    modules: frozenset[str]
    """Those that some adapter in use has a layer for."""

    @property
    def span(self) -> slice:
        """The ranks from the first to the last in use."""
        return slice(min(p.start for p in self.places.values()), max(p.stop for p in self.places.values()))


class Slots:
    """The slots of one model. On the model's own thread, between passes."""

    def __init__(self, modules: Mapping[str, SlottedModule], buckets: Sequence[int] = BUCKETS) -> None:
        """Slots for `modules`; without `buckets` there are none, and every adapter goes by hooks."""
        self._modules = modules
        self._buckets = tuple(buckets)
        self.capacity = 0
        """Ranks there is room for now."""
        self._places: weakref.WeakKeyDictionary[Adapter, _Place] = weakref.WeakKeyDictionary()
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._clock = itertools.count()

    @property
    def most(self) -> int:
        """Ranks there may ever be room for."""
        return self._buckets[-1] if self._buckets else 0

    def settled(
        self, layers: Mapping[str, tuple[Layer, ...]], dtype: torch.dtype
    ) -> tuple[dict[str, tuple[Layer, ...]], int]:
        """The layers of an adapter as the slots take them, and the ranks they need; 0 where they must go by hooks."""
        found: dict[str, tuple[Layer, ...]] = {}
        ranks = 0
        for name, own in layers.items():
            ready = [settled(layer, dtype) if isinstance(layer, LoraLayer) else layer for layer in own]
            whole = tuple(layer for layer in ready if layer is not None)
            pairs = [layer for layer in whole if isinstance(layer, LoraLayer)]
            if len(whole) < len(own) or len(pairs) > 1 or any(layer.from_base for layer in whole):
                return dict(layers), 0
            found[name] = whole
            ranks = max([ranks, *(len(pair.down) for pair in pairs)])
        return (found, ranks) if ranks <= self.most else (dict(layers), 0)

    def fits(self, adapter: Adapter) -> bool:
        """Whether an adapter fits into the slots at all."""
        return 0 < adapter.slot_ranks <= self.most

    def place(self, adapters: Sequence[Adapter]) -> Placed:
        """Give each of these its ranks; those that find no room are not among the places."""
        now = next(self._clock)
        for adapter in adapters:
            if adapter in self._places:
                self._places[adapter].used = now
        for adapter in adapters:
            if adapter not in self._places and self.fits(adapter):
                start = self._room(adapter.slot_ranks, now)
                if start is not None:
                    self._write(adapter, start)
                    self._places[adapter] = _Place(start, adapter.slot_ranks, now)
        found = {a: slice(p.start, p.end) for a in adapters if (p := self._places.get(a)) is not None}
        return Placed(found, frozenset(name for adapter in found for name in pairs(adapter)))

    def factors(self, name: str, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[ranks, in]` (or `[ranks, in, k, k]`) and B `[ranks, out]` of one module."""
        down, up = self._factors[name]
        return down[span], up[span]

    def bucket(self, end: int) -> int:
        """The smallest of the buckets that holds the ranks below `end`."""
        return next(bucket for bucket in self._buckets if end <= bucket)

    def _room(self, ranks: int, now: int) -> int | None:
        """Where so many ranks are free, made free by growth or at the cost of adapters that are not in use."""
        while (start := self._gap(ranks)) is None:
            idle = [(place.used, adapter) for adapter, place in self._places.items() if place.used < now]
            if self.capacity < self.most:
                self._grow()
            elif idle:
                del self._places[min(idle, key=lambda entry: entry[0])[1]]
            else:
                return None
        return start

    def _gap(self, ranks: int) -> int | None:
        """The lowest run of free ranks, None if there is none as long."""
        start = 0
        for place in sorted(self._places.values(), key=lambda place: place.start):
            if place.start - start >= ranks:
                return start
            start = place.end
        return start if self.capacity - start >= ranks else None

    def _grow(self) -> None:
        """Room for the next bucket: new tensors, so what was captured over the old ones is void."""
        capacity = next(bucket for bucket in self._buckets if bucket > self.capacity)
        grown = {name: self._empty(name, capacity) for name in self._factors}
        for name, new in grown.items():
            for ours, theirs in zip(new, self._factors[name], strict=True):
                ours[: len(theirs)].copy_(theirs)
        self._factors, self.capacity = grown, capacity

    def _empty(self, name: str, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._modules[name].weight
        out, *inner = weight.shape
        device = torch.device("cpu") if weight.is_meta else weight.device
        down = torch.zeros((capacity, *inner), dtype=weight.dtype, device=device)
        return down, torch.zeros((capacity, out), dtype=weight.dtype, device=device)

    def _write(self, adapter: Adapter, start: int) -> None:
        """An adapter's layers into its ranks; what others left there goes, in modules that it does not touch too."""
        own = pairs(adapter)
        for name in own:
            if name not in self._factors:
                self._factors[name] = self._empty(name, self.capacity)
        for name, (down, up) in self._factors.items():
            layer = own.get(name)
            ranks = 0 if layer is None else len(layer.down)
            if layer is not None:
                down[start : start + ranks].copy_(layer.down)
                up[start : start + ranks].copy_(layer.up.flatten(1).T)
            up[start + ranks : start + adapter.slot_ranks].zero_()
