"""Catalog components -> modules: from a folder, the hub, or a single checkpoint. Safetensors only, revisions pinned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.catalog import ComponentSpec
from pipelines.diffusers_compat import clip_from_checkpoint, model_from_checkpoint
from pipelines.errors import WeightsError
from pipelines.weights.checks import check_loaded, check_tokenizer
from pipelines.weights.files import ComponentFiles

Device = Literal["cpu", "cuda"]


def load_model(model_class: Any, spec: ComponentSpec, device: Device) -> Any:
    """A component's module on its device, in the number format of its spec there.

    Args:
        model_class: diffusers' class, such as `UNet2DConditionModel`.
        spec: the component; not a text encoder.
        device: a CPU computes in float32 whatever the spec says.

    Raises:
        WeightsError: the weights are missing, pickled or damaged, or a tensor of them is missing, of another shape or
            no part of the class.
    """
    files = ComponentFiles(spec)
    folder, subfolder = files.files.folder(), files.folders[0]
    if files.checkpoint:
        where = files.check_checkpoint(files.checkpoint)
        with files.explained(where):
            state = load_file(files.checkpoint)
            model = model_from_checkpoint(model_class, state, subfolder, folder, _dtype(spec, device), where)
    else:
        where = files.check_weights(subfolder)
        with files.explained(where):
            model, info = model_class.from_pretrained(folder, subfolder=subfolder, **_options(files, subfolder, device))
        check_loaded(where, info)
    return model.to(device)


def load_text_models(spec: ComponentSpec, device: Device) -> Iterator[tuple[str, CLIPTokenizer, Any]]:
    """A text-encoder component's models, in order, each as its folder's name, its tokenizer and the module.

    Raises:
        WeightsError: as `load_model`, or a tokenizer's file is missing or knows words that the model does not.
    """
    files = ComponentFiles(spec)
    folder = files.files.folder()
    state = None
    if files.checkpoint:
        where = files.check_checkpoint(files.checkpoint)
        with files.explained(where):
            state = load_file(files.checkpoint)
    for suffix in files.suffixes:
        model_class: Any = CLIPTextModelWithProjection if suffix else CLIPTextModel
        name = f"text_encoder{suffix}"
        if state is not None:
            with files.explained(where):
                model = clip_from_checkpoint(model_class, state, name, folder, _dtype(spec, device))
            unset = [key for key, tensor in model.state_dict().items() if tensor.is_meta]
            check_loaded(where, {"missing_keys": unset, "mismatched_keys": (), "unexpected_keys": ()})
        else:
            where = files.check_weights(name)
            with files.explained(where):
                model, info = model_class.from_pretrained(folder, subfolder=name, **_options(files, name, device))
            check_loaded(where, info, text=True)
        yield name, _load_tokenizer(files, folder, f"tokenizer{suffix}", model), model.to(device)


def _load_tokenizer(files: ComponentFiles, folder: Path, subfolder: str, model: Any) -> CLIPTokenizer:
    check_tokenizer(files.what, folder, subfolder)
    with files.explained(f"{files.what}, file {subfolder}"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=subfolder, local_files_only=True)
    if len(tokenizer) > model.config.vocab_size:
        raise WeightsError(
            f"{files.what}, file {subfolder}: its tokenizer knows {len(tokenizer)} words, "
            f"the text encoder {model.config.vocab_size}"
        )
    return tokenizer


def _dtype(spec: ComponentSpec, device: Device) -> torch.dtype:
    dtype = torch.float32 if device == "cpu" else getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _options(files: ComponentFiles, subfolder: str, device: Device) -> dict[str, Any]:
    """Keyword arguments that every loader gets: never a pickle, always this variant and format, and a full account."""
    return {
        "use_safetensors": True,
        "variant": files.variant_in(subfolder),
        "dtype": _dtype(files.spec, device),
        "local_files_only": True,
        "ignore_mismatched_sizes": True,  # so that the account names them; none is accepted
        "output_loading_info": True,
    }
