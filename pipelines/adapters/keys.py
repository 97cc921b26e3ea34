"""How trainers spell the keys of an adapter file: key -> part of the pipeline, layer, and which of its parameters.

kohya's scripts and LyCORIS flatten the name of a module (`lora_unet_down_blocks_0_...`), PEFT and diffusers keep its
dots, and each has other words for the same parameters.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PARTS = ("unet", "text_encoder", "text_encoder_2")

_PREFIXES = (
    (r"lora_unet_|lycoris_|oft_unet_|unet\.|diffusion_model\.|model\.diffusion_model\.", "unet"),
    (r"lora_te1?_|text_encoder\.", "text_encoder"),
    (r"lora_te2_|text_encoder_2\.", "text_encoder_2"),
)
_ENDINGS = (
    (
        r"\.lora_down\.weight|\.lora_A(?:\.[^.]+)?\.weight|\.lora(?:_linear_layer)?\.down\.weight|_lora\.down\.weight",
        "down",
    ),
    (r"\.lora_up\.weight|\.lora_B(?:\.[^.]+)?\.weight|\.lora(?:_linear_layer)?\.up\.weight|_lora\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.lora_B(?:\.[^.]+)?\.bias", "up_bias"),
    (r"\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(?:\.[^.]+){0,2}", "magnitude"),
    (r"\.(dora_scale|diff|diff_b|w_norm|b_norm|on_input|rescale|oft_blocks)", None),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.[^.]+)?", None),
    (r"\.(a1|a2|b1|b2|bm)\.weight", None),
    (r"\.(weight)", None),  # of LyCORIS' IA3, beside `on_input`
)
"""How a key ends, and the parameter; None for one that is called as it is spelt."""

_PREFIX = tuple((re.compile(pattern), part) for pattern, part in _PREFIXES)
_ENDING = tuple((re.compile(f"(?:{pattern})$"), name) for pattern, name in _ENDINGS)
_SPELLINGS = (
    (re.compile(r"^base_model\.model\."), ""),  # a PEFT model saved as a whole
    (re.compile(r"^(unet|text_encoder|text_encoder_2)\.base_model\.model\."), r"\1."),
    (re.compile(r"text_model([._])text_model\1"), r"text_model\1"),
    (re.compile(r"^text_model\."), "text_encoder.text_model."),
)
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Diffusers' names before PEFT for the attention of text encoders."""

UNSUPPORTED = {
    "lora_controlnet": "Control-LoRA",
    "lora_embedding_": "PEFT embedding",
    "vera_lambda": "VeRA",
    "ia3_l": "PEFT IA3",
    "oft_R": "PEFT OFT",
    "boft_": "PEFT BOFT",
    "lambda_layer": "T-LoRA",
}
"""What occurs in the keys of adapters that are not read, and their names."""


class Key(NamedTuple):
    """What a key of a file is about."""

    part: str | None
    """One of `PARTS`; None where the key names none."""
    layer: str
    """A module, with dots or flattened."""
    parameter: str


def read_key(spelt: str) -> Key | None:
    """A key of a file; None if no adapter's parameter is called so."""
    key = spelt
    for pattern, right in _SPELLINGS:
        key = pattern.sub(right, key)
    part = None
    for pattern, found in _PREFIX:
        if match := pattern.match(key):
            part, key = found, key[match.end() :]
            break
    for pattern, name in _ENDING:
        if match := pattern.search(key):
            parameter = name or next(group for group in match.groups() if group is not None)
            return Key(part, _layer(part, key[: match.start()]), parameter)
    return None


def unsupported_kind(key: str) -> str | None:
    """Name of the kind of adapter a key belongs to, if that is one that is not read."""
    return next((kind for mark, kind in UNSUPPORTED.items() if mark in key), None)


def _layer(part: str | None, name: str) -> str:
    """The module's name where diffusers before PEFT had another."""
    name = name.replace(".processor.", ".")
    owner, _, leaf = name.rpartition(".")
    if part in PARTS[1:] and owner.endswith("self_attn") and leaf in _OLD_TEXT_ATTENTION:
        return f"{owner}.{_OLD_TEXT_ATTENTION[leaf]}"
    return name
