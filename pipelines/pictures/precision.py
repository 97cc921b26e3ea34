"""Whether a VAE can compute in half precision: some overflow in it, and their pictures would be black."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from pipelines.sampling.latents import LatentSpace

LATENTS = 32
"""A side of the probe, in latents: how large activations get does not depend on the picture's size."""
STRENGTHS = (1.0, 3.0)
"""Spread of the probe's latents; those of pictures have about 1, those of strong guidance more."""


@torch.inference_mode()
def overflows(model: AutoencoderKL, space: LatentSpace) -> bool:
    """Decode noise, encode what comes of it, and see whether all of it is finite.

    SDXL's own VAE says of itself that it overflows (`force_upcast`); fine-tunes of it and VAEs without that mark need
    not. A1111 finds out when a picture has turned black and computes it again.

    Args:
        model: in the number format it would compute in.
        space: its latents.
    """
    generator = torch.Generator().manual_seed(0)
    for strength in STRENGTHS:
        noise = torch.randn(1, space.channels, LATENTS, LATENTS, generator=generator) * strength
        latents = space.denormalise(noise.to(model.device, model.dtype))
        pixels = model.decode(latents, return_dict=False)[0]
        again = model.encode(pixels.clamp(-1, 1)).latent_dist.mean
        if not bool(pixels.isfinite().all() & again.isfinite().all()):
            return True
    return False
