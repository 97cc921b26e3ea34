"""`Pixel_Art`: a LoRA of rank 4 on composites made of squares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm

from training.pool import Pool, numbered

SQUARE = 32
"""Pixels of a 512 px picture that become one: a latent's cell, or the autoencoder would smooth them away."""
RANK = 4
LAYERS = r".*(attn1\.to_out\.0|attn2\.to_out\.0|ff\.net\.2|conv2)"
"""Modules that the LoRA adapts: none that reads the text, so that one start fits the SD and the SDXL shape."""


def squares(pictures: Tensor, side: int) -> Tensor:
    """Pictures [n, 3, h, w] as squares of `side` px."""
    return functional.interpolate(functional.avg_pool2d(pictures, side), scale_factor=side, mode="nearest")


@torch.no_grad()
def pixelated(vae: AutoencoderKL, sprites: Tensor, pool: Pool, path: Path) -> Pool:
    """The pictures of `pool`, of 512 px, as squares in latents; cached in `path`."""
    if not path.exists():
        device = next(vae.parameters()).device
        latents = []
        for start in tqdm(range(0, len(pool.latents), 8), "squares", mininterval=5):
            few = enumerate(pool.subjects[start : start + 8], start)
            pictures = torch.stack([numbered(sprites, subject, number, 512) for number, subject in few])
            pictures = squares(pictures, SQUARE).to(device, memory_format=torch.channels_last)
            latents.append(vae.encode(pictures).latent_dist.mean.half().cpu())
        torch.save(torch.cat(latents), path)
    return replace(pool, latents=torch.load(path))


def adapt(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Freeze `unet` and put an untrained LoRA on it."""
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    return unet


def start_from(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> None:
    """Give `unet`'s LoRA the weights of `other`'s."""
    weights = {name: value for name, value in other.state_dict().items() if "lora" in name}
    unexpected = unet.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"the LoRAs differ: {unexpected[0]}")
