"""Trained parts -> ordinary diffusers folders under models/: half precision, safetensors, files of 15 MB at most."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.data import ROOT
from training.diffusion import NOISE

MODELS = ROOT / "models"
LARGEST_FILE = "15MB"


def write_sd(tokenizer: CLIPTokenizer, tower: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL) -> Path:
    """Write models/sd15."""
    pipe = StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=tower,
        unet=unet,
        vae=vae,
        scheduler=DDIMScheduler(**NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _write(pipe, "sd15")


def write_sdxl(
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
) -> Path:
    """Write models/sdxl."""
    noise = {name: value for name, value in NOISE.items() if name not in ("clip_sample", "set_alpha_to_one")}
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        unet=unet,
        vae=vae,
        scheduler=EulerDiscreteScheduler(**noise, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return _write(pipe, "sdxl")


def _write(pipe: Any, name: str) -> Path:
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    # Parts trained on a GPU or in another memory layout are saved like any other.
    pipe.to("cpu", torch.float16)
    for part in ("unet", "vae"):
        model = getattr(pipe, part).to(memory_format=torch.contiguous_format)
        model.register_to_config(_name_or_path=f"models/{name}")  # not the folder it was trained in
    pipe.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    return folder
