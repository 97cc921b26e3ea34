"""A layer is found by every name that files have for it: diffusers' and the original layout's, with dots or without."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from pipelines.adapters.keys import Key, read_key
from pipelines.adapters.module_names import ModuleNames, original_names

DEEP = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 8,
}
"""SD1.5's blocks; below, those of SDXL."""
WIDE = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}


def unet_of(config: dict[str, object]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.mark.parametrize("config", [DEEP, WIDE], ids=["SD1.5", "SDXL"])
def test_original_names_are_those_diffusers_reads(config: dict[str, object]) -> None:
    unet = unet_of(config)
    weights = unet.state_dict()
    names = original_names({key.rpartition(".")[0] for key in weights})
    checkpoint = {
        f"model.diffusion_model.{names[module]}.{leaf}": key
        for key in weights
        for module, _, leaf in [key.rpartition(".")]
    }
    config_of_file = dict(unet.config) | {"num_class_embeds": None}
    assert convert_ldm_unet_checkpoint(dict(checkpoint), config_of_file) == {key: key for key in weights}


@pytest.mark.parametrize("config", [DEEP, WIDE], ids=["SD1.5", "SDXL"])
def test_no_two_modules_share_a_name(config: dict[str, object]) -> None:
    unet = unet_of(config)
    names = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    places, originals = ModuleNames(names), original_names(names)
    for name in names:
        for spelt in (name, originals[name]):
            assert places.find(spelt) == places.find(spelt.replace(".", "_")) == name
    assert places.find("conv_in_") is None


def test_text_encoders_are_found_with_and_without_their_outer_level() -> None:
    for own in ("text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"):
        places = ModuleNames([own])
        for spelt in ("text_model.encoder.layers.0.mlp.fc1", "text_model_encoder_layers_0_mlp_fc1"):
            assert places.find(spelt) == own


KEYS: dict[str, Key | None] = {
    "lora_unet_mid_block_x.lora_down.weight": Key("unet", "mid_block_x", "down"),
    "lycoris_mid_block_x.lokr_w2_a": Key("unet", "mid_block_x", "lokr_w2_a"),
    "oft_unet_mid_block_x.oft_blocks": Key("unet", "mid_block_x", "oft_blocks"),
    "unet.mid_block.x.lora_A.weight": Key("unet", "mid_block.x", "down"),
    "unet.mid_block.x.lora.up.weight": Key("unet", "mid_block.x", "up"),
    "unet.mid.attn1.processor.to_out_lora.up.weight": Key("unet", "mid.attn1.to_out", "up"),
    "mid.attn1.processor.to_q_lora.down.weight": Key(None, "mid.attn1.to_q", "down"),
    "base_model.model.unet.conv_in.lora_B.default_0.weight": Key("unet", "conv_in", "up"),
    "diffusion_model.input_blocks.1.0.in_layers.2.lora_A.weight": Key("unet", "input_blocks.1.0.in_layers.2", "down"),
    "unet.conv_in.lora_magnitude_vector": Key("unet", "conv_in", "magnitude"),
    "unet.conv_in.lora_magnitude_vector.default.weight": Key("unet", "conv_in", "magnitude"),
    "unet.conv_in.hada_w1_a.default": Key("unet", "conv_in", "hada_w1_a"),
    "unet.conv_in.lora_B.bias": Key("unet", "conv_in", "up_bias"),
    "lora_te_text_model_x.alpha": Key("text_encoder", "text_model_x", "alpha"),
    "lora_te1_text_model_x.dora_scale": Key("text_encoder", "text_model_x", "dora_scale"),
    "lora_te2_text_model_x.diff_b": Key("text_encoder_2", "text_model_x", "diff_b"),
    "text_model.x.lora_A.weight": Key("text_encoder", "text_model.x", "down"),
    "text_encoder.a.self_attn.to_out_lora.down.weight": Key("text_encoder", "a.self_attn.out_proj", "down"),
    "text_encoder.a.self_attn.q_proj.lora_linear_layer.up.weight": Key("text_encoder", "a.self_attn.q_proj", "up"),
    "lora_unet_x.a1.weight": Key("unet", "x", "a1"),
    "lora_unet_x.weight": Key("unet", "x", "weight"),
    "lora_unet_x.bias": None,
    "lora_unet_x": None,
}


@pytest.mark.parametrize("spelt", KEYS)
def test_a_key_is_read(spelt: str) -> None:
    assert read_key(spelt) == KEYS[spelt]
