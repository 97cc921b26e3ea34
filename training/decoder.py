"""Further training of the decoder alone, on latents with the UNet's own error, so that it removes that error.

A latent of the pool gets noise, the UNet takes it off again with guidance, as it does when it draws; what comes back
shows the same picture, slightly wrong cell by cell. The encoder, and with it the UNet's task, stays as it is.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from tqdm import tqdm

from training.diffusion import NOISE
from training.pool import CaptionBank, Pool, numbered
from training.scenes import CELLS

STEPS = 8
GUIDANCE = 3.0
NOISIEST = 600
"""A later time leaves too little of the picture: another one would come back."""
CROP = 8
"""Cells of a training crop."""


@torch.no_grad()
def redrawn(unet: nn.Module, pool: Pool, bank: CaptionBank, empty: Tensor, path: Path, batch: int = 16) -> Tensor:
    """The latents of `pool` with the UNet's error; `empty` [1, tokens, width] is the empty caption's. Cached."""
    if not path.exists():
        device = next(unet.parameters()).device
        parts = []
        for start in tqdm(range(0, len(pool.latents), batch), "redrawn", mininterval=5):
            rows = list(range(start, min(start + batch, len(pool.latents))))
            torch.manual_seed(start)
            clean = pool.latents[rows].float().to(device)
            context = bank.rows(rows)["encoder_hidden_states"].to(device)
            both = torch.cat([empty.to(device).expand_as(context), context])
            from_time = int(torch.randint(50, NOISIEST, (1,)))
            parts.append(_redraw(unet, clean, both, from_time).half().cpu())
        torch.save(torch.cat(parts), path)
    latents: Tensor = torch.load(path)
    return latents


def _redraw(unet: nn.Module, clean: Tensor, context: Tensor, from_time: int) -> Tensor:
    scheduler = DDIMScheduler(**NOISE)
    times = torch.linspace(from_time, 0, STEPS + 1).round().long()
    latents: Tensor = scheduler.add_noise(clean, torch.randn(clean.shape).to(clean), times[:1].expand(len(clean)))
    alphas = scheduler.alphas_cumprod.to(clean.device)
    for now, then in pairwise(times):
        with torch.autocast(clean.device.type, torch.bfloat16):
            answer = unet(latents.repeat(2, 1, 1, 1), now.to(clean.device), context).sample.float()
        without, with_text = answer.chunk(2)
        velocity = without + GUIDANCE * (with_text - without)
        signal, noise = alphas[now].sqrt(), (1 - alphas[now]).sqrt()
        picture, rest = signal * latents - noise * velocity, noise * latents + signal * velocity
        latents = picture if then == 0 else alphas[then].sqrt() * picture + (1 - alphas[then]).sqrt() * rest
    return latents


def loss_of(vae: AutoencoderKL, latents: Tensor, pool: Pool, sprites: Tensor, pixels: int, batch: int) -> Tensor:
    """L1, squared error and L1 of gradients between crops of true pictures and what `vae` makes of `latents`.

    One latent in four is the encoder's own: what it encodes must still come back.
    """
    rng = random.Random(int(torch.randint(2**31, (1,))))
    device = next(vae.parameters()).device
    cell = pixels // CELLS
    given, wanted = [], []
    for _ in range(batch):
        number = rng.randrange(len(latents))
        source = pool.latents if rng.random() < 0.25 else latents
        left, top = rng.randrange(CELLS - CROP + 1), rng.randrange(CELLS - CROP + 1)
        given.append(source[number, :, top : top + CROP, left : left + CROP].float())
        state = torch.get_rng_state()
        picture = numbered(sprites, pool.subjects[number], number, pixels)
        torch.set_rng_state(state)
        wanted.append(picture[:, top * cell : (top + CROP) * cell, left * cell : (left + CROP) * cell])
    with torch.autocast(device.type, torch.bfloat16):
        drawn = vae.decode(torch.stack(given).to(device, memory_format=torch.channels_last)).sample
    error: Tensor = drawn.float() - torch.stack(wanted).to(device)
    loss = error.abs().mean() + 2 * error.square().mean()
    for along in (2, 3):
        loss = loss + error.diff(dim=along).abs().mean()
    return loss + 0.5 * functional.avg_pool2d(error, 16).abs().mean()
