"""Adapters on one model, row by row: in slots where they fit, by hooks where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pipelines.adapters.building import MisfitError, build
from pipelines.adapters.layers import Adapter, Layer, Mixture
from pipelines.adapters.linear_changes import LoraLayer
from pipelines.adapters.module_names import ModuleNames
from pipelines.adapters.modules import AdaptedModule, Hook, RowsHook, SlottedModule, adapt
from pipelines.adapters.reading import AdapterFile, refuse
from pipelines.adapters.slots import BUCKETS, Placed, Slots
from pipelines.adapters.transfer import moved
from pipelines.errors import InvalidValueError
from pipelines.transfers import pinned, send

_PLAIN = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)


class SlotKey(NamedTuple):
    """What a pass over the slots depends on beside the numbers in them: part of the key of a captured graph."""

    ranks: int
    """Ranks of the products, one of the buckets; 0 for a pass without adapters."""
    layout: int
    """Which tensors it reads, in which modules; a number that is never given twice."""


@dataclass(frozen=True)
class _Prepared:
    """What a pass needs, made of the rows' mixtures."""

    rows: tuple[Mixture, ...]
    padded: int | None
    weights: torch.Tensor | None
    hooks: dict[str, list[Hook]]
    key: SlotKey | None


_NOTHING = _Prepared((), None, None, {}, SlotKey(0, 0))


class RowAdapters:
    """The adapters of one model. Made before the model is compiled or captured: it changes the class of its modules."""

    def __init__(self, model: nn.Module, buckets: Sequence[int] = BUCKETS) -> None:
        """Let `model` take adapters.

        Args:
            model: its rows are the first dimension of what every module gets.
            buckets: ranks that its slots may have. Without any, all adapters go by hooks, and the last bits of a row do
                not depend on which other adapters have been in use.
        """
        self._modules, self._pass = adapt(model)
        self.modules: Mapping[str, AdaptedModule] = self._modules
        """Those that take adapters, by name."""
        self._names = ModuleNames(self._modules)
        self._others = ModuleNames(name for name, _ in model.named_modules() if name not in self._modules)
        self._slotted = {name: module for name, module in self._modules.items() if isinstance(module, SlottedModule)}
        self._slots = Slots(self._slotted, buckets)
        weight = next(iter(self._slotted.values())).weight
        # A model without weights has its adapters where what computes in its place has its rows.
        self._device = torch.device("cpu") if weight.is_meta else weight.device
        self._dtype = weight.dtype
        self._weights = torch.zeros(0, self._slots.most, dtype=self._dtype, device=self._device)
        self._layouts: dict[tuple[frozenset[str], int, int], int] = {}
        self._read: tuple[slice, frozenset[str], int] | None = None
        self._prepared = _NOTHING

    def fit(self, file: AdapterFile, device: torch.device, dtype: torch.dtype) -> Adapter:
        """What a file has for this model, on its device. On any thread.

        Raises:
            InvalidValueError: a layer fits no module of this model; the message names the first.
        """
        layers: dict[str, tuple[Layer, ...]] = {}
        for name, parameters in file.layers.items():
            found = self._names.find(name)
            if found is None:
                known = self._others.find(name) is not None
                raise _misfit(file, name, "no module that takes a LoRA" if known else "no module")
            if found in layers:
                raise refuse(file.name, f"has two layers for the module {found}; the second is {name}")
            module = self._modules[found]
            try:
                layers[found] = build(parameters, module, name, file.config)
            except MisfitError as error:
                kind = next(c.__name__ for c in _PLAIN if isinstance(module, c))
                raise _misfit(file, name, f"{kind} {list(module.weight.shape)}, which takes {error}") from error
        layers, ranks = self._slots.settled(layers, dtype)
        tensors = [tensor for own in layers.values() for layer in own for tensor in layer.tensors()]
        there = iter(moved([(t, torch.float32 if precise else dtype) for t, precise in tensors], device))
        return Adapter(
            file.name, {name: tuple(layer.moved(there) for layer in own) for name, own in layers.items()}, ranks
        )

    @contextmanager
    def active(self, rows: Sequence[Mixture], padded: int | None = None) -> Iterator[SlotKey | None]:
        """Within the block, row i of every batch is changed by `rows[i]`. Must run on the model's own thread.

        Args:
            rows: the mixtures of a batch's rows.
            padded: rows of a batch that is filled up and evaluated by a captured graph: the products get the ranks of a
                bucket, and the weights stand where the graph reads them. None for an eager pass over the ranks in use.

        Yields:
            The key of a captured graph; None where hooks are active, so that the pass must be eager.
        """
        prepared = self._prepared
        if prepared.padded != padded or prepared.rows != tuple(rows):
            self._prepared = _NOTHING  # what is about to change may be what the last pass was prepared with
            prepared = self._prepared = self._prepare(tuple(rows), padded)
        self._pass.weights, self._pass.hooks = prepared.weights, prepared.hooks
        try:
            yield prepared.key
        finally:
            self._pass.weights, self._pass.hooks = None, {}

    @torch.inference_mode()
    def _prepare(self, rows: tuple[Mixture, ...], padded: int | None) -> _Prepared:
        adapters = list(dict.fromkeys(adapter for mixture in rows for adapter, _ in mixture))
        if not adapters:
            return _Prepared(rows, padded, None, {}, SlotKey(0, 0))
        # What comes in an order comes by hooks alone, together with whatever else its row has.
        ordered = {row for row, mixture in enumerate(rows) if any(adapter.from_base for adapter, _ in mixture)}
        free = [mixture for row, mixture in enumerate(rows) if row not in ordered]
        unordered = list(dict.fromkeys(adapter for mixture in free for adapter, _ in mixture))
        placed = self._slots.place([adapter for adapter in unordered if self._slots.fits(adapter)])
        hooks = self._hooks(rows, ordered, placed)
        if not placed.places:
            return _Prepared(rows, padded, None, hooks, None if hooks else SlotKey(0, 0))
        slotted = [() if row in ordered else mixture for row, mixture in enumerate(rows)]
        weights, key = self._weighted(slotted, placed, padded)
        return _Prepared(rows, padded, weights, hooks, None if hooks else key)

    def _weighted(self, rows: Sequence[Mixture], placed: Placed, padded: int | None) -> tuple[torch.Tensor, SlotKey]:
        """Each row's weights for the ranks in use, by one copy to where they always stand."""
        count = len(rows) if padded is None else padded
        span = placed.span if padded is None else slice(0, self._slots.bucket(placed.span.stop))
        values = torch.zeros(count, self._slots.most, dtype=self._dtype)
        for row, mixture in enumerate(rows):
            for adapter, weight in mixture:
                if adapter in placed.places:
                    values[row, placed.places[adapter]] += weight
        if len(self._weights) < count:  # what was captured over the old one is void
            self._weights = torch.zeros(2 * count, self._slots.most, dtype=self._dtype, device=self._device)
        self._weights[:count].copy_(pinned(values, self._device), non_blocking=True)
        self._point(span, placed.modules)
        layout = (placed.modules, self._slots.capacity, len(self._weights))
        number = self._layouts.setdefault(layout, len(self._layouts) + 1)
        return self._weights[:count, span], SlotKey(span.stop - span.start, number)

    def _point(self, span: slice, modules: frozenset[str]) -> None:
        """Let the modules read these ranks, and no other module any."""
        reading = (span, modules, self._slots.capacity)
        if reading == self._read:
            return
        for name in self._read[1] - modules if self._read else ():
            self._slotted[name].factors = None
        for name in modules:
            self._slotted[name].factors = self._slots.factors(name, span)
        self._read = reading

    def _hooks(self, rows: Sequence[Mixture], ordered: set[int], placed: Placed) -> dict[str, list[Hook]]:
        """Hooks of what is not in the slots, by module; rows of one mixture share theirs."""
        groups: dict[Mixture, list[int]] = {}
        for row, mixture in enumerate(rows):
            if mixture:
                groups.setdefault(mixture, []).append(row)
        found: dict[str, list[Hook]] = {}
        for mixture, own in groups.items():
            # The rows of one mixture are either all ordered or none.
            held = frozenset() if own[0] in ordered else frozenset(placed.places)
            uses: dict[str, list[tuple[Layer, float]]] = {}
            for adapter, weight in mixture:
                for name, layers in adapter.layers.items():
                    if name not in self._modules:
                        raise ValueError(f"{adapter.name} was not fitted to this model: it has no module {name}")
                    left = [layer for layer in layers if adapter not in held or not isinstance(layer, LoraLayer)]
                    uses.setdefault(name, []).extend((layer, weight) for layer in left)
            index = self._index(own)
            for name, use in uses.items():
                if use:
                    found.setdefault(name, []).append(RowsHook(index, tuple(use)))
        return found

    def _index(self, rows: Sequence[int]) -> slice | torch.Tensor:
        """Rows as a slice where they stand together, as those of a job do."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return send(pinned(torch.tensor(rows), self._device), self._device)


def _misfit(file: AdapterFile, name: str, met: str) -> InvalidValueError:
    shapes = " x ".join(f"{key} {list(tensor.shape)}" for key, tensor in file.layers[name].items() if key != "alpha")
    return refuse(file.name, f"does not fit this model: its layer {name}, {shapes}, meets {met}")
