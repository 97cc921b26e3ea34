"""What a component takes of a GPU's memory, counted from its configuration: no weights, no download, no GPU."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from config.catalog import ARCHITECTURES, Catalog, ComponentSpec, Size
from pipelines.adapters.store import LORA_BYTES
from pipelines.engine.batching import BatchKey
from pipelines.engine.memory import USABLE, row_bytes
from pipelines.pictures.upscaling import TILE
from pipelines.spandrel_compat import esrgan, read_upscaler
from pipelines.torch_compat import PeakBytes
from pipelines.weights.files import ComponentFiles, read_config
from pipelines.weights.headers import read_header
from pipelines.weights.kinds.models import INPAINTING_CHANNELS

TOKENS = 77
"""Rows of a context: what CLIP reads at once."""
CONTEXT = 0.5e9
"""Bytes of a process's CUDA context and its libraries, outside of torch's allocator."""
TEXT_LORA_BYTES = LORA_BYTES // 4
"""LoRAs of a text encoder: their text parts are some fraction of their UNet parts, which `LORA_BYTES` bounds."""
TEXT_WORK = 0.1e9
"""One text through the largest encoder."""
DECODING_SHARE = 0.8
"""Share of a VAE's memory that activations may take; one that runs out goes on in tiles."""
UNCOUNTED_TILE = 2e9
"""One tile of an upscaler whose activations cannot be counted without computing, such as a transformer's."""
ANNOTATORS = 0.6e9
"""The annotators of depth, openpose and softedge in float32, loaded when a photo first needs them."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one component.

    Attributes:
        weights: what it holds for as long as it runs.
        kept: what it may keep besides: LoRAs, annotators.
        work: what computing takes at most, rows of a tick not counted.
        row: what each row of a tick takes at most; 0 where there are no ticks.
        largest: the size of the pictures that was counted with, None where it does not matter.
    """

    weights: float
    kept: float = 0
    work: float = 0
    row: float = 0
    largest: Size | None = None


def footprint(catalog: Catalog, spec: ComponentSpec) -> Footprint:
    """What a component takes in its catalog, at the largest of the sizes that its models list or default to.

    Raises:
        WeightsError: its configuration is in a folder that is not there.
        ValueError: it is on the hub, and the catalog does not say its architecture.
    """
    if spec.kind == "upscaler":
        return _upscaler_bytes(spec)
    weights = sum(parameters(spec)) * _dtype(spec, configurations(spec)[0]).itemsize
    match spec.kind:
        case "text_encoder":
            return Footprint(weights, TEXT_LORA_BYTES, TEXT_WORK)
        case "vae":
            size = _largest(catalog, spec.id)
            return Footprint(weights, 0, decoding_bytes(spec, size) / DECODING_SHARE, largest=size)
        case "controlnet":
            # It is the way down of its UNet, whose row is the larger.
            row, size = _row(catalog, catalog.component(str(spec.base)))
            return Footprint(weights, ANNOTATORS if catalog.annotators else 0, 0, row, size)
    row, size = _row(catalog, spec)
    refines = any(model.refiner == spec.id for model in catalog.models)
    return Footprint(weights, 0 if refines else LORA_BYTES, 0, row, size)


def together(footprints: Iterable[Footprint], rows: int) -> float:
    """Bytes of a process that hosts several components, of which one computes at a time, with so many rows a tick."""
    parts = list(footprints)
    kept = max((part.kept for part in parts), default=0)
    work = max((part.work + rows * part.row for part in parts), default=0)
    return CONTEXT + sum(part.weights for part in parts) + kept + work


def parameters(spec: ComponentSpec) -> list[int]:
    """Number of parameters of each model of a component."""
    return [_parameters(spec.kind, spec.union, json.dumps(config)) for config in configurations(spec)]


@functools.cache
def _parameters(kind: str, union: bool, config: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _model(kind, union, json.loads(config)).parameters())


def configurations(spec: ComponentSpec) -> list[Mapping[str, Any]]:
    """`config.json` of each model of a component: of its architecture where the catalog says it, else its own."""
    names = ["controlnet_union"] if spec.union else [spec.kind]
    if spec.kind == "text_encoder":
        names = [f"text_encoder{suffix}" for suffix in ComponentFiles(spec).suffixes]
    if spec.architecture is not None:
        folder = ARCHITECTURES / spec.architecture
        published = [json.loads((folder / name / "config.json").read_text()) for name in names]
        return [config | {"in_channels": INPAINTING_CHANNELS} for config in published] if spec.inpainting else published
    if ComponentFiles(spec).on_hub:
        raise ValueError(f"component {spec.id} is on the hub: say its architecture in the catalog, to know its size")
    return [read_config(spec, name if spec.kind == "text_encoder" else None) for name in names]


def _upscaler_bytes(spec: ComponentSpec) -> Footprint:
    """Weights and one tile of an upscaler in float32: some compute in nothing less. One on the hub is as ESRGAN."""
    files = ComponentFiles(spec)
    if files.on_hub:
        with torch.device("meta"):
            state = esrgan()().state_dict()
    else:
        tensors = read_header(files.upscaler).tensors
        state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    weights = 4 * sum(tensor.numel() for tensor in state.values())
    try:
        with torch.device("meta"), torch.inference_mode():
            model = read_upscaler(state)
            with PeakBytes() as counted:
                model(torch.empty(1, 3, TILE, TILE))
    except (RuntimeError, NotImplementedError):  # it asks its tensors for numbers
        return Footprint(weights, 0, UNCOUNTED_TILE)
    return Footprint(weights, 0, counted.peak)


def decoding_bytes(spec: ComponentSpec, size: Size) -> int:
    """Bytes that a VAE holds at the peak of decoding one picture, weights not counted."""
    (config,) = configurations(spec)
    return _decoding_bytes(json.dumps(config), _dtype(spec, config), size.height, size.width)


@functools.cache
@torch.inference_mode()
def _decoding_bytes(config: str, dtype: torch.dtype, height: int, width: int) -> int:
    parsed = json.loads(config)
    with torch.device("meta"):
        vae = _model("vae", False, parsed)
        for parameter in vae.parameters():  # `.to(dtype)` would warn about modules kept in float32, of which none are
            parameter.data = parameter.data.to(dtype)
        scale = _downscale(parsed)
        latents = torch.empty(1, parsed["latent_channels"], height // scale, width // scale, dtype=dtype)
        with PeakBytes() as counted:
            vae.decode(latents)
    return int(counted.peak)


def _dtype(spec: ComponentSpec, config: Mapping[str, Any]) -> torch.dtype:
    """Number format on a GPU. SDXL's own VAE is turned to float32; the catalog knows whether it is another one."""
    own = spec.kind == "vae" and spec.family == "sdxl" and spec.architecture is None
    dtype = torch.float32 if own and config.get("force_upcast", True) else getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _downscale(vae: Mapping[str, Any]) -> int:
    """Pixels of a side for each latent of it."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def _row(catalog: Catalog, unet: ComponentSpec) -> tuple[float, Size]:
    """Bytes of one row of a UNet's tick at its largest size, of which memory must keep a reserve, and the size."""
    (config,) = configurations(unet)
    (vae,) = configurations(catalog.component(catalog.vae_of(unet.id)))
    scale = _downscale(vae)
    size = _largest(catalog, unet.id)
    return _row_bytes(json.dumps(config), unet.dtype, size.height // scale, size.width // scale) / USABLE, size


@functools.cache
def _row_bytes(config: str, dtype: str, height: int, width: int) -> int:
    parsed = json.loads(config)
    key = BatchKey((parsed["in_channels"], height, width), (TOKENS, parsed["cross_attention_dim"]))
    return row_bytes(parsed, getattr(torch, dtype), key)


def _largest(catalog: Catalog, component_id: str) -> Size:
    """The largest picture that the models of a component list or default to."""
    models = [model for model in catalog.models if component_id in model.components]
    sizes = [size for model in models for size in (*model.sizes, model.default_size)]
    return max(sizes, key=lambda size: size.width * size.height)


def _model(kind: str, union: bool, config: Mapping[str, Any]) -> Any:
    """The module that a configuration describes, on whatever device is the default."""
    if kind == "text_encoder":
        projects = "CLIPTextModelWithProjection" in config.get("architectures", ())
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(CLIPTextConfig(**config))
    plain = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}
    model_class: Any = ControlNetUnionModel if union else plain[kind]
    return model_class.from_config(dict(config))
