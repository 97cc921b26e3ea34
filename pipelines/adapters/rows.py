"""Adapters on one model, row by row: in slots where they fit, by hooks where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from pipelines.adapters.fitting import fit_down, fit_up
from pipelines.adapters.layers import Adapter, LoraLayer, Mixture
from pipelines.adapters.modules import Hook, adapt
from pipelines.adapters.slots import BUCKETS, Placed, Slots, settled
from pipelines.adapters.transfer import moved
from pipelines.errors import InvalidValueError


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
        self._others = {name for name, _ in model.named_modules()} - set(self._modules)
        self._slots = Slots(self._modules, buckets)
        weight = next(iter(self._modules.values())).weight
        self._device, self._dtype = weight.device, weight.dtype
        self._weights = torch.zeros(0, self._slots.most, dtype=self._dtype, device=self._device)
        self._layouts: dict[tuple[frozenset[str], int, int], int] = {}
        self._read: tuple[slice, frozenset[str], int] | None = None
        self._prepared = _NOTHING

    def fit(self, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The adapter with this model's module names, on its device. On any thread.

        Raises:
            InvalidValueError: a layer fits no module of this model; the message names the first.
        """
        layers = dict(self._fitted(adapter, name) for name in adapter.layers)
        ranks = 0
        if self._slots.most and all(len(layer.down) <= self._slots.most for layer in layers.values()):
            slotted = {name: settled(layer, dtype) for name, layer in layers.items()}
            whole = {name: layer for name, layer in slotted.items() if layer is not None}
            if len(whole) == len(layers):
                layers, ranks = whole, max(len(layer.down) for layer in layers.values())
        there = iter(moved([t for layer in layers.values() for t in layer.tensors], device, dtype))
        return Adapter(
            adapter.name,
            {name: LoraLayer(next(there), next(there), layer.scale) for name, layer in layers.items()},
            ranks,
        )

    @contextmanager
    def active(self, rows: Sequence[Mixture], padded: int | None = None) -> Iterator[SlotKey | None]:
        """Within the block, row i of every batch gets `rows[i]`. On the model's own thread.

        Args:
            rows: the mixtures of a batch's rows.
            padded: rows of a batch that is filled up and evaluated by a captured graph: the products get the ranks of a
                bucket, and the weights stand where the graph reads them. None for an eager pass over the ranks in use.

        Yields:
            What a captured graph depends on; None where hooks are at work, so that the pass must be eager.
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

    def _fitted(self, adapter: Adapter, name: str) -> tuple[str, LoraLayer]:
        """The module and the layer in its shapes."""
        layer = adapter.layers[name]
        # CLIPTextModel lost its `text_model.` level in transformers 5, CLIPTextModelWithProjection kept it.
        names = (name, name.removeprefix("text_model."), f"text_model.{name}")
        found = next((n for n in names if n in self._modules), None)
        if found is None:
            known = any(n in self._others for n in names)
            raise _misfit(adapter, name, layer, "no module that takes a LoRA" if known else "no module")
        module = self._modules[found]
        down = fit_down(layer.down, module)
        up = fit_up(layer.up, layer.down.shape[0], module)
        if down is None or up is None:
            out, *inner = module.weight.shape
            wanted = f"up [{out}, rank] and down {['rank', *inner]}".replace("'", "")
            kind = "Linear" if isinstance(module, nn.Linear) else "Conv2d"
            raise _misfit(adapter, name, layer, f"{kind} {[out, *inner]}, which takes {wanted}")
        return found, LoraLayer(down, up, layer.scale)

    @torch.inference_mode()
    def _prepare(self, rows: tuple[Mixture, ...], padded: int | None) -> _Prepared:
        adapters = list(dict.fromkeys(adapter for mixture in rows for adapter, _ in mixture))
        if not adapters:
            return _Prepared(rows, padded, None, {}, SlotKey(0, 0))
        placed = self._slots.place([adapter for adapter in adapters if self._slots.fits(adapter)])
        hooks = self._hooks(rows, [adapter for adapter in adapters if adapter not in placed.places])
        weights, key = self._weighted(rows, placed, padded) if placed.places else (None, SlotKey(0, 0))
        return _Prepared(rows, padded, weights, hooks, None if hooks else key)

    def _weighted(self, rows: Sequence[Mixture], placed: Placed, padded: int | None) -> tuple[torch.Tensor, SlotKey]:
        """Each row's weights for the ranks in use, by one copy to where they always stand."""
        count = len(rows) if padded is None else padded
        span = placed.span if padded is None else slice(0, self._slots.bucket(placed.span.stop))
        values = torch.zeros(count, self._slots.most, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        for row, mixture in enumerate(rows):
            for adapter, weight in mixture:
                if adapter in placed.places:
                    values[row, placed.places[adapter]] += weight
        if len(self._weights) < count:  # what was captured over the old one is void
            self._weights = torch.zeros(2 * count, self._slots.most, dtype=self._dtype, device=self._device)
        self._weights[:count].copy_(values, non_blocking=True)
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
            self._modules[name].factors = None
        for name in modules:
            self._modules[name].factors = self._slots.factors(name, span)
        self._read = reading

    def _hooks(self, rows: Sequence[Mixture], adapters: Sequence[Adapter]) -> dict[str, list[Hook]]:
        """Hooks of the adapters that are not in the slots, by module."""
        uses = {
            adapter: [(i, w) for i, mixture in enumerate(rows) for a, w in mixture if a is adapter]
            for adapter in adapters
        }
        found: dict[str, list[Hook]] = {}
        for adapter, own in uses.items():
            index = torch.tensor([row for row, _ in own], device=self._device)
            weights = torch.tensor([weight for _, weight in own], dtype=self._dtype, device=self._device)
            for name, layer in adapter.layers.items():
                assert name in self._modules, f"{adapter.name} was not fitted to this model"
                found.setdefault(name, []).append(_hook(layer, index, weights))
        return found


def _hook(layer: LoraLayer, index: torch.Tensor, weights: torch.Tensor) -> Hook:
    def add(module: nn.Module, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        addition = layer.addition(module, rows[index])
        return output.index_add_(0, index, addition * weights.view(-1, *[1] * (addition.ndim - 1)))

    return add


def _misfit(adapter: Adapter, name: str, layer: LoraLayer, met: str) -> InvalidValueError:
    shapes = f"up {list(layer.up.shape)} x down {list(layer.down.shape)}"
    return InvalidValueError(
        f"loras: {adapter.name} does not fit this model: its layer {name}, {shapes}, meets {met}", "loras"
    )
