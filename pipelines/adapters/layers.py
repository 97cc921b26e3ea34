"""An adapter: for each module of one model, the change of that module's output.

An adapter is never merged into weights. Each row of a batch carries its own mixture, so that users of different
adapters share a tick, nothing has to be reloaded, and nothing drifts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import nn

MoveTensor = Callable[[torch.Tensor, bool], torch.Tensor]
"""A tensor, and whether it must stay in float32 -> the tensor that takes its place."""


@dataclass(frozen=True)
class Layer:
    """An adapter's part for one module; its fields are tensors, numbers and other layers."""

    from_base: ClassVar[bool] = False
    """Whether it changes what was there before, so that it matters in which order a row's adapters come."""
    precise: ClassVar[tuple[str, ...]] = ()
    """Fields that stay in float32."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Change `output` in place.

        Args:
            module: the module, with its own weights.
            rows: what it got, `[rows, ..., in]`, or `[rows, in, height, width]` for a convolution.
            base: what it made of them by itself; the same tensor as `output` where nothing else changes that.
            output: what it made of them, with what other adapters have added.
            weight: of the mixture.
        """
        raise NotImplementedError

    def change(self, module: nn.Module) -> torch.Tensor:
        """The change of the module's weight, at weight 1 and in its shape."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Every tensor, and whether it must stay in float32."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield value, field.name in self.precise
            elif isinstance(value, Layer):
                yield from value.tensors()

    def moved(self, there: Iterator[torch.Tensor]) -> Self:
        """The same layer with other tensors, one for each of `tensors()`."""
        changes: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                changes[field.name] = next(there)
            elif isinstance(value, Layer):
                changes[field.name] = value.moved(there)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter on one model: module name -> layers. Known by identity, so that what is loaded twice is two."""

    name: str
    """Public name and file, for messages."""
    layers: Mapping[str, tuple[Layer, ...]]
    slot_ranks: int = 0
    """Ranks that its low-rank pairs take in the slots of a model; 0 for an adapter that goes by hooks altogether."""

    @property
    def from_base(self) -> bool:
        """Whether it matters in which order it comes among a row's adapters."""
        return any(layer.from_base for own in self.layers.values() for layer in own)

    @property
    def nbytes(self) -> int:
        """Bytes its tensors hold."""
        return sum(tensor.nbytes for own in self.layers.values() for layer in own for tensor, _ in layer.tensors())


Mixture = tuple[tuple[Adapter, float], ...]
"""The adapters of one row with their weights."""


def along_channels(values: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`[channels]`, in the dimensions in which a module's input or output can be multiplied by it."""
    return values.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else values


def applied(module: nn.Module, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a module would make of `rows` with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(rows, weight, stride=module.stride, padding=module.padding)
    return nn.functional.linear(rows, weight)


def without_bias(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """A linear layer's or a convolution's output before its bias was added."""
    bias = module.bias
    return output - along_channels(bias, module) if isinstance(bias, torch.Tensor) else output


def add_product(output: torch.Tensor, hidden: torch.Tensor, up: torch.Tensor, weight: float) -> None:
    """`output += weight * (up applied to hidden)`, for linear layers; up is `[out, ranks]`."""
    output.view(-1, len(up)).addmm_(hidden.reshape(-1, up.shape[1]), up.T, alpha=weight)
