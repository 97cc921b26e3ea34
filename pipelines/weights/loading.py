"""Catalog components -> modules: from a folder, the hub, or a single checkpoint. Safetensors only, revisions pinned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.catalog import ComponentSpec
from pipelines.diffusers_compat import clip_from_checkpoint
from pipelines.weights.files import ComponentFiles

Device = Literal["cpu", "cuda"]


def load_model(model_class: Any, spec: ComponentSpec, device: Device) -> Any:
    """A component's module on its device, in the number format of its spec there.

    Args:
        model_class: diffusers' class, such as `UNet2DConditionModel`.
        spec: the component; not a text encoder.
        device: a CPU computes in float32 whatever the spec says.

    Raises:
        WeightsError: the weights are missing, pickled or do not fit the class.
    """
    files = ComponentFiles(spec)
    folder, subfolder = files.files.folder(), files.folders[0]
    with files.explained():
        if files.checkpoint:
            state = load_file(files.checkpoint)
            model = model_class.from_single_file(
                state, config=str(folder), subfolder=subfolder, dtype=_dtype(spec, device), local_files_only=True
            )
        else:
            model = model_class.from_pretrained(folder, subfolder=subfolder, **_options(files, device))
    return model.to(device)


def load_text_models(spec: ComponentSpec, device: Device) -> Iterator[tuple[str, CLIPTokenizer, Any]]:
    """A text-encoder component's models, in order, each as its folder's name, its tokenizer and the module.

    Raises:
        WeightsError: the weights are missing, pickled or not CLIP's.
    """
    files = ComponentFiles(spec)
    folder = files.files.folder()
    with files.explained():
        state = load_file(files.checkpoint) if files.checkpoint else None
    for suffix in files.suffixes:
        model_class: Any = CLIPTextModelWithProjection if suffix else CLIPTextModel
        name = f"text_encoder{suffix}"
        with files.explained():
            if state is not None:
                model = clip_from_checkpoint(model_class, state, name, folder, _dtype(spec, device))
            else:
                model = model_class.from_pretrained(folder, subfolder=name, **_options(files, device))
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=f"tokenizer{suffix}", local_files_only=True)
        yield name, tokenizer, model.to(device)


def _dtype(spec: ComponentSpec, device: Device) -> torch.dtype:
    dtype = torch.float32 if device == "cpu" else getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _options(files: ComponentFiles, device: Device) -> dict[str, Any]:
    """Keyword arguments that every loader gets: never a pickle, always this variant and format."""
    dtype = _dtype(files.spec, device)
    return {"use_safetensors": True, "variant": files.variant, "dtype": dtype, "local_files_only": True}
