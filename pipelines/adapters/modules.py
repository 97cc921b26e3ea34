"""Layers that add, row by row, what adapters give them.

The modules of a model change their class in place and for good (ADP-1), as `torch.nn.utils.parametrize` does it: names,
weights and hooks stay. It happens before anything is compiled or captured, for `torch.compile` takes no notice of hooks
that come later (`tests/upstream/test_torch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pipelines.adapters.layers import Layer

Hook = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]
"""Given a module, its input and its output, `[rows, ...]` each, changes the output in place."""


@dataclass(frozen=True)
class RowsHook:
    """Changes the rows of one mixture."""

    rows: slice | torch.Tensor
    """Which rows; int64 indices where they do not stand together."""
    uses: tuple[tuple[Layer, float], ...]
    """What the mixture has for the module, with its weights."""

    def __call__(self, module: nn.Module, rows: torch.Tensor, output: torch.Tensor) -> None:
        """Change the output in place."""
        own = output[self.rows]
        base = own.clone() if len(self.uses) > 1 and any(layer.from_base for layer, _ in self.uses) else own
        for layer, weight in self.uses:
            layer.add(module, rows[self.rows], base, own, weight)
        if isinstance(self.rows, torch.Tensor):
            output.index_copy_(0, self.rows, own)


@dataclass
class Pass:
    """State of the current pass that the adapted modules of one model share."""

    weights: torch.Tensor | None = None
    """`[rows, ranks]`: each row's weight for each rank of the slots in use; None where no slot is."""
    hooks: dict[str, list[Hook]] = field(default_factory=dict)
    """Module name -> what else changes its output, for adapters that are not in the slots."""


class AdaptedLinear(nn.Linear):
    """`W x + B (w * A x)`, with the low-rank pairs of all adapters side by side and a weight for each row and rank.

    `A` is `[ranks, in]`, `B` `[ranks, out]`, `w` `[rows, 1, ranks]`: a row's weight is 0 for the ranks of others'.
    """

    name: str
    current: Pass
    factors: tuple[torch.Tensor, torch.Tensor] | None
    """A and B of the ranks in use; None where no adapter in use has anything for this module."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The layer's output for `[rows, ..., in]`."""
        output = super().forward(rows)
        if self.current.weights is not None and self.factors is not None:
            _add_products(output, rows, *self.factors, self.current.weights)
        if self.current.hooks:
            output = hooked(self.current.hooks.get(self.name, ()), self, rows, output)
        return output


class AdaptedConv2d(nn.Conv2d):
    """The same with convolutions: `A` is `[ranks, in, k, k]`, `B` `[ranks, out]`."""

    name: str
    current: Pass
    factors: tuple[torch.Tensor, torch.Tensor] | None
    """A and B of the ranks in use; None where no adapter in use has anything for this module."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The layer's output for `[rows, in, height, width]`."""
        output = super().forward(rows)
        if self.current.weights is not None and self.factors is not None:
            _add_convolutions(output, rows, *self.factors, self.current.weights, self)
        if self.current.hooks:
            output = hooked(self.current.hooks.get(self.name, ()), self, rows, output)
        return output


class AdaptedLayerNorm(nn.LayerNorm):
    """A normalisation whose output hooks may change."""

    name: str
    current: Pass

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The layer's output for `[rows, ..., channels]`."""
        output = super().forward(rows)
        if self.current.hooks:
            output = hooked(self.current.hooks.get(self.name, ()), self, rows, output)
        return output


class AdaptedGroupNorm(nn.GroupNorm):
    """A normalisation whose output hooks may change."""

    name: str
    current: Pass

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """The layer's output for `[rows, channels, ...]`."""
        output = super().forward(rows)
        if self.current.hooks:
            output = hooked(self.current.hooks.get(self.name, ()), self, rows, output)
        return output


SlottedModule = AdaptedLinear | AdaptedConv2d
AdaptedModule = AdaptedLinear | AdaptedConv2d | AdaptedLayerNorm | AdaptedGroupNorm
_CLASSES: dict[type[nn.Module], type[AdaptedModule]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv2d: AdaptedConv2d,
    nn.LayerNorm: AdaptedLayerNorm,
    nn.GroupNorm: AdaptedGroupNorm,
}


def adapt(model: nn.Module) -> tuple[dict[str, AdaptedModule], Pass]:
    """Make a model's linear layers, convolutions and normalisations take adapters.

    A model that was adapted before gets a new pass, and takes no adapters from the old one any more.

    Returns:
        The modules by name, and the pass they all look at.
    """
    current = Pass()
    adapted: dict[str, AdaptedModule] = {}
    for name, module in model.named_modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
        if isinstance(module, AdaptedModule):
            module.name, module.current = name, current
            if isinstance(module, SlottedModule):
                module.factors = None
            adapted[name] = module
    return adapted, current


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hooked(hooks: Sequence[Hook], module: nn.Module, rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A module's output after its hooks, which come and go: never part of what is compiled."""
    for hook in hooks:
        hook(module, rows, output)
    return output


def _add_products(
    output: torch.Tensor, rows: torch.Tensor, down: torch.Tensor, up: torch.Tensor, weights: torch.Tensor
) -> None:
    hidden = nn.functional.linear(rows, down)
    hidden *= weights.view(len(weights), *[1] * (hidden.ndim - 2), -1)
    output.view(-1, up.shape[1]).addmm_(hidden.view(-1, len(down)), up)


def _add_convolutions(
    output: torch.Tensor,
    rows: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    weights: torch.Tensor,
    like: nn.Conv2d,
) -> None:
    hidden = nn.functional.conv2d(rows, down, stride=like.stride, padding=like.padding)
    hidden *= weights[:, :, None, None]
    # A product for each row, since the channels of a pixel are not side by side in memory.
    output.flatten(2).baddbmm_(up.T.expand(len(hidden), -1, -1), hidden.flatten(2))
