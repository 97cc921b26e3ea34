"""LoRA, row by row: files of every common layout -> RowLora, and hooks that add it to the rows that asked for it.

A LoRA is never merged into weights. Each row of a batch carries its own mixture, so that users of different LoRAs share
a tick, nothing has to be reloaded, and nothing drifts. W x + sum_i w_i * (alpha_i / rank_i) * B_i A_i x, Hu et al. 2021
(arXiv:2106.09685) equation 3, with the sum over the row's mixture.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import nn

from pipelines.cache import LruCache
from pipelines.errors import InvalidValueError
from pipelines.plan import StagePlan

PARTS = ("unet", "text_encoder", "text_encoder_2")
LORA_BYTES = 2**30
"""Default budget of a store: some ten SDXL adapters in half precision."""
REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_controlnet": "Control-LoRA",
}


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank pair of one module.

    Attributes:
        down: `[rank, in]`, or `[rank, in, k, k]` for a convolution.
        up: `[out, rank]`, or `[out, rank, 1, 1]`.
        scale: alpha / rank.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def apply(self, module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the output of `module` for `rows`, before the mixture's weight."""
        if isinstance(module, nn.Conv2d):
            hidden = nn.functional.conv2d(rows, self.down, stride=module.stride, padding=module.padding)
            return nn.functional.conv2d(hidden, self.up) * self.scale
        return nn.functional.linear(nn.functional.linear(rows, self.down), self.up) * self.scale


@dataclass(frozen=True)
class RowLora:
    """One adapter on one model: module name -> layer."""

    name: str
    layers: Mapping[str, LoraLayer]

    @property
    def nbytes(self) -> int:
        """Bytes its tensors hold."""
        return sum(t.nbytes for layer in self.layers.values() for t in (layer.down, layer.up))


Mixture = tuple[tuple[RowLora, float], ...]
"""The LoRAs of one row with their weights."""


def read_lora(path: Path, name: str, part: str, unet_config: Mapping[str, Any] | None) -> RowLora:
    """Read the layers of one model from a file in diffusers/PEFT, kohya or old diffusers layout.

    diffusers' own converters read the layouts; scales are taken per layer.

    Args:
        path: a `.safetensors` file.
        name: public name, for messages.
        part: `unet`, `text_encoder` or `text_encoder_2`.
        unet_config: config of an SDXL UNet, whose blocks kohya counts differently; None for SD.

    Raises:
        InvalidValueError: another kind of adapter (DoRA, LoHa, LoKr, ...).
    """
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for mark, kind in REFUSED.items():
        if any(mark in key for key in keys):
            raise InvalidValueError(f"loras: '{name}' is a {kind} adapter, which is not supported; use a LoRA", "loras")
    blocks = None if unet_config is None else SimpleNamespace(**unet_config)
    state, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path.parent), weight_name=path.name, unet_config=blocks, use_safetensors=True, local_files_only=True
    )
    prefix = f"{part}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if part == "unet" and not own and not any(key.startswith(PARTS) for key in state):
        own = state  # the oldest diffusers files name no part
    # An alpha travels under the name of its down matrix, so that the converters rename both alike.
    given = {
        key: torch.tensor(alphas[alpha])
        for key in own
        if key.endswith("down.weight") and (alpha := f"{prefix}{key.split('.lora.')[0]}.alpha") in (alphas or {})
    }
    convert = _convert_unet if part == "unet" else _convert_text_encoder
    weights, converted_alphas = convert(own), convert(given)
    layers = {}
    for key, down in weights.items():
        module, marker, _ = key.partition(".lora_A.")
        if not marker:
            continue
        rank = down.shape[0]
        given_alpha = converted_alphas.get(key)
        scale = _peft_scale(metadata, part, module, rank) if given_alpha is None else float(given_alpha) / rank
        layers[module] = LoraLayer(down, weights[f"{module}.lora_B.weight"], scale)
    leftover = [k for k in weights if ".lora_A.weight" not in k and ".lora_B.weight" not in k]
    if leftover:
        raise InvalidValueError(f"loras: '{name}' has a key that is no LoRA weight: {leftover[0]}", "loras")
    return RowLora(name, layers)


def _convert_unet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not state or any("lora_A" in key for key in state):
        return state
    converted: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(state)
    return converted


def _convert_text_encoder(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not state or any("lora_A" in key for key in state):
        return state
    # The converters tell a layout by its `to_out_lora`; a file without that layer needs the attention names mapped too.
    names = {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"}
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(f".{old}.", f".{new}.lora_linear_layer.")
        renamed[key] = value
    converted: dict[str, torch.Tensor] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(renamed))
    return converted


def _peft_scale(metadata: Mapping[str, Any], part: str, module: str, rank: int) -> float:
    """Alpha / rank as PEFT's LoraConfig in the file's metadata has it; 1 without one (alpha = rank)."""
    config = {k.removeprefix(f"{part}."): v for k, v in metadata.items() if k.startswith(f"{part}.")}
    if not config:
        return 1.0
    alpha = config.get("alpha_pattern", {}).get(module, config.get("lora_alpha", rank))
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


class RowLoraHooks:
    """Forward hooks on one model, which add each row's mixture to the modules it touches."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._hooked: set[str] = set()
        self._active: dict[str, list[tuple[LoraLayer, torch.Tensor, torch.Tensor]]] = {}

    def fit(self, lora: RowLora, device: torch.device, dtype: torch.dtype) -> RowLora:
        """The adapter with this model's module names, on its device.

        Raises:
            InvalidValueError: a layer fits no module of this model; the message names the first.
        """
        layers = {}
        for name, layer in lora.layers.items():
            # CLIPTextModel lost its `text_model.` level in transformers 5, CLIPTextModelWithProjection kept it.
            names = (name, name.removeprefix("text_model."), f"text_model.{name}")
            found = next((n for n in names if n in self._modules), None)
            shape = _shape_of(self._modules[found]) if found else None
            if found is None or shape != (layer.up.shape[0], layer.down.shape[1]):
                raise InvalidValueError(
                    f"loras: '{lora.name}' does not fit this model: its layer {name} "
                    f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)} meets {shape or 'no module'}",
                    "loras",
                )
            layers[found] = LoraLayer(layer.down.to(device, dtype), layer.up.to(device, dtype), layer.scale)
        return RowLora(lora.name, layers)

    @contextmanager
    def active(self, rows: Sequence[Mixture]) -> Iterator[None]:
        """Within the block, row i of every batch gets `rows[i]`.

        On the model's own thread: modules met for the first time are hooked here, never while the model runs.
        """
        by_adapter: dict[int, tuple[RowLora, list[tuple[int, float]]]] = {}
        for index, mixture in enumerate(rows):
            for lora, weight in mixture:
                by_adapter.setdefault(id(lora), (lora, []))[1].append((index, weight))
        for lora, uses in by_adapter.values():
            indices = torch.tensor([index for index, _ in uses])
            weights = torch.tensor([weight for _, weight in uses])
            for name, layer in lora.layers.items():
                if name not in self._hooked:
                    self._modules[name].register_forward_hook(self._hook(name))
                    self._hooked.add(name)
                self._active.setdefault(name, []).append((layer, indices.to(layer.up.device), weights.to(layer.up)))
        try:
            yield
        finally:
            self._active.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            for layer, index, weight in self._active.get(name, ()):
                addition = layer.apply(module, inputs[0][index])
                output = output.index_add(0, index, addition * weight.view(-1, *[1] * (addition.ndim - 1)))
            return output

        return add


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels
    return None


class LoraStore:
    """Loaded adapters of one model, the least recently used leaving when their bytes exceed the budget.

    Thread-safe: adapters are loaded off the engine's thread. A job holds its own reference, so one that leaves the
    store stays alive until its last job ends.
    """

    def __init__(self, load: Callable[[str, str], RowLora], max_bytes: int = LORA_BYTES) -> None:
        """Load by public name and base UNet with `load`, keep up to `max_bytes`."""
        self._load = load
        self.cache: LruCache[tuple[str, str], RowLora] = LruCache(max_bytes, lambda lora: lora.nbytes)
        self._lock = threading.Lock()

    def mixture(self, stage: StagePlan) -> Mixture:
        """The LoRAs of a stage, loaded now where they have to be."""
        return tuple((self._get(use.name, stage.component), use.weight) for use in stage.loras)

    def _get(self, name: str, base: str) -> RowLora:
        with self._lock:
            return self.cache.get((name, base)) or self.cache.put((name, base), self._load(name, base))
