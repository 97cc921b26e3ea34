"""Names and shapes of adapters as trainers write them, for the layers of a published model, without weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.support import original_layout, published_shapes

Shapes = dict[str, tuple[int, ...]]
Factors = Callable[[tuple[int, ...]], Shapes]
Spell = Callable[[str, str], str]

RANK = 8


def lora(weight: tuple[int, ...]) -> Shapes:
    """kohya's pair and alpha; a convolution's up factor is 1x1."""
    out, into, *kernel = weight
    return {
        "lora_down.weight": (RANK, into, *kernel),
        "lora_up.weight": (out, RANK, *[1] * len(kernel)),
        "alpha": (),
    }


def tucker(weight: tuple[int, ...]) -> Shapes:
    """LyCORIS' LoCon: a convolution has a factor in the middle."""
    out, into, *kernel = weight
    if not kernel:
        return lora(weight)
    down, up = (RANK, into, 1, 1), (out, RANK, 1, 1)
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": (RANK, RANK, *kernel), "alpha": ()}


def dora(weight: tuple[int, ...]) -> Shapes:
    return lora(weight) | {"dora_scale": (weight[0], *[1] * (len(weight) - 1))}


def loha(weight: tuple[int, ...]) -> Shapes:
    out, into, *kernel = weight
    for size in kernel:
        into *= size
    pairs = {"hada_w1_a": (out, RANK), "hada_w1_b": (RANK, into), "hada_w2_a": (out, RANK), "hada_w2_b": (RANK, into)}
    return {**pairs, "alpha": ()}


def lokr(weight: tuple[int, ...]) -> Shapes:
    out, into, *kernel = weight
    second = {"lokr_w2_a": (out // 8, RANK), "lokr_w2_b": (RANK, into // 8)}
    if kernel:
        second = {"lokr_w2": (out // 8, into // 8, *kernel)}
    return {"lokr_w1": (8, 8), **second, "alpha": ()}


def oft(weight: tuple[int, ...]) -> Shapes:
    return {"oft_blocks": (weight[0] // 8, 8, 8), "alpha": ()}


def peft_lora(weight: tuple[int, ...]) -> Shapes:
    return {name.replace("down", "A").replace("up", "B"): shape for name, shape in lora(weight).items() if shape}


def peft_dora(weight: tuple[int, ...]) -> Shapes:
    return peft_lora(weight) | {"lora_magnitude_vector": (weight[0],)}


def peft_oft(weight: tuple[int, ...]) -> Shapes:
    return {"oft_R.weight": (weight[1] // 32, 32 * 31 // 2)}


def peft_boft(weight: tuple[int, ...]) -> Shapes:
    return {"boft_R": (2, weight[1] // 32, 32, 32), "boft_s": (weight[0], 1)}


def old_pair(weight: tuple[int, ...]) -> Shapes:
    """diffusers before PEFT."""
    return {"down.weight": (RANK, weight[1]), "up.weight": (weight[0], RANK)}


def kohya(part: str, module: str) -> str:
    """kohya for SD, OneTrainer and others: diffusers' names, flat."""
    return f"{_FLAT[part]}_{module.replace('.', '_')}."


def kohya_te1(part: str, module: str) -> str:
    return kohya(part, module).replace("lora_te_", "lora_te1_")


def kohya_original(part: str, module: str) -> str:
    """kohya for SDXL: the original's names, flat."""
    if part == "unet":
        every = set(published_shapes.unet("sdxl"))
        named = original_layout.unet_name(f"{module}.weight", every, published_shapes.LAYERS_PER_BLOCK)
        module = named.removesuffix(".weight")
    return kohya_te1(part, module)


def dotted(part: str, module: str) -> str:
    return f"{part}.{module}."


def bare(part: str, module: str) -> str:
    return f"{module}."


def comfy(part: str, module: str) -> str:
    """Tools that wrap ComfyUI's own model: the original's names behind `diffusion_model`."""
    every = set(published_shapes.unet("sdxl"))
    named = original_layout.unet_name(f"{module}.weight", every, published_shapes.LAYERS_PER_BLOCK)
    return f"diffusion_model.{named.removesuffix('weight')}"


def whole_peft(part: str, module: str) -> str:
    """A PEFT model saved as a whole."""
    return f"base_model.model.{module}."


def lycoris(part: str, module: str) -> str:
    return f"lycoris_{module.replace('.', '_')}."


def processors(part: str, module: str) -> str:
    attention, _, leaf = module.removesuffix(".0").rpartition(".")
    return f"{part}.{attention}.processor.{leaf}_lora."


def oldest(part: str, module: str) -> str:
    return processors(part, module).removeprefix("unet.")


_FLAT = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}

ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)$"
EVERYTHING = r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|conv[12]|time_emb_proj)$"
TEXT = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"


def layers(base: Any, pattern: str = ATTENTION, parts: tuple[str, ...] = ("unet",)) -> Iterator[tuple[str, str, Any]]:
    """Part, module and shape of the weight of each layer to adapt."""
    for part in parts:
        state = published_shapes.unet(base) if part == "unet" else published_shapes.text_encoder(base, part)
        wanted = re.compile(pattern if part == "unet" else TEXT)
        for name, tensor in state.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and wanted.search(module):
                yield part, module, tuple(tensor.shape)


def adapter(base: Any, spell: Spell, factors: Factors, **which: Any) -> Shapes:
    """Every tensor of an adapter for a base, by name."""
    return {
        f"{spell(part, module)}{leaf}": shape
        for part, module, weight in layers(base, **which)
        for leaf, shape in factors(weight).items()
    }


def without(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not re.search(pattern, name)}
