"""LoRA files of every common layout -> Adapter.

Three layouts are in use. diffusers' own converters bring each to PEFT's names, `<module>.lora_A.weight` (down) and
`<module>.lora_B.weight` (up); what differs is where the scale alpha / rank of a layer stands:

- PEFT, diffusers' training scripts: in the file's metadata;
- kohya's scripts: one alpha beside each layer;
- diffusers before PEFT (attention processors): nowhere, alpha is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipelines.adapters.layers import Adapter, LoraLayer
from pipelines.adapters.reading import LoraFile, read_file, refuse
from pipelines.diffusers_compat import rename_lora, text_encoder_lora_to_peft, unet_lora_to_peft

PARTS = ("unet", "text_encoder", "text_encoder_2")


class _Weights(NamedTuple):
    """The layers of one part of a file, in PEFT's names."""

    tensors: Mapping[str, torch.Tensor]
    scales: Mapping[str, float]
    """Module -> alpha / rank; 1 for a module that is not listed."""


def read_lora(path: Path, name: str, part: str, unet_config: Mapping[str, Any] | None) -> Adapter:
    """Read the layers of one model from a file.

    Args:
        path: a `.safetensors` file.
        name: public name, for messages.
        part: `unet`, `text_encoder` or `text_encoder_2`.
        unet_config: config of an SDXL UNet, whose blocks kohya counts differently; None for SD.

    Raises:
        InvalidValueError: another kind of adapter (DoRA, LoHa, LoKr, ...), a key that belongs to no LoRA, or nothing in
            it for a model of this family.
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
    """
    file = read_file(path, name)
    try:
        state, alphas = rename_lora(file.tensors, unet_config)
        own = _of_part(state, part, file.name, PARTS if unet_config is not None else PARTS[:2])
        if alphas is not None:
            weights = _from_kohya(own, part, alphas)
        elif any("lora_A" in key for key in own):
            weights = _from_peft(own, part, file)
        else:
            weights = _from_attention_processors(own, part)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise refuse(file.name, f"has keys that cannot be understood: {str(error).strip()[:200]}") from error
    return Adapter(file.name, _layers(weights, file.name))


def _of_part(
    state: Mapping[str, torch.Tensor], part: str, name: str, family_parts: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """The tensors of one part, without its prefix."""
    if not any(key.startswith(PARTS) for key in state):
        return dict(state) if part == "unet" else {}  # the oldest diffusers files name no part
    if strays := [key for key in state if key.partition(".")[0] not in PARTS]:
        raise refuse(name, f"has a key that belongs to no part of Stable Diffusion: {strays[0]}")
    if not any(key.partition(".")[0] in family_parts for key in state):
        raise refuse(name, f"has nothing for this model: its first key is {next(iter(state))}")
    prefix = f"{part}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _from_peft(state: Mapping[str, torch.Tensor], part: str, file: LoraFile) -> _Weights:
    """PEFT: names as they are; alpha beside the layer, else in the metadata's LoraConfig, else it is the rank."""
    config = {key.removeprefix(f"{part}."): value for key, value in file.config.items() if key.startswith(f"{part}.")}
    scales = {}
    for module, rank in _ranks(state).items():
        beside = file.alphas.get(f"{part}.{module}", file.alphas.get(module) if part == "unet" else None)
        alpha = (
            beside
            if beside is not None
            else config.get("alpha_pattern", {}).get(module, config.get("lora_alpha", rank))
        )
        scales[module] = float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return _Weights(state, scales)


def _from_kohya(state: Mapping[str, torch.Tensor], part: str, alphas: Mapping[str, float]) -> _Weights:
    """kohya: an alpha travels under the name of its down matrix, so that the converters rename both alike."""
    given = {
        key: torch.tensor(alphas[alpha])
        for key in state
        if key.endswith("down.weight") and (alpha := f"{part}.{key.split('.lora.')[0]}.alpha") in alphas
    }
    tensors, renamed = _to_peft_names(state, part), _to_peft_names(given, part)
    ranks = _ranks(tensors)
    return _Weights(tensors, {_module(key): float(alpha) / ranks[_module(key)] for key, alpha in renamed.items()})


def _from_attention_processors(state: Mapping[str, torch.Tensor], part: str) -> _Weights:
    """Diffusers before PEFT: `<attention>.processor.to_q_lora.down.weight` and the like, no alpha."""
    return _Weights(_to_peft_names(state, part), {})


def _layers(weights: _Weights, name: str) -> dict[str, LoraLayer]:
    """Module -> layer; every tensor must belong to one."""
    tensors = weights.tensors
    leftover = [key for key in tensors if ".lora_A.weight" not in key and ".lora_B.weight" not in key]
    if leftover:
        raise refuse(name, f"has a key that is not a LoRA weight: {leftover[0]}")
    return {
        module: LoraLayer(
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"], weights.scales.get(module, 1.0)
        )
        for module in _ranks(tensors)
    }


def _ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Module -> rank of its down matrix."""
    return {_module(key): tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key}


def _module(key: str) -> str:
    return key.partition(".lora_A.")[0]


def _to_peft_names(state: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    if not state:
        return {}
    return unet_lora_to_peft(state) if part == "unet" else text_encoder_lora_to_peft(state)
