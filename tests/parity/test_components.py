"""Parts that no catalog model reaches today, against diffusers: EDM models, tiling, latent statistics."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from config.catalog import Catalog
from pipelines.families import FAMILIES
from pipelines.pictures.vae import VAE
from pipelines.plan import GenerationParams
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.text2image import Text2Image

FIELDS: dict[str, Any] = {"width": 256, "height": 256}


def edited(catalog: Catalog, folder: Path, **model: Any) -> Catalog:
    """The tiny catalog with SDXL base from `folder` and other properties."""
    data = catalog.model_dump()
    for component in data["components"]:
        if component["id"] in ("unet-sdxl-base", "vae-sdxl"):
            component["source"] = {"folder": folder}
    for entry in data["models"]:
        if entry["name"] == "SDXL1.0-base":
            entry |= model
    return Catalog.model_validate(data)


def assert_same(ours: Image.Image, expected: Image.Image) -> None:
    pixels = np.asarray(expected).astype(int)
    assert pixels.std() > 10
    assert np.abs(np.asarray(ours).astype(int) - pixels).max() <= 1


def test_edm_euler_on_an_edm_model(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edm"
    shutil.copytree(tiny_models / "sdxl", folder)
    EDMEulerScheduler(sigma_data=0.5, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    ours = Text2Image(edited(catalog, folder, edm=True)).generate(
        GenerationParams(model_name="SDXL1.0-base", prompt="a fox", steps=6, seed=8, sampler="EDM_Euler", **FIELDS)
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_models / "sdxl")
    pipe.scheduler = EDMEulerScheduler(sigma_data=0.5, prediction_type="epsilon")
    generator = torch.Generator().manual_seed(8)
    expected = pipe("a fox", num_inference_steps=6, guidance_scale=5.0, generator=generator, **FIELDS).images[0]
    assert_same(ours.image, expected)


def test_latent_statistics(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    """A VAE whose config gives latents_mean and latents_std, as Playground's does: SDXL's pipelines apply them."""
    folder = tmp_path / "statistics"
    shutil.copytree(tiny_models / "sdxl", folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(latents_mean=[-1.6, 1.1, 3.2, -3.2], latents_std=[8.4, 5.9, 5.4, 5.0])
    vae.save_pretrained(folder / "vae")
    ours = Text2Image(edited(catalog, folder)).generate(
        GenerationParams(model_name="SDXL1.0-base", prompt="a fox", steps=4, seed=8, sampler="Euler", **FIELDS)
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(8)
    expected = pipe("a fox", num_inference_steps=4, guidance_scale=5.0, generator=generator, **FIELDS).images[0]
    assert_same(ours.image, expected)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_large_pictures_are_tiled_as_diffusers_tiles(tiny_models: Path, family: str) -> None:
    folder = tiny_models / ("sd15" if family == "sd" else "sdxl") / "vae"
    model = AutoencoderKL.from_pretrained(folder)
    model.register_to_config(sample_size=128)
    model.tile_sample_min_size, model.tile_latent_min_size = 128, 128 // 2 ** (len(model.config.block_out_channels) - 1)
    space = LatentSpace.from_vae_config(model.config, FAMILIES[family].applies_latent_statistics)
    vae = VAE(model, space, tile_above_pixels=200 * 200)
    side = 256 // vae.space.downscale
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, vae.space.channels, side, side, generator=generator)
    tiled = vae.decode(Latents(latents))
    model.enable_tiling()
    with torch.no_grad():
        expected = model.decode(vae.space.denormalise(latents), return_dict=False)[0]
    assert_same(tiled, vae._processor.postprocess(expected, output_type="pil")[0])
    whole = VAE(model, space).decode(Latents(latents))
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(tiled)).max() > 1, "it was not tiled"


@pytest.mark.parametrize(
    ("family", "force_upcast", "expected"),
    [("sdxl", True, torch.float32), ("sdxl", False, torch.float16), ("sd", True, torch.float16)],
)
def test_a_half_precision_vae_is_upcast_where_the_familys_pipelines_do_it(
    tiny_models: Path, family: str, force_upcast: bool, expected: torch.dtype
) -> None:
    """Only SDXL's pipelines look at `force_upcast`, which is True wherever a config does not say."""
    folder = tiny_models / ("sd15" if family == "sd" else "sdxl") / "vae"
    model = AutoencoderKL.from_pretrained(folder, dtype=torch.float16)
    model.register_to_config(force_upcast=force_upcast)
    space = LatentSpace.from_vae_config(model.config, statistics=False)
    assert VAE(model, space, FAMILIES[family].upcasts_vae)._model.dtype == expected


def test_a_half_precision_vae_of_sd_decodes_as_diffusers_does(tiny_models: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_models / "sd15", dtype=torch.float16)
    assert pipe.vae.config.force_upcast
    space = LatentSpace.from_vae_config(pipe.vae.config, statistics=False)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    expected = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    assert_same(VAE(pipe.vae, space, FAMILIES["sd"].upcasts_vae).decode(Latents(latents)), expected)
