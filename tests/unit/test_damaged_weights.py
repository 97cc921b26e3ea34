"""Weights that are incomplete, damaged or of another model do not load; messages name component, file and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.assembly import load_engine, load_text_encoders, load_vae
from pipelines.errors import WeightsError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from pipelines.weights.loading import load_model, load_text_models
from tests.support import original_layout
from tests.unit.test_weights import SMALL, with_source

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LOADERS = {
    "unet-sd15": (load_engine, UNET),
    "vae-sd15": (load_vae, VAE),
    "text-encoder-sd15": (load_text_encoders, TEXT),
}
Harm = Callable[[dict[str, torch.Tensor], str], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "missing": (lambda state, name: state.pop(name), "is missing"),
    "mis-shaped": (
        lambda state, name: state.update({name: torch.zeros(3, 3)}),
        r"is \[3, 3\], the configuration wants",
    ),
    "unexpected": (lambda state, name: state.update({f"{name}.more": torch.zeros(3)}), "belongs to no layer"),
}
DAMAGES = [
    (None, "no such file"),
    (b"", "it is empty"),
    (b"\x10\0\0\0\0\0\0\0{", "truncated or damaged"),
    (b"<!DOCTYPE html><html>", "HTML page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer; run git lfs pull"),
]


@pytest.fixture
def folder(tiny_models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models / "sd15", tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("harm", sorted(HARMS))
@pytest.mark.parametrize("component", sorted(LOADERS))
def test_every_tensor_must_be_there_and_fit(catalog: Catalog, folder: Path, component: str, harm: str) -> None:
    load, file = LOADERS[component]
    change, said = HARMS[harm]
    name = sorted(load_file(folder / file))[5]
    edit(folder / file, lambda state: change(state, name))
    bare = name.removeprefix("text_model.")
    with pytest.raises(
        WeightsError, match=rf"component {component}, file {file}: tensor (text_model\.)?{bare}.* {said}"
    ):
        load(with_source(catalog, component, folder=folder), component, "cpu")


@pytest.mark.parametrize(("content", "said"), DAMAGES)
@pytest.mark.parametrize("component", sorted(LOADERS))
def test_a_damaged_file_is_named(
    catalog: Catalog, folder: Path, component: str, content: bytes | None, said: str
) -> None:
    load, file = LOADERS[component]
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(WeightsError, match=f"component {component}, file {file}: .*{said}"):
        load(with_source(catalog, component, folder=folder), component, "cpu")


@pytest.mark.parametrize("content", [content for content, _ in DAMAGES])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_damaged_configuration_is_named(catalog: Catalog, folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(WeightsError, match=f"component unet-sd15, file {file}: "):
        load_engine(with_source(catalog, "unet-sd15", folder=folder), "unet-sd15", "cpu")


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("tokenizer.json", "vocab.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("", "tokenizer_config.json"),
    ],
)
def test_a_tokenizer_without_its_files(catalog: Catalog, folder: Path, lost: str, named: str) -> None:
    path = folder / "tokenizer" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(WeightsError, match=f"component text-encoder-sd15, file tokenizer/{named}: no such file"):
        load_text_encoders(with_source(catalog, "text-encoder-sd15", folder=folder), "text-encoder-sd15", "cpu")


def test_a_tokenizer_of_another_model(catalog: Catalog, folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["vocab"] |= {f"word{index}": len(told["model"]["vocab"]) + index for index in range(9000)}
    path.write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=r"its tokenizer knows .* words, the text encoder"):
        load_text_encoders(with_source(catalog, "text-encoder-sd15", folder=folder), "text-encoder-sd15", "cpu")


def test_what_published_text_encoders_carry_besides_is_left_aside(catalog: Catalog, folder: Path) -> None:
    extra = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "logit_scale": torch.tensor(1.0),
        "text_projection.weight": torch.zeros(32, 32),
        "vision_model.embeddings.class_embedding": torch.zeros(8),
        "visual_projection.weight": torch.zeros(8, 8),
        "model_ema.decay": torch.tensor(0.9),
    }
    edit(folder / TEXT, lambda state: state.update(extra))
    load_text_encoders(with_source(catalog, "text-encoder-sd15", folder=folder), "text-encoder-sd15", "cpu")


def test_a_folder_with_fp16_variants_alone(catalog: Catalog, folder: Path) -> None:
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    half = catalog
    for component in LOADERS:
        half = with_source(half, component, folder=folder)
    params = GenerationParams(model_name="SD1.5", **SMALL)
    expected = np.asarray(Text2Image(catalog).generate(params).image)
    assert np.array_equal(np.asarray(Text2Image(half).generate(params).image), expected)
    edit(folder / UNET.replace(".safetensors", ".fp16.safetensors"), lambda state: state.pop("conv_in.weight"))
    with pytest.raises(
        WeightsError, match=r"file unet/diffusion_pytorch_model\.fp16\.safetensors: tensor conv_in\.weight"
    ):
        load_engine(half, "unet-sd15", "cpu")


@pytest.fixture(scope="module")
def original(tiny_models: Path) -> dict[str, torch.Tensor]:
    """The tiny SD1.5 as one checkpoint."""
    return original_layout.of_folder(tiny_models / "sd15")


def single(catalog: Catalog, component: str, path: Path, tiny_models: Path) -> Catalog:
    source: dict[str, Any] = {"checkpoint": path, "configuration": {"folder": tiny_models / "sd15"}}
    return with_source(catalog, component, **source)


CHECKPOINT_KEYS = {
    "unet-sd15": ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight"),
    "vae-sd15": ("first_stage_model.decoder.conv_in.weight", "decoder.conv_in.weight"),
    "text-encoder-sd15": (
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
        "encoder.layers.1.mlp.fc1.weight",
    ),
}


@pytest.mark.parametrize("harm", ["missing", "mis-shaped"])
@pytest.mark.parametrize("component", sorted(LOADERS))
def test_every_tensor_of_a_single_checkpoint(
    catalog: Catalog,
    original: dict[str, torch.Tensor],
    tiny_models: Path,
    tmp_path: Path,
    component: str,
    harm: str,
) -> None:
    key, name = CHECKPOINT_KEYS[component]
    state = dict(original)
    HARMS[harm][0](state, key)
    save_file(state, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match=rf"component {component}, file one\.safetensors: .*{name}"):
        LOADERS[component][0](single(catalog, component, tmp_path / "one.safetensors", tiny_models), component, "cpu")


@pytest.mark.parametrize(("content", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_named(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "one.safetensors").write_bytes(content)
    for component, (load, _) in LOADERS.items():
        with pytest.raises(WeightsError, match=rf"component {component}, file one\.safetensors: .*{said}"):
            load(single(catalog, component, tmp_path / "one.safetensors", tiny_models), component, "cpu")


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((), ("epsilon", False)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_marks_of_the_schedule_in_a_checkpoint_are_honoured(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, marks: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    save_file({"some.weight": torch.zeros(1)} | {mark: torch.zeros(1) for mark in marks}, tmp_path / "one.safetensors")
    marked = single(catalog, "unet-sd15", tmp_path / "one.safetensors", tiny_models)
    config = {"prediction_type": "epsilon"} | read_config(marked.component("unet-sd15"), "scheduler")
    assert (config["prediction_type"], config.get("rescale_betas_zero_snr", False)) == expected


@pytest.mark.parametrize(("component", "file"), [("unet-sd15", UNET), ("vae-sd15", VAE), ("text-encoder-sd15", TEXT)])
def test_a_file_that_is_written_over_changes_nothing_that_is_loaded(
    catalog: Catalog, folder: Path, component: str, file: str
) -> None:
    """Loaders hand out the mapped file itself: one that is cut would end the process, one that hangs stop it."""
    spec = with_source(catalog, component, folder=folder).component(component)
    models: dict[str, Any] = {"unet-sd15": UNet2DConditionModel, "vae-sd15": AutoencoderKL}
    if component in models:
        loaded = load_model(models[component], spec, "cpu")
    else:
        ((_, _, loaded),) = load_text_models(spec, "cpu")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    size = (folder / file).stat().st_size
    with (folder / file).open("r+b") as written:
        written.write(b"\xff" * size)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name
