"""Catalog components -> modules: from a folder, the hub, or a single checkpoint. Safetensors only, revisions pinned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from config.catalog import ComponentSpec
from config.precision import Precision
from pipelines.diffusers_compat import clip_from_checkpoint, model_from_checkpoint
from pipelines.errors import WeightsError
from pipelines.weights.checkpoints import read_state
from pipelines.weights.checks import check_finite, check_loaded, check_tokenizer
from pipelines.weights.files import ComponentFiles, read_config
from pipelines.weights.vocabulary import clip_tokenizer

Device = Literal["cpu", "cuda"]


def load_model(model_class: Any, spec: ComponentSpec, device: Device, precision: Precision = "float32") -> Any:
    """A component's module on its device, in the number format of its spec there.

    Args:
        model_class: diffusers' class, such as `UNet2DConditionModel`.
        spec: the component; not a text encoder.
        device: where it computes; on a CPU the spec's format says nothing.
        precision: what it computes in on a CPU.

    Raises:
        WeightsError: the weights are missing, pickled or damaged, or a tensor of them is missing, of another shape or
            no part of the class.
    """
    files = ComponentFiles(spec)
    if files.checkpoint:
        where = files.check_checkpoint(files.checkpoint)
        config = read_config(spec)
        with files.explained(where):
            state = read_state(files.checkpoint, spec.kind, _dtype(spec, device))
            model, info = model_from_checkpoint(model_class, state, config)
    else:
        subfolder = files.folders[0]
        where = files.check_weights(subfolder)
        with files.explained(where):
            options = _options(files, subfolder, device)
            model, info = model_class.from_pretrained(files.root, subfolder=subfolder, **options)
    check_loaded(where, info)
    model = _owned(model.to(device))
    check_finite(where, model)
    if device == "cpu" and precision == "bfloat16":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.to(torch.bfloat16)  # one by one, so that the old ones go at once
        # Convolutions in bfloat16 take pictures so; a weight in another order would be reordered in each call.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _owned(model: nn.Module) -> nn.Module:
    """The module with tensors in this process' own memory.

    Loaders hand out tensors that are the mapped file: if its volume hangs, a forward pass waits for pages; if the file
    is written over, the weights change in the middle of a picture; if it is truncated, the process dies (WTS-9).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    return model


def load_text_models(spec: ComponentSpec, device: Device) -> Iterator[tuple[str, CLIPTokenizer, Any]]:
    """A text-encoder component's models, in order, each as its folder's name, its tokenizer and the module.

    Raises:
        WeightsError: as `load_model`, or a tokenizer's file is missing or knows words that the model does not.
    """
    files = ComponentFiles(spec)
    state = None
    if files.checkpoint:
        where = files.check_checkpoint(files.checkpoint)
        with files.explained(where):
            state = read_state(files.checkpoint, spec.kind, _dtype(spec, device))
    for suffix in files.suffixes:
        model_class: Any = CLIPTextModelWithProjection if suffix else CLIPTextModel
        name = f"text_encoder{suffix}"
        if state is not None:
            config = read_config(spec, name)
            with files.explained(where):
                model, info = clip_from_checkpoint(model_class, state, config)
        else:
            where = files.check_weights(name)
            with files.explained(where):
                model, info = model_class.from_pretrained(files.root, subfolder=name, **_options(files, name, device))
        check_loaded(where, info, text=True)
        check_finite(where, _owned(model.to(device)))
        yield name, _load_tokenizer(files, f"tokenizer{suffix}", model), model


def _load_tokenizer(files: ComponentFiles, subfolder: str, model: Any) -> CLIPTokenizer:
    if files.files is None:
        return clip_tokenizer(**read_config(files.spec, subfolder))
    check_tokenizer(files.what, files.root, subfolder)
    with files.explained(f"{files.what}, file {subfolder}"):
        tokenizer = CLIPTokenizer.from_pretrained(files.root, subfolder=subfolder, local_files_only=True)
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
