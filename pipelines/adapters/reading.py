"""A LoRA file -> its tensors under the keys that diffusers' converters know, or a refusal that names file and key.

Trainers spell the same layer in many ways. What is only spelling is put right here; what is another kind of adapter, or
half of a layer, is refused before any converter sees it: those raise whatever they run into.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipelines.errors import InvalidValueError

logger = logging.getLogger(__name__)

OTHER_ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_controlnet": "Control-LoRA",
    ".w_norm": "LyCORIS norm",
    ".b_norm": "LyCORIS norm",
    ".diff_b": "full-difference",
    ".diff": "full-difference",
    ".on_input": "LyCORIS IA3",
    "ia3_l": "PEFT IA3",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    "lora_embedding_": "PEFT embedding",
    "vera_lambda": "VeRA",
}
"""What occurs in the keys of other kinds of adapters, and their names."""

HALVES = {
    ".lora_down.": ".lora_up.",
    ".lora_A.": ".lora_B.",
    "_lora.down.": "_lora.up.",
    ".lora.down.": ".lora.up.",
    ".lora_linear_layer.down.": ".lora_linear_layer.up.",
}
"""How the down matrix of a layer is spelt, and how its up matrix is."""

_SPELLINGS = (
    (re.compile(r"^base_model\.model\."), ""),  # a PEFT model saved as a whole
    (re.compile(r"^(unet|text_encoder|text_encoder_2)\.base_model\.model\."), r"\1."),
    (re.compile(r"\.lora_(A|B)\.[^.]+\.weight$"), r".lora_\1.weight"),  # the adapter's name: default, default_0
    (re.compile(r"text_model([._])text_model\1"), r"text_model\1"),
    (re.compile(r"^text_model\."), "text_encoder.text_model."),
    # OneTrainer names these as diffusers does; the converter of kohya's names knows them by the original's.
    (re.compile(r"^lora_unet_add_embedding_linear_1\."), "lora_unet_label_emb_0_0."),
    (re.compile(r"^lora_unet_add_embedding_linear_2\."), "lora_unet_label_emb_0_2."),
)


@dataclass(frozen=True)
class LoraFile:
    """A file's layers, complete and finite.

    Attributes:
        name: its public name and the file's, for messages.
        tensors: down and up matrices; kohya's alphas too.
        alphas: those that stand beside PEFT's keys, by `<part>.<module>`.
        config: PEFT's configuration from the metadata, with its keys `<part>.<setting>`.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    alphas: Mapping[str, float]
    config: Mapping[str, Any]


def refuse(name: str, reason: str) -> InvalidValueError:
    """The error of a LoRA that cannot be used; `name` is its public name and its file's."""
    return InvalidValueError(f"loras: {name} {reason}", "loras")


def read_file(path: Path, name: str) -> LoraFile:
    """Read and check a `.safetensors` file.

    Raises:
        InvalidValueError: another kind of adapter, half of a layer, no layer at all, or a key that belongs to none.
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
    """
    with safe_open(path, "pt") as file:
        raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a file is no mapping
        metadata = file.metadata() or {}
    name = f"'{name}'"
    state = {_spelt(key): tensor for key, tensor in raw.items() if not _is_bundled(key, name)}
    _refuse_other_adapters(state, name, path.name)
    name = f"{name} ({path.name})"
    state = _fold_mid(state, name)
    layers = _check_halves(state, name)
    for key, tensor in state.items():
        _check_tensor(key, tensor, name)
    alphas = {key: state.pop(f"{key}.alpha").item() for key in layers[".lora_A."] if f"{key}.alpha" in state}
    return LoraFile(name, state, alphas, _config(metadata, name))


def _check_tensor(key: str, tensor: torch.Tensor, name: str) -> None:
    """A factor is a matrix or a convolution with something in it, an alpha one number, and all of it finite."""
    fits = tensor.numel() == 1 if key.endswith(".alpha") else tensor.ndim in (2, 4) and tensor.numel() > 0
    if not fits:
        raise refuse(
            name, f"has {key} of shape {list(tensor.shape)}; a factor has 2 or 4 dimensions, an alpha is a number"
        )
    if not bool(tensor.isfinite().all()):
        raise refuse(name, f"has values that are not finite numbers: {key}")


def _spelt(key: str) -> str:
    for pattern, right in _SPELLINGS:
        key = pattern.sub(right, key)
    return key


def _is_bundled(key: str, name: str) -> bool:
    """OneTrainer puts trained embeddings beside the LoRA; prompts here have no words for them, as in diffusers."""
    if not key.startswith("bundle_emb"):
        return False
    logger.warning("lora %s brings an embedding, which is left out: %s", name, key)
    return True


def _refuse_other_adapters(keys: Iterable[str], name: str, file: str) -> None:
    for key in keys:
        for mark, kind in OTHER_ADAPTERS.items():
            if mark in key:
                reason = f"is a {kind} adapter (file {file}, key {key}), which is not supported; use a LoRA"
                raise refuse(name, reason)


def _fold_mid(state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """LyCORIS' Tucker form of a convolution, down `[r, in, 1, 1]`, mid `[s, r, k, k]`, up: mid goes into down."""
    folded = dict(state)
    for key in [key for key in state if ".lora_mid." in key]:
        mid, down_key = folded.pop(key), key.replace(".lora_mid.", ".lora_down.")
        down = folded.get(down_key)
        if down is None or mid.ndim != 4 or mid.shape[1] != down.shape[0]:
            raise refuse(name, f"has a middle factor without a down factor of its rank: {key}")
        rank = down.shape[0]
        alpha_key = key.replace(".lora_mid.weight", ".alpha")
        folded[down_key] = torch.einsum("srhw,ri->sihw", mid.float(), down.float().reshape(rank, -1)).contiguous()
        # alpha counts in ranks of the factor that is gone.
        folded[alpha_key] = folded.get(alpha_key, torch.tensor(float(rank))) * mid.shape[0] / rank
    return folded


def _check_halves(state: Mapping[str, torch.Tensor], name: str) -> dict[str, list[str]]:
    """Names of the layers of each spelling of `HALVES`; every key must belong to a complete one."""
    layers: dict[str, list[str]] = {down: [] for down in HALVES}
    known: set[str] = set()
    for down, up in HALVES.items():
        for key in state:
            for own, other in ((down, up), (up, down)):
                if own in key and key.endswith(".weight"):
                    if (wanted := key.replace(own, other)) not in state:
                        raise refuse(name, f"has half of a layer: {key} without {wanted}")
                    known.add(key)
            if down in key and key in known:
                layers[down].append(key.partition(down)[0])
    owners = {f"{layer}.alpha" for found in layers.values() for layer in found}
    if strays := [key for key in state if key not in known | owners]:
        raise refuse(name, f"has a key that is not a LoRA weight: {strays[0]}")
    if not known:
        raise refuse(name, "has no layers at all")
    return layers


def _config(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """PEFT's configuration; one that cannot be read is as if there were none, which PEFT's files of old had."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {str(key): value for key, value in config.items() if value is not None}
    except (ValueError, AttributeError) as error:
        logger.warning("lora %s: its metadata is left out, for it is no JSON object: %s", name, error)
        return {}
