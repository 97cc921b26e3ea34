"""Folders of the real configurations with random weights: true speeds and memory, no download."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from config.catalog import ROOT


def write_sd15(folder: Path) -> Path:
    """SD1.5: the 860 M UNet, CLIP-L and the VAE, as published; 4.3 GB in float32. Returns `folder`."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        ),
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "models" / "tiny" / "sd15" / "tokenizer"),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_sd15_catalog(folder: Path, weights: Path) -> Path:
    """A catalog that serves SD1.5 from `weights`. Returns `folder`."""
    folder.mkdir(parents=True)
    source = {"folder": str(weights)}
    components = [
        {"id": "text-encoder-sd15", "kind": "text_encoder", "family": "sd", "source": source},
        {"id": "unet-sd15", "kind": "unet", "family": "sd", "source": source, "text_encoders": [0]},
        {"id": "vae-sd15", "kind": "vae", "family": "sd", "source": source},
    ]
    model = {
        "name": "SD1.5",
        "family": "sd",
        "text_encoder": "text-encoder-sd15",
        "unet": "unet-sd15",
        "vae": "vae-sd15",
        "sizes": ["512x512"],
    }
    (folder / "components.yaml").write_text(yaml.safe_dump(components))
    (folder / "models.yaml").write_text(yaml.safe_dump([model]))
    return folder
