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
from tests.support import hub_cache

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
    with pytest.raises(WeightsError, match="size_multiple 8 is no multiple of 32"):
        load_vae(wrong, "vae-sd15", "cpu")


def test_a_unet_whose_latents_are_not_its_vaes(catalog: Catalog, tiny_models: Path) -> None:
    wrong = with_source(catalog, "vae-sd15", folder=tiny_models / "sd2")
    with pytest.raises(WeightsError, match="takes 4 latent channels, its VAE has 8"):
        load_engine(wrong, "unet-sd15", "cpu")


def test_a_distilled_unet_is_refused(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "lcm")
    config = dict(UNet2DConditionModel.load_config(tmp_path / "lcm" / "unet"))
    UNet2DConditionModel.from_config(config | {"time_cond_proj_dim": 16}).save_pretrained(tmp_path / "lcm" / "unet")
    with pytest.raises(WeightsError, match="LCM-distilled"):
        load_engine(with_source(catalog, "unet-sd15", folder=tmp_path / "lcm"), "unet-sd15", "cpu")


def original_layout(folder: Path) -> dict[str, torch.Tensor]:
    """An SD1.5 folder as one checkpoint in the layout of the original release (CompVis), for a UNet of two levels."""
    state: dict[str, torch.Tensor] = {}
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    blocks = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        block = max((b for b in blocks if name.startswith(f"{b}.")), key=len)
        rest = name.removeprefix(f"{block}.")
        part, _, leaf = rest.rpartition(".")
        rest = f"{resnet[part]}.{leaf}" if ".resnets." in block else rest
        state[f"model.diffusion_model.{blocks[block]}.{rest}"] = tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        bare = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{bare}"] = tensor
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        side, _, rest = name.partition(".")
        levels = 4
        parts = rest.split(".")
        match parts:
            case ["down_blocks", level, "resnets", index, *leaf]:
                rest = ".".join(["down", level, "block", index, *leaf])
            case ["down_blocks", level, "downsamplers", "0", *leaf]:
                rest = ".".join(["down", level, "downsample", *leaf])
            case ["up_blocks", level, "resnets", index, *leaf]:
                rest = ".".join(["up", str(levels - 1 - int(level)), "block", index, *leaf])
            case ["up_blocks", level, "upsamplers", "0", *leaf]:
                rest = ".".join(["up", str(levels - 1 - int(level)), "upsample", *leaf])
            case ["mid_block", "resnets", index, *leaf]:
                rest = ".".join(["mid", f"block_{int(index) + 1}", *leaf])
            case ["mid_block", "attentions", "0", *leaf]:
                part = ".".join(leaf[:-1])
                rest = f"mid.attn_1.{attention[part]}.{leaf[-1]}"
                if leaf[-1] == "weight" and part != "group_norm":
                    tensor = tensor[:, :, None, None]  # a linear layer there is a 1x1 convolution here
        rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        state[f"first_stage_model.{side}.{rest}" if rest else f"first_stage_model.{side}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def test_a_single_checkpoint_in_the_original_layout(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "configuration"
    shutil.copytree(tiny_models / "sd15", configuration, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(original_layout(tiny_models / "sd15"), tmp_path / "model.safetensors")
    single = catalog
    for component in ("text-encoder-sd15", "unet-sd15", "vae-sd15"):
        source = {"checkpoint": tmp_path / "model.safetensors", "configuration": {"folder": configuration}}
        single = with_source(single, component, **source)
    params = GenerationParams(model_name="SD1.5", **SMALL)
    from_file = np.asarray(Text2Image(single).generate(params).image).astype(int)
    from_folder = np.asarray(Text2Image(catalog).generate(params).image)
    assert np.abs(from_file - from_folder).max() <= 1
