"""Models of diffusers' under the names of the original releases: diffusers' single-file converters, backwards.

Works on tensors without memory too, so that whole published checkpoints can be named and measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    "controlnet_mid_block": "middle_block_out.0",
}


def unet(state: Mapping[str, torch.Tensor], layers_per_block: int) -> State:
    """A UNet's or ControlNet's tensors, without a prefix."""
    return {unet_name(name, set(state), layers_per_block): tensor for name, tensor in state.items()}


def unet_name(name: str, names: set[str], layers_per_block: int) -> str:
    """The original's name of a tensor, or of a module, of a UNet that has tensors of these names."""
    a_block = layers_per_block + 1
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        level, kind, index, rest = match.groups()
        return f"input_blocks.{1 + int(level) * a_block + int(index)}.{_inside(kind, rest)}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * a_block}.0.op{match[2]}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, index, rest = match.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_inside(kind, rest)[2:]}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        level, kind, index, rest = match.groups()
        return f"output_blocks.{int(level) * a_block + int(index)}.{_inside(kind, rest)}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv(.*)", name):
        place = 2 if any(other.startswith(f"up_blocks.{match[1]}.attentions.") for other in names) else 1
        return f"output_blocks.{int(match[1]) * a_block + layers_per_block}.{place}.conv{match[2]}"
    if match := re.match(r"controlnet_cond_embedding\.blocks\.(\d+)\.(.*)", name):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{match[2]}"
    if match := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    raise KeyError(name)


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return f"1.{rest}"
    layer, _, leaf = rest.rpartition(".")
    return f"0.{_RESNET[layer]}.{leaf}" if layer else f"0.{_RESNET[leaf]}"


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae(state: Mapping[str, torch.Tensor], levels: int) -> State:
    """An AutoencoderKL's tensors, without a prefix."""
    named = {}
    for name, tensor in state.items():
        match name.split("."):
            case [side, "down_blocks", level, "resnets", index, *leaf]:
                parts = [side, "down", level, "block", index, *leaf]
            case [side, "down_blocks", level, "downsamplers", "0", *leaf]:
                parts = [side, "down", level, "downsample", *leaf]
            case [side, "up_blocks", level, "resnets", index, *leaf]:
                parts = [side, "up", str(levels - 1 - int(level)), "block", index, *leaf]
            case [side, "up_blocks", level, "upsamplers", "0", *leaf]:
                parts = [side, "up", str(levels - 1 - int(level)), "upsample", *leaf]
            case [side, "mid_block", "resnets", index, *leaf]:
                parts = [side, "mid", f"block_{int(index) + 1}", *leaf]
            case [side, "mid_block", "attentions", "0", *leaf]:
                layer = ".".join(leaf[:-1])
                parts = [side, "mid", "attn_1", _VAE_ATTENTION[layer], leaf[-1]]
                if leaf[-1] == "weight" and layer != "group_norm":
                    tensor = tensor[:, :, None, None]  # a linear layer there is a 1x1 convolution here
            case parts:
                pass
        key = ".".join(parts).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        named[key] = tensor
    return named


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """A CLIP text model's tensors as OpenCLIP names them: queries, keys and values in one matrix."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    named = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        named["text_projection"] = state["text_projection.weight"].T.contiguous()
    for name in state:
        if match := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", name):
            layer, module, leaf = match.groups()
            if module in _OPEN_CLIP:
                named[f"transformer.resblocks.{layer}.{_OPEN_CLIP[module]}.{leaf}"] = state[name]
            elif module == "self_attn.q_proj":
                each = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                named[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(each)
    return named


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}


def clip(state: Mapping[str, torch.Tensor]) -> State:
    """A CLIP text model's tensors with the level `text_model` that transformers' newer classes drop."""
    outer = ("text_model.", "text_projection.")
    return {name if name.startswith(outer) else f"text_model.{name}": tensor for name, tensor in state.items()}


ENCODERS = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
ENCODERS |= {"ssd": ENCODERS["sdxl"], "sdxl-turbo": ENCODERS["sdxl"]}


def checkpoint(base: str, parts: Mapping[str, Mapping[str, torch.Tensor]], configs: Mapping[str, Any]) -> State:
    """A whole model as one checkpoint of its original release.

    Args:
        base: whose names the text encoders get.
        parts: tensors by the names of diffusers' folders.
        configs: each part's `config.json`.
    """
    state = prefixed("model.diffusion_model.", unet(parts["unet"], configs["unet"]["layers_per_block"]))
    state |= prefixed("first_stage_model.", vae(parts["vae"], len(configs["vae"]["block_out_channels"])))
    for part, prefix in ENCODERS[base].items():
        named = open_clip(parts[part]) if prefix.endswith(".model.") else clip(parts[part])
        state |= prefixed(prefix, named)
    return state


def of_folder(folder: Path, base: str | None = None) -> State:
    """A diffusers folder as one checkpoint."""
    configs, parts = {}, {}
    for part in folder.iterdir():
        if (part / "config.json").is_file():
            configs[part.name] = json.loads((part / "config.json").read_text())
            (weights,) = part.glob("*.safetensors")
            parts[part.name] = load_file(weights)
    return checkpoint(base or folder.name, parts, configs)
