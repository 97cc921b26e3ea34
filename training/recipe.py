"""The stages of training, in order; each one's result is a file under build/training that the next ones read."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from training import autoencoder, diffusion, text
from training.data import BUILD, load_sprites, premultiplied
from training.loop import Schedule, train
from training.words import OBJECTS


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stage_autoencoder(scale: float) -> Path:
    """The autoencoder of the SD shapes, downscale 32."""
    sprites = load_sprites()
    everything, known = premultiplied(sprites.pictures), sprites.named(list(OBJECTS.values()))
    vae = autoencoder.build(32, 512).to(device(), memory_format=torch.channels_last)
    average = train(
        "autoencoder",
        vae,
        lambda model: autoencoder.loss_of(model, everything, 128, 8),
        Schedule(steps=round(1600 * scale), learning_rate=5e-4, average=0.995),
        BUILD / "autoencoder.checkpoint",
        lambda model: f"{autoencoder.psnr(model, known, 512, 8):.1f} dB at 512 px",
    )
    return save(average, "autoencoder")


def stage_text(scale: float) -> Path:
    """The tokenizer and the text tower."""
    tokenizer = text.build_tokenizer(load_sprites().names)
    templates = text.style_templates()
    namer = text.Namer(CLIPTextModel(text.config(tokenizer))).to(device())
    average = train(
        "text tower",
        namer,
        lambda model: text.loss_of(model, tokenizer, templates, 32),
        Schedule(steps=round(500 * scale), learning_rate=5e-4, average=0.98),
        BUILD / "text.checkpoint",
    )
    tokenizer.save_pretrained(BUILD / "tokenizer")
    return save(average.tower, "text")


def stage_pool(scale: float) -> Path:
    """Composites of 512 px in latents; the autoencoder's latents are scaled on the way."""
    sprites = load_sprites().named(list(OBJECTS.values()))
    vae = load_vae("autoencoder").to(device(), memory_format=torch.channels_last)
    if not (BUILD / "vae").exists():
        few = diffusion.encode_pool(vae, sprites, 512, 512, BUILD / "pool-512.unscaled")
        diffusion.scale_latents(vae, few.latents.to(device()))
        save(vae, "vae")
    vae = load_vae("vae").to(device(), memory_format=torch.channels_last)
    diffusion.encode_pool(vae, sprites, 512, round(5000 * scale), BUILD / "pool-512")
    return BUILD / "pool-512"


def stage_unet(scale: float) -> Path:
    """The SD UNet on 512 px."""
    sprites = load_sprites().named(list(OBJECTS.values()))
    vae = load_vae("vae")
    pool = diffusion.encode_pool(vae, sprites, 512, round(5000 * scale), BUILD / "pool-512")
    tower = CLIPTextModel.from_pretrained(BUILD / "text").to(device()).eval()
    encode = diffusion.conditions_of_sd(tower, CLIPTokenizer.from_pretrained(BUILD / "tokenizer"))
    bank = diffusion.CaptionBank(encode, 8)
    unet = diffusion.sd_unet().to(device(), memory_format=torch.channels_last)
    average = train(
        "unet",
        unet,
        lambda model: diffusion.loss_of(model, pool, bank, 32),
        Schedule(steps=round(4200 * scale), learning_rate=8e-4, average=0.999),
        BUILD / "unet.checkpoint",
    )
    return save(average, "unet")


def load_vae(name: str) -> AutoencoderKL:
    """An autoencoder of an earlier stage, frozen."""
    return AutoencoderKL.from_pretrained(BUILD / name).eval().requires_grad_(False)


def save(model: nn.Module, name: str) -> Path:
    """Write `model` as a diffusers or transformers folder under build/training."""
    folder = BUILD / name
    model.save_pretrained(folder)
    return folder
