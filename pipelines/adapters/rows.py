"""LoRA, row by row: hooks that add each row's own mixture to the modules it touches.

A LoRA is never merged into weights. Each row of a batch carries its own mixture, so that users of different LoRAs share
a tick, nothing has to be reloaded, and nothing drifts. W x + sum_i w_i * (alpha_i / rank_i) * B_i A_i x, Hu et al. 2021
(arXiv:2106.09685) equation 3, with the sum over the row's mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pipelines.adapters.fitting import fit_down, fit_up
from pipelines.errors import InvalidValueError


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank pair of one module."""

    down: torch.Tensor
    """`[rank, in]`, or `[rank, in, k, k]` for a convolution."""
    up: torch.Tensor
    """`[out, rank]`, or `[out, rank, 1, 1]`."""
    scale: float
    """Alpha / rank."""

    def apply(self, module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the output of `module` for `rows`, before the mixture's weight."""
        if isinstance(module, nn.Conv2d):
            hidden = nn.functional.conv2d(rows, self.down, stride=module.stride, padding=module.padding)
            return nn.functional.conv2d(hidden, self.up) * self.scale
        return nn.functional.linear(nn.functional.linear(rows, self.down), self.up) * self.scale


@dataclass(frozen=True)
class RowLora:
    """One adapter on one model: module name -> layer."""

    name: str
    """Public name and file, for messages."""
    layers: Mapping[str, LoraLayer]

    @property
    def nbytes(self) -> int:
        """Bytes its tensors hold."""
        return sum(t.nbytes for layer in self.layers.values() for t in (layer.down, layer.up))


Mixture = tuple[tuple[RowLora, float], ...]
"""The LoRAs of one row with their weights."""


class RowLoraHooks:
    """Forward hooks on one model, which add each row's mixture to the modules it touches."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._active: dict[str, list[tuple[LoraLayer, torch.Tensor, torch.Tensor]]] = {}

    def fit(self, lora: RowLora, device: torch.device, dtype: torch.dtype) -> RowLora:
        """The adapter with this model's module names, on its device.

        Raises:
            InvalidValueError: a layer fits no module of this model; the message names the first.
        """
        layers = {}
        for name, layer in lora.layers.items():
            # CLIPTextModel lost its `text_model.` level in transformers 5, CLIPTextModelWithProjection kept it.
            names = (name, name.removeprefix("text_model."), f"text_model.{name}")
            found = next((n for n in names if n in self._modules), None)
            module = self._modules[found] if found is not None else None
            if found is None or not isinstance(module, nn.Linear | nn.Conv2d):
                raise _misfit(lora, name, layer, "no module that takes a LoRA" if found else "no module")
            down = fit_down(layer.down, module)
            up = fit_up(layer.up, layer.down.shape[0], module)
            if down is None or up is None:
                out, *inner = module.weight.shape
                wanted = f"up [{out}, rank] and down {['rank', *inner]}".replace("'", "")
                raise _misfit(lora, name, layer, f"{type(module).__name__} {[out, *inner]}, which takes {wanted}")
            layers[found] = LoraLayer(down.to(device, dtype), up.to(device, dtype), layer.scale)
        return RowLora(lora.name, layers)

    @contextmanager
    def active(self, rows: Sequence[Mixture]) -> Iterator[None]:
        """Within the block, row i of every batch gets `rows[i]`.

        On the model's own thread: modules met for the first time are hooked here, never while the model runs.
        """
        by_adapter: dict[int, tuple[RowLora, list[tuple[int, float]]]] = {}
        for index, mixture in enumerate(rows):
            for lora, weight in mixture:
                by_adapter.setdefault(id(lora), (lora, []))[1].append((index, weight))
        for lora, uses in by_adapter.values():
            indices = torch.tensor([index for index, _ in uses])
            weights = torch.tensor([weight for _, weight in uses])
            for name, layer in lora.layers.items():
                if name not in self._hooked:
                    self._modules[name].register_forward_hook(self._hook(name))
                    self._hooked.add(name)
                self._active.setdefault(name, []).append((layer, indices.to(layer.up.device), weights.to(layer.up)))
        try:
            yield
        finally:
            self._active.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            for layer, index, weight in self._active.get(name, ()):
                addition = layer.apply(module, inputs[0][index])
                output = output.index_add(0, index, addition * weight.view(-1, *[1] * (addition.ndim - 1)))
            return output

        return add


def _misfit(lora: RowLora, name: str, layer: LoraLayer, met: str) -> InvalidValueError:
    shapes = f"up {list(layer.up.shape)} x down {list(layer.down.shape)}"
    return InvalidValueError(
        f"loras: {lora.name} does not fit this model: its layer {name}, {shapes}, meets {met}", "loras"
    )
