"""Where weights come from: folders, the hub's cache, single checkpoints; never a pickle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.assembly import load_engine, load_text_encoders, load_vae
from pipelines.errors import WeightsError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import locate
from tests.support import hub_cache, original_layout

SMALL = {"prompt": "a red fox", "width": 128, "height": 128, "steps": 4, "seed": 3, "sampler": "Euler"}


def with_source(catalog: Catalog, component_id: str, **source: Any) -> Catalog:
    """The catalog with another source for one component."""
    data = catalog.model_dump()
    for component in data["components"]:
        if component["id"] == component_id:
            component["source"] = source
    return Catalog.model_validate(data)


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    return hub_cache.fill(tmp_path_factory.mktemp("hf"), tiny_models)


@pytest.fixture
def offline_hub(monkeypatch: pytest.MonkeyPatch, hub_home: Path) -> Catalog:
    """The hub catalog, unchanged, over the filled cache and with no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Catalog.load("hub")


@pytest.mark.parametrize("model", ["SD1.5", "SD2", "SDXL1.0-base", "SSD", "SDXL-turbo"])
def test_the_hub_catalog_draws_from_a_filled_cache(offline_hub: Catalog, model: str) -> None:
    refined = offline_hub.model(model).refiner is not None
    params = GenerationParams(model_name=model, enable_refiner=refined, **SMALL | {"steps": 6})
    assert np.asarray(Text2Image(offline_hub).generate(params).image).std() > 10


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_hub_components_equal_diffusers(offline_hub: Catalog, model: str) -> None:
    spec = offline_hub.model(model)
    folder = locate(offline_hub.component(spec.unet))
    if model == "SD1.5":
        pipe = StableDiffusionPipeline.from_pretrained(folder, variant="fp16")
    else:
        vae = load_vae(offline_hub, spec.vae, "cpu")._model
        pipe = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16", vae=vae)
    pipe.scheduler = __import__("diffusers").EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    size = {"width": 128, "height": 128}
    expected = pipe("a red fox", num_inference_steps=4, guidance_scale=5.0, generator=generator, **size).images[0]
    ours = Text2Image(offline_hub).generate(GenerationParams(model_name=model, **SMALL)).image
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(expected)).max() <= 1


def test_a_repository_that_is_not_cached_is_named(offline_hub: Catalog) -> None:
    other = with_source(offline_hub, "unet-sd15", repo="nobody/nothing", revision="0" * 40)
    with pytest.raises(WeightsError, match=r"component unet-sd15: cannot load .*nobody/nothing"):
        load_engine(other, "unet-sd15", "cpu")


def test_pickles_are_refused(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "pickled")
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = tmp_path / "pickled" / part / f"{file}.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin" if file == "model" else f"{file}.bin"))
        weights.unlink()
    for component, load in (
        ("unet-sd15", load_engine),
        ("vae-sd15", load_vae),
        ("text-encoder-sd15", load_text_encoders),
    ):
        pickled = with_source(catalog, component, folder=tmp_path / "pickled")
        with pytest.raises(WeightsError, match=component):
            load(pickled, component, "cpu")


def test_a_missing_folder_says_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(WeightsError, match="make models"):
        load_vae(with_source(catalog, "vae-sd15", folder="models/nowhere"), "vae-sd15", "cpu")


def test_a_catalog_that_promises_what_the_vae_cannot_make(catalog: Catalog, tiny_models: Path) -> None:
    wrong = with_source(catalog, "vae-sd15", folder=tiny_models / "sdxl")
    with pytest.raises(WeightsError, match="size_multiple 8 is not a multiple of 32"):
        load_vae(wrong, "vae-sd15", "cpu")


def test_a_unet_whose_latents_are_not_its_vaes(catalog: Catalog, tiny_models: Path) -> None:
    wrong = with_source(catalog, "vae-sd15", folder=tiny_models / "sd2")
    with pytest.raises(WeightsError, match="takes 4 latent channels, its VAE has 8"):
        load_engine(wrong, "unet-sd15", "cpu")


def test_a_catalog_says_which_unets_are_for_inpainting(catalog: Catalog, inpainting_catalog: Catalog) -> None:
    nine = inpainting_catalog.component("unet-sd1.5-inpainting").source
    for component, source, channels, advice in (
        ("unet-sd15", nine, 9, "`inpainting: true`"),
        ("unet-sd1.5-inpainting", catalog.component("unet-sd15").source, 4, "`inpainting: false`"),
    ):
        wrong = with_source(inpainting_catalog, component, folder=source.folder)
        with pytest.raises(WeightsError, match=f"component {component} reads {channels} channels: write {advice}"):
            load_engine(wrong, component, "cpu")


def test_a_distilled_unet_is_refused(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "lcm")
    config = dict(UNet2DConditionModel.load_config(tmp_path / "lcm" / "unet"))
    UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16}).save_pretrained(tmp_path / "lcm" / "unet")
    with pytest.raises(WeightsError, match="LCM-distilled"):
        load_engine(with_source(catalog, "unet-sd15", folder=tmp_path / "lcm"), "unet-sd15", "cpu")


def test_a_single_checkpoint_in_the_original_layout(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "configuration"
    shutil.copytree(tiny_models / "sd15", configuration, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(original_layout.of_folder(tiny_models / "sd15"), tmp_path / "model.safetensors")
    single = catalog
    for component in ("text-encoder-sd15", "unet-sd15", "vae-sd15"):
        source = {"checkpoint": tmp_path / "model.safetensors", "configuration": {"folder": configuration}}
        single = with_source(single, component, **source)
    params = GenerationParams(model_name="SD1.5", **SMALL)
    from_file = np.asarray(Text2Image(single).generate(params).image).astype(int)
    from_folder = np.asarray(Text2Image(catalog).generate(params).image)
    assert np.abs(from_file - from_folder).max() <= 1
