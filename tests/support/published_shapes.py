"""Names and shapes of the tensors of published models, on the meta device: nothing here has weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipelines.weights.architectures import published
from tests.support import original_layout

State = dict[str, torch.Tensor]
LAYERS_PER_BLOCK = 2


@functools.cache
def unet(base: Any, channels: int = 4) -> State:
    """A UNet in diffusers' layout."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config({**published(base)["unet"], "in_channels": channels})
        return dict(model.half().state_dict())


@functools.cache
def vae(base: Any) -> State:
    with torch.device("meta"):
        return dict(AutoencoderKL.from_config(published(base)["vae"]).half().state_dict())


@functools.cache
def text_encoder(base: Any, part: str = "text_encoder") -> State:
    """A text encoder as its published file names it: with the level `text_model`."""
    model_class: Any = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    with torch.device("meta"):
        return original_layout.clip(model_class(CLIPTextConfig(**published(base)[part])).half().state_dict())


@functools.cache
def controlnet(base: Any, control_types: int | None = None) -> State:
    """A ControlNet of a base's UNet, or a union of several controls."""
    net_class: Any = ControlNetModel if control_types is None else ControlNetUnionModel
    config = dict(published(base)["controlnet" if control_types is None else "controlnet_union"])
    with torch.device("meta"):
        net = net_class.from_config(config | ({"num_control_type": control_types} if control_types else {}))
        return dict(net.half().state_dict())


def checkpoint(base: Any, channels: int = 4) -> State:
    """A whole checkpoint as its publisher names it, with what the publishers' files hold besides."""
    return dict(_checkpoint(base, channels))


@functools.cache
def _checkpoint(base: Any, channels: int) -> State:
    parts: dict[str, Mapping[str, torch.Tensor]] = {"unet": unet(base, channels), "vae": vae(base)}
    for part in original_layout.ENCODERS[base]:
        parts[part] = text_encoder(base, part)
    state = original_layout.checkpoint(base, parts, published(base))
    for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod"):
        state[name] = torch.empty(1000, device="meta")
    position_ids = torch.empty(1, 77, dtype=torch.int64, device="meta")
    for prefix in original_layout.ENCODERS[base].values():
        if prefix.endswith(".transformer."):
            state[f"{prefix}text_model.embeddings.position_ids"] = position_ids
        else:
            state[f"{prefix}logit_scale"] = torch.empty((), device="meta")
    return state


def with_average(state: State) -> State:
    """The same with a trainer's average of its UNet beside it, as v1-5-pruned has."""
    twins = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor.float()
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    return state | twins
