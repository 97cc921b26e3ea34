"""Single files and odd folders serve as the folder they came from, whatever people's files have besides or lack."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from config.catalog import Catalog
from models.make_tiny import seeded, text_config
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights import architectures
from pipelines.weights.loading import load_model, load_text_models
from pipelines.weights.vocabulary import clip_tokenizer
from tests.parity import oracle
from tests.parity.test_pictures import assert_same, request
from tests.support import original_layout

State = dict[str, torch.Tensor]
MODELS = {
    "SD1.5": ("sd15", ("text-encoder-sd15", "unet-sd15", "vae-sd15")),
    "SD2": ("sd2", ("text-encoder-sd2", "unet-sd2", "vae-sd2")),
    "SDXL1.0-base": ("sdxl", ("text-encoder-sdxl", "unet-sdxl-base", "vae-sdxl")),
    "SSD": ("ssd", ("text-encoder-sdxl", "unet-ssd", "vae-sdxl")),
}
SMALL = request("SD1.5", sampler="Euler", steps=3)


def sourced(catalog: Catalog, components: tuple[str, ...], **source: Any) -> Catalog:
    """The catalog with another source for these components."""
    data = catalog.model_dump()
    for component in data["components"]:
        if component["id"] in components:
            component["source"] = source
    return Catalog.model_validate(data)


def from_file(catalog: Catalog, model: str, path: Path, tiny_models: Path, *components: str) -> Catalog:
    folder, every = MODELS[model]
    configuration = {"folder": tiny_models / folder}
    return sourced(catalog, components or every, checkpoint=path, configuration=configuration)


def drawn(catalog: Catalog, fields: dict[str, Any]) -> Any:
    return Text2Image(catalog).generate(GenerationParams(**fields)).image


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_every_base(catalog: Catalog, tiny_models: Path, tmp_path: Path, model: str) -> None:
    folder, _ = MODELS[model]
    save_file(original_layout.of_folder(tiny_models / folder), tmp_path / "one.safetensors")
    fields = request(model, sampler="Euler", steps=3)
    ours = drawn(from_file(catalog, model, tmp_path / "one.safetensors", tiny_models), fields)
    assert_same(ours, oracle.draw(**fields))


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_a_checkpoint_as_diffusers_reads_it(catalog: Catalog, tiny_models: Path, tmp_path: Path, model: str) -> None:
    folder, _ = MODELS[model]
    path = tmp_path / "one.safetensors"
    state = original_layout.of_folder(tiny_models / folder)
    save_file(with_average(state), path)
    pipeline_class: Any = StableDiffusionPipeline if model == "SD1.5" else StableDiffusionXLPipeline
    configured = {"config": str(tiny_models / folder), "local_files_only": True}
    if model == "SD1.5":
        configured |= {"safety_checker": None, "feature_extractor": None}
    pipe = pipeline_class.from_single_file(str(path), **configured)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    fields = request(model, sampler="Euler", steps=3)
    asked = {key: fields[key] for key in ("prompt", "negative_prompt", "width", "height") if key in fields}
    generator = torch.Generator().manual_seed(fields["seed"])
    expected = pipe(**asked, num_inference_steps=3, guidance_scale=fields["cfg_scale"], generator=generator).images[0]
    assert_same(drawn(from_file(catalog, model, path, tiny_models), fields), np.asarray(expected))


def with_average(state: State) -> State:
    """A trainer's average of the UNet beside it, of other values."""
    names = [name for name in state if name.startswith("model.diffusion_model.")]
    assert len(names) > 100, "fewer, and diffusers would not take it for an average"
    twins = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] + 1 for name in names}
    return {**state, **twins, "model_ema.num_updates": torch.tensor(7), "model_ema.decay": torch.tensor(0.9)}


TEXT = "cond_stage_model.transformer.text_model."


def in_format(prefix: str, dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {n: t.to(dtype) if n.startswith(prefix) else t for n, t in state.items()}


def with_position_ids(ids: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {f"{TEXT}embeddings.position_ids": ids}


ODDITIES: dict[str, Callable[[State], State]] = {
    "without position_ids": dict,
    "with position_ids": with_position_ids(torch.arange(77)[None]),
    # Merging tools have turned them to half precision and averaged them.
    "with spoilt position_ids": with_position_ids(torch.arange(77)[None].half() * 0.5),
    "an average beside it": with_average,
    "text encoder without a level of names": lambda state: {n.replace(TEXT, TEXT[:-11]): t for n, t in state.items()},
    "the trainer's tables": lambda state: (
        state | {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
    ),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_what_a_checkpoint_has_besides_or_lacks(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, oddity: str
) -> None:
    state = ODDITIES[oddity](original_layout.of_folder(tiny_models / "sd15"))
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "one.safetensors")
    odd = from_file(catalog, "SD1.5", tmp_path / "one.safetensors", tiny_models)
    assert_same_weights(odd, catalog)


FORMATS = {
    "text encoder in half precision": ("cond_stage_model.", "text-encoder-sd15", torch.float16),
    "UNet in bfloat16": ("model.diffusion_model.", "unet-sd15", torch.bfloat16),
    "UNet in float8": ("model.diffusion_model.", "unet-sd15", torch.float8_e4m3fn),
    "VAE in half precision": ("first_stage_model.", "vae-sd15", torch.float16),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_in_another_number_format(catalog: Catalog, tiny_models: Path, tmp_path: Path, name: str) -> None:
    """The picture of the rounded weights, computed in float32."""
    prefix, component, dtype = FORMATS[name]
    state = in_format(prefix, dtype)(original_layout.of_folder(tiny_models / "sd15"))
    save_file(state, tmp_path / "one.safetensors")
    shutil.copytree(tiny_models / "sd15", tmp_path / "rounded")
    part = next(part for part in ("text_encoder", "unet", "vae") if component.startswith(part.replace("_", "-")))
    (weights,) = (tmp_path / "rounded" / part).glob("*.safetensors")
    save_file({n: t.to(dtype).float() for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    odd = from_file(catalog, "SD1.5", tmp_path / "one.safetensors", tiny_models)
    rounded = sourced(catalog, (component,), folder=tmp_path / "rounded")
    assert_same_weights(odd, rounded)
    assert np.array_equal(np.asarray(drawn(odd, SMALL)), np.asarray(drawn(rounded, SMALL)))
    assert not np.array_equal(np.asarray(drawn(odd, SMALL)), np.asarray(drawn(catalog, SMALL)))


def assert_same_weights(ours: Catalog, expected: Catalog, components: tuple[str, ...] = MODELS["SD1.5"][1]) -> None:
    """Bit for bit, which is more than a picture within 1/255."""
    for component in components:
        for mine, theirs in zip(weights_of(ours, component), weights_of(expected, component), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def weights_of(catalog: Catalog, component: str) -> list[State]:
    spec = catalog.component(component)
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    if spec.kind == "text_encoder":
        return [model.state_dict() for _, _, model in load_text_models(spec, "cpu")]
    model = load_model(classes[spec.kind], spec, "cpu")
    assert not model.training
    return [model.state_dict()]


def unet_of(tiny_models: Path) -> State:
    return load_file(tiny_models / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")


def vae_of(tiny_models: Path) -> State:
    return load_file(tiny_models / "sd15" / "vae" / "diffusion_pytorch_model.safetensors")


def old_attention(state: State) -> State:
    """As diffusers before 0.18 named the VAE's attention, and as the published files of SD1.5 still do."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = tensor
    return renamed


ALONE: dict[str, tuple[str, Callable[[Path], State]]] = {
    "UNet, original": (
        "unet-sd15",
        lambda tiny: original_layout.prefixed("model.diffusion_model.", original_layout.unet(unet_of(tiny), 1)),
    ),
    "UNet, original, no prefix": ("unet-sd15", lambda tiny: original_layout.unet(unet_of(tiny), 1)),
    "UNet, original, half a prefix": (
        "unet-sd15",
        lambda tiny: original_layout.prefixed("diffusion_model.", original_layout.unet(unet_of(tiny), 1)),
    ),
    "UNet, diffusers": ("unet-sd15", unet_of),
    "UNet, diffusers, prefix": ("unet-sd15", lambda tiny: original_layout.prefixed("unet.", unet_of(tiny))),
    "VAE, original": ("vae-sd15", lambda tiny: original_layout.vae(vae_of(tiny), 4)),
    "VAE, original, prefix": (
        "vae-sd15",
        lambda tiny: original_layout.prefixed("first_stage_model.", original_layout.vae(vae_of(tiny), 4)),
    ),
    "VAE, diffusers": ("vae-sd15", vae_of),
    "VAE, old diffusers": ("vae-sd15", lambda tiny: old_attention(vae_of(tiny))),
    "VAE with its loss": (
        "vae-sd15",
        lambda tiny: original_layout.vae(vae_of(tiny), 4) | {"loss.logvar": torch.zeros(())},
    ),
    "CLIP, transformers": (
        "text-encoder-sd15",
        lambda tiny: original_layout.clip(load_file(tiny / "sd15" / "text_encoder" / "model.safetensors")),
    ),
    "CLIP, transformers 5": (
        "text-encoder-sd15",
        lambda tiny: {
            name.removeprefix("text_model."): tensor
            for name, tensor in load_file(tiny / "sd15" / "text_encoder" / "model.safetensors").items()
        },
    ),
    "OpenCLIP": (
        "text-encoder-sd2",
        lambda tiny: original_layout.open_clip(load_file(tiny / "sd2" / "text_encoder" / "model.safetensors")),
    ),
    "ControlNet, original": (
        "controlnet-sd15-canny",
        lambda tiny: original_layout.prefixed("control_model.", original_layout.unet(controlnet_of(tiny), 1)),
    ),
    "ControlNet, original, no prefix": (
        "controlnet-sd15-canny",
        lambda tiny: original_layout.unet(controlnet_of(tiny), 1),
    ),
    "ControlNet, diffusers": ("controlnet-sd15-canny", lambda tiny: controlnet_of(tiny)),
}


def controlnet_of(tiny_models: Path) -> State:
    return load_file(tiny_models / "controlnet-sd15-canny" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", ALONE)
def test_one_model_alone_in_a_file(catalog: Catalog, tiny_models: Path, tmp_path: Path, name: str) -> None:
    component, state = ALONE[name]
    save_file({key: tensor.contiguous() for key, tensor in state(tiny_models).items()}, tmp_path / "one.safetensors")
    folder = tiny_models / (component if component.startswith("controlnet") else component.rpartition("-")[2])
    alone = sourced(catalog, (component,), checkpoint=tmp_path / "one.safetensors", configuration={"folder": folder})
    assert_same_weights(alone, catalog, (component,))


def shard(folder: Path, stem: str, variant: str = "") -> None:
    """Cut the weights of a folder into two files and an index, as diffusers saves what is large."""
    whole = folder / f"{stem}.safetensors"
    state = load_file(whole)
    whole.unlink()
    names = sorted(state)
    where = {}
    for part, some in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}{variant}-0000{part}-of-00002.safetensors"
        save_file({name: state[name] for name in some}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(some, file)
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_folder_cut_into_files_with_an_index(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, variant: str
) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "cut")
    for part, stem in STEMS.items():
        shard(tmp_path / "cut" / part, stem, variant)
    cut = sourced(catalog, MODELS["SD1.5"][1], folder=tmp_path / "cut")
    assert_same_weights(cut, catalog)
    assert_same(drawn(cut, SMALL), oracle.draw(**SMALL))


def test_pickles_beside_the_weights_are_ignored(catalog: Catalog, tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "both")
    for part, stem in STEMS.items():
        (tmp_path / "both" / part / f"{'pytorch_model' if stem == 'model' else stem}.bin").write_bytes(b"\x80\x02.")
    assert_same_weights(sourced(catalog, MODELS["SD1.5"][1], folder=tmp_path / "both"), catalog)


def test_a_file_with_nothing_beside_it(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No configuration is given: what serves is the published one of its base, here a tiny one, and CLIP's vocabulary.

    The oracle is diffusers over a folder with the same weights and tokenizer.
    """
    folder = tmp_path / "sd15"
    shutil.copytree(tiny_models / "sd15", folder)
    config = CLIPTextConfig(**text_config(32, 3, 32, "quick_gelu").to_dict() | {"vocab_size": 49408})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 49406, 49407, 49407
    seeded(15, CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    save_file(original_layout.of_folder(folder, "sd15"), tmp_path / "one.safetensors")

    settings = tmp_path / "architectures" / "sd15"
    shutil.copytree(folder, settings, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    shutil.copytree(architectures.ARCHITECTURES / "sd15" / "tokenizer", settings / "tokenizer")
    monkeypatch.setattr(architectures, "ARCHITECTURES", tmp_path / "architectures")
    architectures.published.cache_clear()
    try:
        ours = drawn(sourced(catalog, MODELS["SD1.5"][1], checkpoint=tmp_path / "one.safetensors"), SMALL)
    finally:
        architectures.published.cache_clear()
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    asked = {key: SMALL[key] for key in ("prompt", "negative_prompt", "width", "height") if key in SMALL}
    generator = torch.Generator().manual_seed(SMALL["seed"])
    expected = pipe(**asked, num_inference_steps=3, guidance_scale=SMALL["cfg_scale"], generator=generator).images[0]
    assert_same(ours, np.asarray(expected))
