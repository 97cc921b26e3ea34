"""Tiny models that diffusers' inpainting pipelines take: latents of four channels, UNets that read nine or four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from config.catalog import Catalog
from models.make_tiny import NOISE, sd2, sd_unet, seeded, vae

NINE = ("SD1.5-inpainting", "SD2-inpainting", "SDXL-inpainting")
LIKE = {"SD1.5-inpainting": "SD1.5", "SD2-inpainting": "SD2", "SD2-v": "SD2", "SDXL-inpainting": "SDXL1.0-base"}
"""Name -> the tiny catalog's model that it takes the rest from."""


def nine_channels(unet: UNet2DConditionModel, seed: int) -> UNet2DConditionModel:
    """A UNet for inpainting of the same shape."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return seeded(seed, UNet2DConditionModel.from_config(config | {"in_channels": 9}))


def _sd2(unet: UNet2DConditionModel, prediction: str) -> StableDiffusionPipeline:
    """SD2 with latents of four channels: the tiny catalog's has eight, which diffusers' pipelines refuse.

    Its schedule clips by dynamic thresholding (DDIM's and DPM++'s), so that those samplers are no tables.
    """
    parts = dict(sd2().components)
    parts |= {"unet": unet, "vae": seeded(93, vae((8, 8, 16, 16), 4, 768, 0.18215))}
    parts["scheduler"] = DDIMScheduler(
        **NOISE,
        prediction_type=prediction,
        clip_sample=False,
        thresholding=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def write_models(tiny_models: Path, folder: Path) -> None:
    """Folders in diffusers' layout, by the names in `LIKE`."""
    plain = StableDiffusionPipeline.from_pretrained(tiny_models / "sd15")
    plain.register_modules(unet=nine_channels(plain.unet, 91))
    plain.save_pretrained(folder / "SD1.5-inpainting")
    four = sd_unet(4, 48, 48, use_linear_projection=True)
    _sd2(nine_channels(four, 92), "epsilon").save_pretrained(folder / "SD2-inpainting")
    _sd2(seeded(94, four), "v_prediction").save_pretrained(folder / "SD2-v")
    large: Any = StableDiffusionXLPipeline.from_pretrained(tiny_models / "sdxl")
    large.register_modules(unet=nine_channels(large.unet, 95))
    large.save_pretrained(folder / "SDXL-inpainting")


def with_inpainting(catalog: Catalog, folder: Path) -> Catalog:
    """The tiny catalog and the models of `write_models`, with the LoRAs of the UNets that they are built like."""
    data = catalog.model_dump()
    known = {component["id"]: component for component in data["components"]}
    for name, like in LIKE.items():
        model = next(m for m in data["models"] if m["name"] == like)
        slug = name.lower()
        unet = {"id": f"unet-{slug}", "source": {"folder": folder / name}, "inpainting": name in NINE}
        parts = {"unet": unet}
        if like == "SD2":
            parts["vae"] = {"id": f"vae-{slug}", "source": {"folder": folder / name}}
        for kind, changes in parts.items():
            data["components"] = (*data["components"], known[model[kind]] | changes)
        ids = {kind: changes["id"] for kind, changes in parts.items()}
        data["models"] = (*data["models"], model | ids | {"name": name, "aliases": ()})
        for lora in data["loras"]:
            for weights in lora["weights"]:
                if model["unet"] in weights["bases"]:
                    weights["bases"] = (*weights["bases"], unet["id"])
    return Catalog.model_validate(data)
