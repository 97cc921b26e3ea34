"""Latents, the space they live in, and the noise a job draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from config.upscalers import LATENT_METHODS
from pipelines.diffusers_compat import with_defaults
from pipelines.tensors import TensorBundle


@dataclass(frozen=True)
class LatentSpace:
    """Shape and normalisation of a VAE's latents, read from its `config.json`."""

    channels: int
    """Latent channels."""
    downscale: int
    """Pixels a latent covers, per side."""
    scale: float
    """What encoded latents are multiplied by."""
    mean: tuple[float, ...] | None = None
    """Per channel; None unless the VAE's config gives mean and std."""
    std: tuple[float, ...] | None = None
    """Per channel; None with `mean`."""

    @classmethod
    def from_vae_config(cls, config: Mapping[str, Any], statistics: bool) -> LatentSpace:
        """Read an AutoencoderKL config.

        Args:
            config: the VAE's `config.json`; what it lacks is diffusers' default.
            statistics: whether the family's pipelines apply `latents_mean` and `latents_std` (SDXL does, SD does not).
        """
        from diffusers import AutoencoderKL  # when weights are loaded, not before

        config = with_defaults(AutoencoderKL, config)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        return cls(
            channels=config["latent_channels"],
            downscale=2 ** (len(config["block_out_channels"]) - 1),
            scale=config["scaling_factor"],
            mean=tuple(mean) if statistics and mean and std else None,
            std=tuple(std) if statistics and mean and std else None,
        )

    def shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """`[1, channels, height, width]` of the latents of a picture of so many pixels."""
        return (1, self.channels, height // self.downscale, width // self.downscale)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE's own scale to the UNet's."""
        if self.mean is None or self.std is None:
            return self.scale * latents
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (self.mean, self.std))
        return (latents - mean) * self.scale / std

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """UNet's scale to the VAE's own."""
        if self.mean is None or self.std is None:
            return latents / self.scale
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (self.mean, self.std))
        return latents * std / self.scale + mean


@dataclass(frozen=True)
class Latents(TensorBundle):
    """Latents between two stages, with the state of the job's noise generator.

    One generator serves a picture from the first draw to the last, wherever the stages run, exactly as one
    `torch.Generator` handed to diffusers' pipelines one after the other.
    """

    values: torch.Tensor
    """`[1, channels, height, width]`, in the UNet's scale."""
    generator_state: torch.Tensor | None = None
    """`[bytes]` uint8, None before anything was drawn."""
    mask: torch.Tensor | None = None
    """`[1, 1, height, width]`: 1 where a picture is repainted, 0 where it stays; None where there is no such thing."""
    masked: torch.Tensor | None = None
    """`[1, channels, height, width]`: of the picture, grey where it is repainted, which UNets for inpainting read."""

    def enlarged(self, method: str, shape: Sequence[int]) -> Latents:
        """These, interpolated to `shape` by one of `LATENT_METHODS`, with no noise drawn yet: as A1111's hires fix."""
        mode, antialias = LATENT_METHODS[method]
        size = tuple(shape[-2:])
        values = torch.nn.functional.interpolate(self.values.float(), size, mode=mode, antialias=antialias)
        return Latents(values.to(self.values.dtype))


def make_generator(seed: int, state: torch.Tensor | None = None) -> torch.Generator:
    """The job's own CPU generator: fresh from `seed`, or where an earlier stage left it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    if state is not None:
        generator.set_state(state)
    return generator


def draw_noise(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal noise, drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn(tuple(shape), generator=generator, dtype=dtype)
