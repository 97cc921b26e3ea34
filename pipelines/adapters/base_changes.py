"""Adapters that change the output of the module itself: magnitudes, rotations and scales.

They come in the order of a row's mixture, as in PEFT: DoRA scales what the adapters before it have made, too. Rotations
and scales of outputs are of the module's own output, as in LyCORIS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pipelines.adapters.layers import Layer, along_channels, applied, without_bias


@dataclass(frozen=True)
class DecomposedLayer(Layer):
    """DoRA: the changed weight, brought to trained magnitudes (Liu et al. 2024, arXiv:2402.09353, equation 5).

    At weight w, as in PEFT: m (W + w dW) / |W + w dW|. The norms at any w follow from three numbers a channel, so that
    nothing has to be multiplied out again.
    """

    from_base: ClassVar[bool] = True
    precise: ClassVar[tuple[str, ...]] = ("magnitude", "base_norm", "mixed_norm", "change_norm")

    changed: Layer
    """dW: a low-rank pair, LoHa or LoKr."""
    magnitude: torch.Tensor
    """m: `[out]`, or `[in]`."""
    base_norm: torch.Tensor
    """|W|^2 of each channel."""
    mixed_norm: torch.Tensor
    """W . dW of each channel."""
    change_norm: torch.Tensor
    """|dW|^2 of each channel."""
    of_inputs: bool = False
    """Whether the channels are the module's inputs, as early LyCORIS had it."""

    @classmethod
    def of(cls, changed: Layer, module: nn.Module, magnitude: torch.Tensor, of_inputs: bool) -> DecomposedLayer:
        """The layer on one module."""
        base = module.get_parameter("weight").detach().cpu().double()
        change = changed.change(module).double()
        if of_inputs:
            base, change = base.transpose(0, 1), change.transpose(0, 1)
        base, change = base.flatten(1), change.flatten(1)
        base_norm, mixed_norm, change_norm = base.square().sum(1), (base * change).sum(1), change.square().sum(1)
        return cls(changed, magnitude.flatten(), base_norm.float(), mixed_norm.float(), change_norm.float(), of_inputs)

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Scale what is there, and what the change adds; see `Layer.add`."""
        squares = self.base_norm + 2 * weight * self.mixed_norm + weight * weight * self.change_norm
        gain = along_channels((self.magnitude * squares.rsqrt()).to(output.dtype), module)
        if self.of_inputs:
            output.add_(applied(module, rows * (gain - 1), module.get_parameter("weight")))
            self.changed.add(module, rows * gain, base, output, weight)
            return
        bias = module.bias
        if isinstance(bias, torch.Tensor):
            output.sub_(along_channels(bias, module))
        self.changed.add(module, rows, base, output, weight)
        output.mul_(gain)
        if isinstance(bias, torch.Tensor):
            output.add_(along_channels(bias, module))


@dataclass(frozen=True)
class RotationLayer(Layer):
    """LyCORIS' diagonal OFT: R W, with R of orthogonal blocks (Qiu et al. 2023, arXiv:2306.07280)."""

    from_base: ClassVar[bool] = True

    turns: torch.Tensor
    """R - I of each block, `[blocks, size, size]`: outputs of a block from its outputs."""
    rescale: torch.Tensor | None
    """`[out]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Turn the module's own output; see `Layer.add`."""
        own = without_bias(module, base)
        blocks = len(self.turns)
        if isinstance(module, nn.Conv2d):
            turned = torch.einsum("kmn,bkn...->bkm...", self.turns, own.unflatten(1, (blocks, -1))).flatten(1, 2)
        else:
            turned = torch.einsum("kmn,...kn->...km", self.turns, own.unflatten(-1, (blocks, -1))).flatten(-2)
        if self.rescale is None:
            output.add_(turned, alpha=weight)
        else:
            output.add_(along_channels(self.rescale, module) * (turned * weight + own) - own)


@dataclass(frozen=True)
class ButterflyLayer(Layer):
    """LyCORIS' BOFT: rotations of blocks, shuffled from stage to stage (Liu et al. 2023, arXiv:2311.06243)."""

    from_base: ClassVar[bool] = True

    turns: torch.Tensor
    """R - I of each block of each stage, `[stages, blocks, size, size]`."""
    rescale: torch.Tensor | None
    """`[out]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Turn the module's own output, each stage by the weight's share; see `Layer.add`."""
        own = without_bias(module, base)
        channels_last = own.movedim(1, -1) if isinstance(module, nn.Conv2d) else own
        half = self.turns.shape[-1] // 2
        turned = channels_last
        for stage, turns in enumerate(self.turns):
            shuffled = turned.unflatten(-1, (-1, 2, 2**stage * half)).transpose(-2, -1).flatten(-3)
            blocks = shuffled.unflatten(-1, (-1, 2 * half))
            blocks = blocks + weight * torch.einsum("kmn,...kn->...km", turns, blocks)
            turned = blocks.flatten(-2).unflatten(-1, (-1, 2**stage * half, 2)).transpose(-2, -1).flatten(-3)
        if self.rescale is not None:
            turned = turned * self.rescale
        changed = turned - channels_last
        output.add_(changed.movedim(-1, 1) if isinstance(module, nn.Conv2d) else changed)


@dataclass(frozen=True)
class OutputScaleLayer(Layer):
    """LyCORIS' IA3 on outputs: (1 + weight * s) W (Liu et al. 2022, arXiv:2205.05638)."""

    from_base: ClassVar[bool] = True

    scale: torch.Tensor
    """`[out]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """Add a share of the module's own output; see `Layer.add`."""
        output.add_(without_bias(module, base) * along_channels(self.scale, module), alpha=weight)


@dataclass(frozen=True)
class InputScaleLayer(Layer):
    """LyCORIS' IA3 on inputs: W (1 + weight * s)."""

    scale: torch.Tensor
    """`[in]`."""

    def add(
        self, module: nn.Module, rows: torch.Tensor, base: torch.Tensor, output: torch.Tensor, weight: float
    ) -> None:
        """One more product with the module's weight; see `Layer.add`."""
        scaled = rows * along_channels(self.scale, module)
        output.add_(applied(module, scaled, module.get_parameter("weight")), alpha=weight)
