"""Adapters that add a matrix, in any factored form, to a weight, or numbers to a bias or a norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipelines.adapters.layers import Layer, add_product, along_channels, applied


@dataclass(frozen=True)
class LoraLayer(Layer):
    """A low-rank pair: W x + weight * scale * B A x, Hu et al. 2021 (arXiv:2106.09685) equation 3."""

    down: torch.Tensor
    """A: `[rank, in]`, or `[rank, in, k, k]` for a convolution."""
    up: torch.Tensor
    """B: `[out, rank]`, or `[out, rank, 1, 1]`."""
    scale: float = 1.0
    """Alpha / rank."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Two products; see `Layer.add`."""
        hidden = applied(module, rows, self.down)
        if isinstance(module, nn.Conv2d):
            up = self.up.flatten(1).expand(len(rows), -1, -1)
            output.flatten(2).baddbmm_(up, hidden.flatten(2), alpha=weight * self.scale)
        else:
            add_product(output, hidden, self.up, weight * self.scale)

    def change(self, module: nn.Module) -> torch.Tensor:
        """B A."""
        return torch.einsum("or,r...->o...", self.up.flatten(1), self.down) * self.scale


@dataclass(frozen=True)
class _Product(Layer):
    """A change that is multiplied by the rows as a whole."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """One product with the whole change; see `Layer.add`."""
        change = self.change(module)
        if isinstance(module, nn.Conv2d):
            output.add_(applied(module, rows, change), alpha=weight)
        else:
            add_product(output, rows, change, weight)


@dataclass(frozen=True)
class WeightLayer(_Product):
    """The change itself, as trainers of whole weights save it."""

    values: torch.Tensor
    """In the shape of the module's weight."""

    def change(self, module: nn.Module) -> torch.Tensor:
        """The change as it is."""
        return self.values


@dataclass(frozen=True)
class HadamardLayer(_Product):
    """LoHa: the product, element by element, of two low-rank matrices (FedPara, arXiv:2108.06098).

    Multiplied out in each pass: kept, SDXL's would take as much memory as its UNet.
    """

    first: LoraLayer
    second: LoraLayer

    def change(self, module: nn.Module) -> torch.Tensor:
        """(B1 A1) * (B2 A2)."""
        return self.first.change(module) * self.second.change(module)


@dataclass(frozen=True)
class KroneckerLayer(Layer):
    """LoKr: the Kronecker product of two matrices, never multiplied out: both are applied, one after the other."""

    left: torch.Tensor
    """`[a, c]`, with the scale."""
    right: torch.Tensor
    """`[b, d]`, or `[b, d, k, k]` for a convolution; out is a * b, in is c * d."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """The right factor on each group of inputs, then the left one across groups; see `Layer.add`."""
        groups = self.left.shape[1]
        if isinstance(module, nn.Conv2d):
            hidden = applied(module, rows.unflatten(1, (groups, -1)).flatten(0, 1), self.right)
            mixed = self.left @ hidden.reshape(len(rows), groups, -1)
        else:
            mixed = self.left @ nn.functional.linear(rows.unflatten(-1, (groups, -1)), self.right)
        output.add_(mixed.reshape(output.shape), alpha=weight)

    def change(self, module: nn.Module) -> torch.Tensor:
        """The product, multiplied out."""
        return torch.kron(self.left.view(*self.left.shape, *[1] * (self.right.ndim - 2)), self.right)


@dataclass(frozen=True)
class BiasLayer(Layer):
    """A change of a bias."""

    values: torch.Tensor
    """`[out]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Add it; see `Layer.add`."""
        output.add_(along_channels(self.values, module), alpha=weight)


@dataclass(frozen=True)
class NormLayer(Layer):
    """A change of the scale and shift after a normalisation."""

    scale: torch.Tensor
    """`[channels]`."""
    shift: torch.Tensor
    """`[channels]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Normalise once more, with the change alone; see `Layer.add`."""
        if isinstance(module, nn.GroupNorm):
            changed = nn.functional.group_norm(rows, module.num_groups, self.scale, self.shift, module.eps)
        else:
            assert isinstance(module, nn.LayerNorm)
            changed = nn.functional.layer_norm(rows, module.normalized_shape, self.scale, self.shift, module.eps)
        output.add_(changed, alpha=weight)
