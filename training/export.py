"""Trained parts -> ordinary diffusers folders under models/: half precision, safetensors, files of 15 MB at most."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
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
    pipe = StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        unet=unet,
        vae=vae,
        scheduler=_sdxl_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return _write(pipe, "sdxl")


def write_unet(unet: UNet2DConditionModel, name: str) -> Path:
    """Write models/<name> with a UNet of SDXL's kind and its noise schedule; the other parts are models/sdxl's."""
    folder = _emptied(name)
    _half(unet, name).save_pretrained(folder / "unet", max_shard_size=LARGEST_FILE)
    _sdxl_scheduler().save_pretrained(folder / "scheduler")
    return folder


def write_controlnet(net: ControlNetModel, name: str) -> Path:
    """Write models/<name>."""
    folder = _emptied(name)
    _half(net, name).save_pretrained(folder, max_shard_size=LARGEST_FILE)
    return folder


def write_lora(weights: dict[str, Tensor], name: str) -> Path:
    """Write a UNet's LoRA, named as PEFT names it in the model, to models/<name> as diffusers pipelines read it."""
    folder = _emptied(name)
    layers = {key.replace(".default", ""): value.half().contiguous() for key, value in weights.items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def _sdxl_scheduler() -> EulerDiscreteScheduler:
    noise = {name: value for name, value in NOISE.items() if name not in ("clip_sample", "set_alpha_to_one")}
    return EulerDiscreteScheduler(**noise, timestep_spacing="leading")


def _emptied(name: str) -> Path:
    folder = MODELS / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _half(model: Any, name: str) -> Any:
    """In half precision and plain memory layout, whatever it was trained in, and without the path of that place."""
    model = model.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    model.register_to_config(_name_or_path=f"models/{name}")
    return model


def _write(pipe: Any, name: str) -> Path:
    folder = _emptied(name)
    pipe.to("cpu", torch.float16)
    for part in ("unet", "vae"):
        _half(getattr(pipe, part), name)
    pipe.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    return folder
