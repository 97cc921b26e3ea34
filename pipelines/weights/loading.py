"""Catalog components -> modules: from a folder, the hub, or a single checkpoint. Safetensors only, revisions pinned."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.catalog import ROOT, Catalog, ComponentSpec
from config.sources import CheckpointSource, HubSource
from pipelines.adapters.formats import read_lora
from pipelines.adapters.rows import RowLora
from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.control.annotators import Annotators
from pipelines.control.nets import ControlNets
from pipelines.engine.engine import StepEngine
from pipelines.engine.memory import RowBudget
from pipelines.errors import WeightsError
from pipelines.families import FAMILIES
from pipelines.pictures.vae import VAE
from pipelines.sampling.latents import LatentSpace
from pipelines.text.encoders import TextEncoder, TextEncoderStack
from pipelines.weights.sources import fetch

Device = Literal["cpu", "cuda"]
_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """`auto` is CUDA where torch sees a GPU."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(spec: ComponentSpec, device: Device) -> torch.dtype:
    dtype = torch.float32 if device == "cpu" else getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def _explained(spec: ComponentSpec) -> Iterator[None]:
    """Turn what loaders raise into a WeightsError that names the component."""
    try:
        yield
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"component {spec.id}: cannot load {spec.source}: {error}") from error


def _folders(spec: ComponentSpec) -> list[str]:
    """Folders of a source that a component reads."""
    if spec.kind == "text_encoder":
        return [f"{part}{suffix}" for suffix in _encoder_suffixes(spec) for part in ("text_encoder", "tokenizer")]
    weights = spec.kind if spec.subfolder is None else spec.subfolder
    return [weights, "scheduler"] if spec.kind == "unet" else [weights]


def _encoder_suffixes(spec: ComponentSpec) -> list[str]:
    return ["", "_2"] if spec.family == "sdxl" else [""]


def _patterns(spec: ComponentSpec, variant: str | None) -> list[str]:
    """Files of a hub repository that a component needs: configuration, tokenizers, and the weights of one variant."""
    stem = _STEMS[spec.kind]
    weights = [f"{stem}.{variant}*.safetensors"] if variant else [f"{stem}.safetensors", f"{stem}-*.safetensors"]
    return [f"{f}/{p}".lstrip("/") for f in _folders(spec) for p in ("*.json", "merges.txt", *weights)]


def locate(spec: ComponentSpec) -> Path:
    """The local folder of a component's source, of a checkpoint its configuration's; raises WeightsError."""
    source = spec.source.configuration if isinstance(spec.source, CheckpointSource) else spec.source
    variant = source.variant if isinstance(source, HubSource) else None
    return fetch(f"component {spec.id}", source, _patterns(spec, variant))


def read_config(spec: ComponentSpec, folder: str | None = None) -> dict[str, Any]:
    """A component's `config.json` (or the scheduler's), without its weights."""
    path = locate(spec) / (_folders(spec)[0] if folder is None else folder)
    name = "scheduler_config.json" if folder == "scheduler" else "config.json"
    with _explained(spec):
        config: dict[str, Any] = json.loads((path / name).read_text())
    return config


def _loading(spec: ComponentSpec, device: Device) -> dict[str, Any]:
    """Keyword arguments that every loader gets: never a pickle, always this variant and format."""
    variant = spec.source.variant if isinstance(spec.source, HubSource) else None
    return {"use_safetensors": True, "variant": variant, "dtype": _dtype(spec, device), "local_files_only": True}


def _checkpoint(spec: ComponentSpec) -> Path | None:
    if not isinstance(spec.source, CheckpointSource):
        return None
    path = spec.source.checkpoint
    return path if path.is_absolute() else ROOT / path


def load_model(model_class: Any, spec: ComponentSpec, device: Device) -> Any:
    """A component's module on its device, in the number format of its spec there."""
    folder, (subfolder, *_) = locate(spec), _folders(spec)
    with _explained(spec):
        if checkpoint := _checkpoint(spec):
            state = load_file(checkpoint)
            model = model_class.from_single_file(
                state, config=str(folder), subfolder=subfolder, dtype=_dtype(spec, device), local_files_only=True
            )
        else:
            model = model_class.from_pretrained(folder, subfolder=subfolder, **_loading(spec, device))
    return model.to(device)


def load_engine(
    catalog: Catalog, component_id: str, device: Device, max_rows: int = 16, strict: bool = False
) -> StepEngine:
    """A UNet component on the torch backend, in an engine ready for jobs."""
    denoiser = TorchDenoiser(load_model(UNet2DConditionModel, catalog.component(component_id), device))

    def fit(name: str, base: str) -> RowLora:
        return denoiser.lora_hooks.fit(load_lora(catalog, name, base, "unet"), denoiser.device, denoiser.dtype)

    return engine_over(denoiser, catalog, component_id, LoraStore(fit), max_rows, strict)


def engine_over(
    denoiser: Denoiser, catalog: Catalog, component_id: str, loras: LoraStore, max_rows: int, strict: bool
) -> StepEngine:
    """An engine for a UNet component on whatever backend."""
    spec = catalog.component(component_id)
    family = FAMILIES[spec.family]
    vae_config = read_config(catalog.component(catalog.vae_of(component_id)))
    space = LatentSpace.from_vae_config(vae_config, family.applies_latent_statistics)
    if denoiser.config["in_channels"] != space.channels:
        raise WeightsError(
            f"component {component_id} takes {denoiser.config['in_channels']} latent channels, "
            f"its VAE has {space.channels}"
        )
    scheduler = read_config(spec, "scheduler")
    fits = RowBudget(denoiser.config, denoiser.dtype, denoiser.device)
    return StepEngine(denoiser, family, scheduler, space, loras, None, max_rows, strict, fits)


def load_controlnets(catalog: Catalog, component_ids: Sequence[str], device: Device) -> ControlNets:
    """ControlNets of one UNet."""
    models = {}
    for component_id in component_ids:
        spec = catalog.component(component_id)
        models[component_id] = load_model(ControlNetUnionModel if spec.union else ControlNetModel, spec, device)
    return ControlNets(models, Annotators(catalog, device))


def load_lora(catalog: Catalog, name: str, base: str, part: str) -> RowLora:
    """The layers a LoRA has for one part (`unet`, `text_encoder`, `text_encoder_2`) of a base UNet's models."""
    spec, weights = catalog.component(base), catalog.lora_weights(name, base)
    folder = fetch(f"lora {name}", weights.source, [weights.file])
    try:
        return read_lora(folder / weights.file, name, part, read_config(spec) if spec.family == "sdxl" else None)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"lora {name}: cannot read {weights.file}: {error}") from error


def load_vae(catalog: Catalog, component_id: str, device: Device) -> VAE:
    """A VAE with its latent space.

    Raises:
        WeightsError: the catalog promises sizes that this VAE cannot make.
    """
    spec = catalog.component(component_id)
    vae = VAE(load_model(AutoencoderKL, spec, device), FAMILIES[spec.family])
    for model in catalog.models:
        if model.vae == component_id and model.size_multiple % vae.space.downscale:
            raise WeightsError(
                f"model {model.name}: its size_multiple {model.size_multiple} is no multiple of "
                f"{vae.space.downscale}, the downscale of {component_id}"
            )
    return vae


def load_text_encoders(catalog: Catalog, component_id: str, device: Device) -> TextEncoderStack:
    """A family's text encoders with their tokenizers."""
    spec = catalog.component(component_id)
    folder = locate(spec)
    checkpoint = _checkpoint(spec)
    encoders = []
    with _explained(spec):
        state = load_file(checkpoint) if checkpoint else None
        for suffix in _encoder_suffixes(spec):
            model_class = CLIPTextModelWithProjection if suffix else CLIPTextModel
            name = f"text_encoder{suffix}"
            if state is not None:
                model = create_diffusers_clip_model_from_ldm(
                    model_class, state, name, str(folder), _dtype(spec, device), local_files_only=True
                )
            else:
                model = model_class.from_pretrained(folder, subfolder=name, **_loading(spec, device))
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{suffix}", local_files_only=True)
            read = functools.partial(load_lora, catalog, part=name)
            encoders.append(TextEncoder(tokenizer, model.to(device), read))
    return TextEncoderStack(encoders, FAMILIES[spec.family])
