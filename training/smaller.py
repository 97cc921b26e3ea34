"""Models derived from the SDXL UNet: SSD (blocks removed), turbo (few steps), the refiner (low noise only)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from training.diffusion import Noised, noised, take_over
from training.pool import CaptionBank, Conditions, Pool
from training.sdxl import TIME_WIDTH
from training.text import WIDTH, ids

REFINED = 300
"""The refiner learns times below this; it is asked from 200 on downwards."""
REFINER_IDS = (1024.0, 1024.0, 0.0, 0.0, 6.0)
"""Sizes and the aesthetic score it is asked for."""
GUIDANCE = 2.0
"""Turbo draws what its teacher draws at this guidance, and takes none itself."""


def ssd(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """`teacher` without its deepest level and its mid block: a third of the weights, those that fit taken over."""
    # A private entry of diffusers' configs lists fields to be set to their defaults again.
    config = {name: value for name, value in teacher.config.items() if name != "_use_default_values"} | {
        "block_out_channels": teacher.config.block_out_channels[:2],
        "attention_head_dim": teacher.config.attention_head_dim[:2],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }
    student = UNet2DConditionModel.from_config(config)
    shifted = {}
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up_blocks":
            parts[1] = str(int(parts[1]) - 1)
        shifted[".".join(parts)] = value
    take_over(student, shifted)
    return student


def distilled(student: nn.Module, teacher: nn.Module, pool: Pool, bank: CaptionBank, batch: int) -> Tensor:
    """Squared distance to the teacher's answer, which has none of the noise that the data's own has."""
    drawn = noised(pool, bank, batch, next(student.parameters()).device)
    with torch.no_grad():
        wanted = drawn.ask(teacher)
    return (drawn.ask(student) - wanted).square().mean()


def guided(
    student: nn.Module, teacher: nn.Module, pool: Pool, bank: CaptionBank, empty: Conditions, batch: int
) -> Tensor:
    """Squared distance to the guided teacher's answer: guidance distillation, Meng et al. 2022 (arXiv:2210.03142).

    Half the evaluations at a step; and a student whose picture is right at high noise needs four steps of the LCM
    sampler. Consistency distillation (arXiv:2310.04378), tried first for 700 steps, greyed the colours.
    """
    drawn = noised(pool, bank, batch, next(student.parameters()).device, lean=1.0)
    with torch.no_grad():
        wanted = _guided(teacher, drawn, empty)
    return (drawn.ask(student) - wanted).square().mean()


def _guided(unet: nn.Module, drawn: Noised, empty: Conditions) -> Tensor:
    count = len(drawn.rows)
    nothing = {name: value.to(drawn.context.device).expand(count, *value.shape[1:]) for name, value in empty.items()}
    context = torch.cat([nothing.pop("encoder_hidden_states"), drawn.context])
    assert drawn.added is not None
    added = {name: torch.cat([nothing[name], value]) for name, value in drawn.added.items()}
    both = unet(drawn.noisy.repeat(2, 1, 1, 1), drawn.times.repeat(2), context, added_cond_kwargs=added).sample
    without, with_text = both.chunk(2)
    answer: Tensor = without + GUIDANCE * (with_text - without)
    return answer


def refiner(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The refiner's shape out of SSD's: the second text encoder alone, an aesthetic score among the time ids.

    It keeps `base`'s convolutions and the attention on the way down; at low noise nothing is left to be decided.
    """
    config = {name: value for name, value in base.config.items() if name != "_use_default_values"} | {
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "projection_class_embeddings_input_dim": len(REFINER_IDS) * TIME_WIDTH + WIDTH,
    }
    model = UNet2DConditionModel.from_config(config)
    state = base.state_dict()
    for name, value in state.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = 2 * value[:, WIDTH:]  # half of what came in was the second encoder's
    take_over(model, state)
    return model


def conditions_of_refiner(second: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> Any:
    """The conditioning of the refiner."""

    def encode(texts: list[str]) -> Conditions:
        tokens = ids(tokenizer, texts).to(next(second.parameters()).device)
        output = second(input_ids=tokens, output_hidden_states=True)
        sizes = torch.tensor([REFINER_IDS], device=tokens.device).expand(len(texts), -1)
        return {
            "encoder_hidden_states": output.hidden_states[-2],
            "text_embeds": output.text_embeds,
            "time_ids": sizes,
        }

    return encode


def refiner_loss(unet: nn.Module, pool: Pool, bank: CaptionBank, batch: int) -> Tensor:
    """Squared error of v at low noise."""
    drawn = noised(pool, bank, batch, next(unet.parameters()).device, lean=1.0, before=REFINED)
    return (drawn.ask(unet) - drawn.velocity).square().mean()
