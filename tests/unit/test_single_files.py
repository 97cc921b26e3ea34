"""What a single file needs and does not bring: its configuration, CLIP's vocabulary, what it predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.components import ComponentSpec
from config.sources import CheckpointSource
from pipelines.diffusers_compat import clip_from_checkpoint, model_from_checkpoint
from pipelines.errors import WeightsError
from pipelines.sampling.samplers import SAMPLERS
from pipelines.weights.checkpoints import renaming
from pipelines.weights.files import read_config
from pipelines.weights.headers import read_header
from pipelines.weights.loading import load_model
from pipelines.weights.vocabulary import clip_tokenizer
from tests.support import original_layout, sparse_files
from tests.support import published_shapes as published

FAMILY = {"sd15": "sd", "sd2": "sd", "sdxl": "sdxl", "ssd": "sdxl", "sdxl-refiner": "sdxl"}
CLASSES: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}


def component(path: Path, kind: Any, base: str, **fields: Any) -> ComponentSpec:
    family: Any = FAMILY[base]
    return ComponentSpec(
        id=kind.replace("_", "-"), kind=kind, family=family, source=CheckpointSource(checkpoint=path), **fields
    )


@pytest.mark.parametrize("base", FAMILY)
def test_a_published_checkpoint_fills_its_models_exactly(tmp_path: Path, base: str) -> None:
    """Names and shapes of a whole published file, through the converters into models of the configuration found."""
    state = published.with_average(published.checkpoint(base))
    path = sparse_files.write(tmp_path / "one.safetensors", state)
    for kind in ("unet", "vae"):
        rename = renaming(read_header(path), kind)
        own = {name: tensor for key, tensor in state.items() if (name := rename(key)) is not None}
        spec = component(path, kind, base)
        _, info = model_from_checkpoint(CLASSES[kind], own, read_config(spec))
        assert info == {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}, kind
    rename = renaming(read_header(path), "text_encoder")
    own = {name: tensor for key, tensor in state.items() if (name := rename(key)) is not None}
    for part in original_layout.ENCODERS[base]:
        model_class: Any = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
        _, info = clip_from_checkpoint(model_class, own, read_config(component(path, "text_encoder", base), part))
        assert info == {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}, part


@pytest.mark.parametrize("base", ["sd15", "sd2", "sdxl"])
def test_a_published_controlnet_fills_its_model_exactly(tmp_path: Path, base: str) -> None:
    state = published.controlnet(base)
    original = original_layout.prefixed("control_model.", original_layout.unet(state, published.LAYERS_PER_BLOCK))
    if base == "sdxl":
        original = state  # in the original layout diffusers' converter has no names for what SDXL adds
    path = sparse_files.write(tmp_path / "one.safetensors", original)
    config = read_config(component(path, "controlnet", base))
    _, info = model_from_checkpoint(ControlNetModel, original, config)
    assert info == {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}


@pytest.mark.parametrize("types", [6, 8])
def test_a_union_controlnet_says_how_many_controls_it_has(tmp_path: Path, types: int) -> None:
    state = published.controlnet("sdxl", types)
    path = sparse_files.write(tmp_path / "one.safetensors", state)
    config = read_config(component(path, "controlnet", "sdxl", union=True))
    assert config["num_control_type"] == types
    _, info = model_from_checkpoint(ControlNetUnionModel, state, config)
    assert info == {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}


@pytest.mark.parametrize("base", ["sd15", "sd2", "sdxl"])
def test_a_unet_for_inpainting_keeps_its_channels(tmp_path: Path, base: str) -> None:
    path = sparse_files.write(tmp_path / "one.safetensors", published.checkpoint(base, 9))
    spec = component(path, "unet", base)
    assert read_config(spec)["in_channels"] == 9
    assert read_config(spec, "scheduler")["prediction_type"] == "epsilon"


def values(shape: torch.Tensor, spread: float) -> torch.Tensor:
    """Numbers of exactly this spread around zero."""
    signs = torch.ones(shape.shape).flatten()
    signs[::2] = -1
    return (signs * spread).reshape(shape.shape)


@pytest.mark.parametrize(("spread", "predicts"), [(0.05, "epsilon"), (0.12, "v_prediction")])
def test_what_an_sd2_predicts_is_told_from_one_tensor(tmp_path: Path, spread: float, predicts: str) -> None:
    """ComfyUI's rule, for files whose marks and metadata say nothing."""
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    shapes = published.checkpoint("sd2")
    path = sparse_files.write(tmp_path / "one.safetensors", {key: shapes[key]} | shapes)
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(values(shapes[key], spread).half().numpy().tobytes())
    assert read_config(component(path, "unet", "sd2"), "scheduler")["prediction_type"] == predicts
    marked = sparse_files.write(tmp_path / "two.safetensors", shapes | {"v_pred": ()})
    assert read_config(component(marked, "unet", "sd2"), "scheduler")["prediction_type"] == "v_prediction"


def test_marks_and_the_catalog_stand_above_the_published_schedule(tmp_path: Path) -> None:
    shapes = published.checkpoint("sdxl")
    plain = sparse_files.write(tmp_path / "plain.safetensors", shapes)
    assert read_config(component(plain, "unet", "sdxl"), "scheduler")["prediction_type"] == "epsilon"
    marked = sparse_files.write(tmp_path / "one.safetensors", shapes | {"v_pred": (), "ztsnr": ()})
    config = read_config(component(marked, "unet", "sdxl"), "scheduler")
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    told = component(marked, "unet", "sdxl", scheduler={"prediction_type": "epsilon", "rescale_betas_zero_snr": False})
    config = read_config(told, "scheduler")
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("epsilon", False)


@pytest.mark.parametrize(
    ("marks", "data", "predicts"),
    [
        ({"edm_vpred.sigma_max": (), "edm_vpred.sigma_min": ()}, 1.0, "v_prediction"),
        ({"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, 0.5, "epsilon"),
    ],
)
def test_an_edm_model_gets_an_edm_schedule(tmp_path: Path, marks: dict[str, Any], data: float, predicts: str) -> None:
    path = sparse_files.write(tmp_path / "one.safetensors", published.checkpoint("sdxl") | marks)
    config = read_config(component(path, "unet", "sdxl"), "scheduler")
    assert (config["sigma_data"], config["prediction_type"]) == (data, predicts)
    assert any(spec.edm for spec in SAMPLERS.values())
    vae = read_config(component(path, "vae", "sdxl"))
    assert ("latents_mean" in vae) == ("edm_mean" in marks)


@pytest.mark.parametrize(("base", "scale"), [("sd15", 0.18215), ("sdxl", 0.13025)])
def test_a_vae_alone_is_the_familys_that_it_serves(tmp_path: Path, base: str, scale: float) -> None:
    path = sparse_files.write(tmp_path / "one.safetensors", original_layout.vae(published.vae(base), 4))
    config = read_config(component(path, "vae", base))
    assert config["scaling_factor"] == scale
    assert config.get("force_upcast", False) == (base == "sdxl")


def test_what_a_file_does_not_hold_is_named(tmp_path: Path) -> None:
    unet = sparse_files.write(tmp_path / "unet.safetensors", published.unet("sd15"))
    with pytest.raises(WeightsError, match=r"vae, file unet\.safetensors: this is a unet, in which there is no vae"):
        read_config(component(unet, "vae", "sd15"))
    words = sparse_files.write(tmp_path / "words.safetensors", {"emb_params": (2, 768)})
    with pytest.raises(WeightsError, match=r"this is a embedding, in which there is no unet"):
        load_model(UNet2DConditionModel, component(words, "unet", "sd15"), "cpu")
    pruned = {n: s for n, s in published.unet("sdxl").items() if ".transformer_blocks.9." not in n}
    other = sparse_files.write(tmp_path / "pruned.safetensors", pruned)
    with pytest.raises(WeightsError, match=r"no known configuration fits it; give its configuration"):
        read_config(component(other, "unet", "sdxl"))
    (tmp_path / "broken.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"unet, file broken\.safetensors: it is empty"):
        read_config(component(tmp_path / "broken.safetensors", "unet", "sd15"))


def test_the_vocabulary_is_clips() -> None:
    """Ids that the published tokenizer gives, as the original's tests and papers quote them."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("diagram").input_ids == [49406, 22697, 49407]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49406, 49407, 49407)
    assert clip_tokenizer("!").pad_token_id == 0
    assert tokenizer.decode(tokenizer("an astronaut riding a horse").input_ids[1:-1]) == "an astronaut riding a horse"


TEXTS = [
    "a photo of a cat",
    "  Two   spaces, CAPITALS; and (brackets:1.2) \n a new line",
    "naïve café – Ærøskøbing",
    "日本語の猫 🐱👩‍🚀",
    "don't 1234 co-operate's",
    "<lora:x:1> <|endoftext|> <cat-toy>",
    "",
    "word " * 200,
]


def test_the_vocabulary_is_that_of_a_folder_with_the_same_files(tmp_path: Path) -> None:
    """transformers' tokenizer of `vocab.json` and `merges.txt`, the files that published folders have."""
    ours = clip_tokenizer("!")
    vocabulary = sorted(ours.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.json").write_text(json.dumps(dict(vocabulary)))
    merges = [a + " " + b for a, b in json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 77})
    )
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    options: dict[str, Any] = {"padding": "max_length", "max_length": 77, "truncation": True}
    for text in TEXTS:
        assert ours(text, **options).input_ids == theirs(text, **options).input_ids, text


def test_values_that_are_not_finite_are_named_at_load(tmp_path: Path) -> None:
    state = {key: torch.zeros(tensor.shape) for key, tensor in original_layout.vae(published.vae("sd15"), 4).items()}
    state["decoder.conv_in.bias"][3] = torch.nan
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match=r"file one\.safetensors: tensor decoder\.conv_in\.bias has values that"):
        load_model(AutoencoderKL, component(tmp_path / "one.safetensors", "vae", "sd15"), "cpu")
