"""An adapter file -> the parameters of its layers for one part of a pipeline, or a refusal that names file and key.

What is refused here breaks no tick later: another kind of adapter, half of a layer, values that are not finite.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.adapters.keys import PARTS, Key, read_key, unsupported_kind
from pipelines.errors import InvalidValueError
from pipelines.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)

Parameters = Mapping[str, torch.Tensor]
"""A layer's parameters by the names of `keys.py`."""

_COMPLETE: dict[str, tuple[tuple[str, ...], ...]] = {
    "down": (("up",),),
    "up": (("down",),),
    "mid": (("down",),),
    "up_bias": (("up",),),
    "dora_scale": (("down", "hada_w1_a", "lokr_w1", "lokr_w1_a"),),
    "magnitude": (("down",),),
    "hada_w1_a": (("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
    "hada_w1_b": (("hada_w1_a",),),
    "hada_w2_a": (("hada_w1_a",),),
    "hada_w2_b": (("hada_w1_a",),),
    "hada_t1": (("hada_t2",), ("hada_w1_a",)),
    "hada_t2": (("hada_t1",),),
    "lokr_w1": (("lokr_w2", "lokr_w2_a"),),
    "lokr_w2": (("lokr_w1", "lokr_w1_a"),),
    "lokr_w1_a": (("lokr_w1_b",), ("lokr_w2", "lokr_w2_a")),
    "lokr_w1_b": (("lokr_w1_a",),),
    "lokr_w2_a": (("lokr_w2_b",), ("lokr_w1", "lokr_w1_a")),
    "lokr_w2_b": (("lokr_w2_a",),),
    "lokr_t2": (("lokr_w2_a",),),
    "rescale": (("oft_blocks",),),
    "weight": (("on_input",),),
    "on_input": (("weight",),),
    "a1": (("a2",), ("b1",), ("b2",)),
    "a2": (("a1",),),
    "b1": (("a1",),),
    "b2": (("a1",),),
    "bm": (("a1",),),
    "alpha": (("down", "hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "a1", "diff"),),
}
"""Parameter -> what must stand beside it: one of each group."""


@dataclass(frozen=True)
class AdapterFile:
    """The layers that a file has for one part, complete and finite.

    Attributes:
        name: its public name and the file's, for messages.
        layers: name of a layer, with dots or flattened -> its parameters.
        config: PEFT's configuration of the part from the metadata.
    """

    name: str
    layers: Mapping[str, Parameters]
    config: Mapping[str, Any]


def refuse(name: str, reason: str) -> InvalidValueError:
    """The error of an adapter that cannot be used; `name` is its public name and its file's."""
    return InvalidValueError(f"loras: {name} {reason}", "loras")


def read_adapter(path: Path, name: str, part: str, family_parts: Sequence[str]) -> AdapterFile:
    """Read what a `.safetensors` file has for one model.

    Args:
        path: the file.
        name: public name, for messages.
        part: `unet`, `text_encoder` or `text_encoder_2`.
        family_parts: those that the pipelines of this family have.

    Raises:
        InvalidValueError: a kind of adapter that is not read, half of a layer, a key that belongs to none, or nothing
            in it for a model of this family.
        OSError: the file cannot be read.
        ValueError: it is damaged.
    """
    with TensorFile(path) as file:
        name = f"'{name}' ({path.name})"
        keys = {key: _read(key, name) for key in file.tensors if not _is_bundled(key, name)}
        own = _of_part(keys, part, family_parts, name)
        layers: dict[str, dict[str, torch.Tensor]] = {}
        spelt: dict[tuple[str, str], str] = {}
        for key, (_, layer, parameter) in own.items():
            if (layer, parameter) in spelt:
                raise refuse(name, f"has two keys for the same weight: {spelt[layer, parameter]} and {key}")
            spelt[layer, parameter] = key
            layers.setdefault(layer, {})[parameter] = _finite(key, file.read(key), name)
        config = _config(file.metadata, name)
    for (layer, parameter), key in spelt.items():
        _check_complete(key, parameter, layers[layer], name)
    prefix = f"{part}."
    return AdapterFile(
        name, layers, {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    )


def _read(key: str, name: str) -> Key:
    if kind := unsupported_kind(key):
        raise refuse(name, f"is a {kind} adapter (key {key}), which is not supported; use a LoRA")
    found = read_key(key)
    if found is None:
        raise refuse(name, f"has a key that is not a weight of a LoRA or a related adapter: {key}")
    return found


def _is_bundled(key: str, name: str) -> bool:
    """OneTrainer puts trained embeddings beside the LoRA; they are no part of it, as in diffusers."""
    if not key.startswith("bundle_emb"):
        return False
    logger.warning("lora %s contains an embedding, which is ignored: %s", name, key)
    return True


def _of_part(keys: Mapping[str, Key], part: str, family_parts: Sequence[str], name: str) -> dict[str, Key]:
    """The keys of one part; the oldest files of diffusers name none, and are for the UNet."""
    if not keys:
        raise refuse(name, "has no layers at all")
    if all(key.part is None for key in keys.values()):
        return dict(keys) if part == PARTS[0] else {}
    if stray := next((spelt for spelt, key in keys.items() if key.part is None), None):
        raise refuse(name, f"has a key that belongs to no part of Stable Diffusion: {stray}")
    if not any(key.part in family_parts for key in keys.values()):
        raise refuse(name, f"has nothing for this model: its first key is {next(iter(keys))}")
    return {spelt: key for spelt, key in keys.items() if key.part == part}


def _finite(key: str, tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.numel() == 0:
        raise refuse(name, f"has nothing in {key}, of shape {list(tensor.shape)}")
    if not bool(tensor.float().isfinite().all()):  # formats of 8 bits cannot say so themselves
        raise refuse(name, f"has values that are not finite numbers: {key}")
    return tensor


def _check_complete(key: str, parameter: str, beside: Parameters, name: str) -> None:
    for group in _COMPLETE.get(parameter, ()):
        if not any(other in beside for other in group):
            if parameter in ("alpha", "weight"):
                raise refuse(name, f"has a key that is not a LoRA weight: {key}")
            raise refuse(name, f"has half of a layer: {key} without its {' or '.join(group)}")


def _config(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """PEFT's configuration; one that cannot be read is as if there were none, which PEFT's files of old had."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {str(key): value for key, value in config.items() if value is not None}
    except (ValueError, AttributeError) as error:
        logger.warning("lora %s: its metadata is ignored, because it is not a JSON object: %s", name, error)
        return {}
