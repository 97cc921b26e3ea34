"""The SDXL shape out of the SD shape: every weight is carried over, so that it draws before it is trained further.

1024 px is the SD shape's 512 px seen twice as large: the autoencoder gets one more level at both ends, downscale 64,
and keeps its latents. The text encoders are the tower with a layer added, since SDXL reads the last layer but one; that
state lacks the tower's final norm, which a linear map inside the cross-attention makes up for. Pooled text and sizes
enter through weights that begin at zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import autoencoder
from training.diffusion import sd_unet
from training.pool import Conditions
from training.scenes import crop
from training.text import LAYERS, WIDTH, config, ids

TIME_WIDTH = 32
TIME_IDS = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)


def text_encoders(tower: CLIPTextModel, tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders; the added layers pass their input on, the second one's projection is the identity."""
    longer = config(tokenizer, LAYERS + 1)
    first, second = CLIPTextModel(longer), CLIPTextModelWithProjection(longer)
    for model, prefix in ((first, ""), (second, "text_model.")):
        state = {prefix + name: value for name, value in tower.state_dict().items()}
        if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
            raise RuntimeError(f"the tower has {unknown}, the longer one has not")
    with torch.no_grad():
        for layers in (first.encoder.layers, second.text_model.encoder.layers):
            for linear in (layers[LAYERS].self_attn.out_proj, layers[LAYERS].mlp.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.eye_(second.text_projection.weight)
    return first.eval(), second.eval()


def conditions_of_sdxl(first: CLIPTextModel, second: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> Any:
    """What the SDXL UNet reads: both encoders' last state but one, side by side, the pooled text and the sizes."""

    def encode(texts: list[str]) -> Conditions:
        tokens = ids(tokenizer, texts).to(next(first.parameters()).device)
        one = first(input_ids=tokens, output_hidden_states=True)
        two = second(input_ids=tokens, output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        sizes = torch.tensor([TIME_IDS], device=tokens.device).expand(len(texts), -1)
        return {"encoder_hidden_states": states, "text_embeds": two.text_embeds, "time_ids": sizes}

    return encode


@torch.no_grad()
def unet(sd: UNet2DConditionModel, tower: CLIPTextModel, tokens: Tensor) -> UNet2DConditionModel:
    """The SDXL UNet that draws what `sd` draws; `tokens` [n, positions] are typical, to fit the missing norm on."""
    output = tower(input_ids=tokens, output_hidden_states=True)
    before, after = output.hidden_states[-1].flatten(0, 1).double(), output.last_hidden_state.flatten(0, 1).double()
    ridge = 1e-4 * torch.eye(WIDTH, dtype=torch.double) * before.square().mean() * len(before)
    norm = torch.linalg.solve(before.T @ before + ridge, before.T @ after).T.float()  # after = norm @ before, nearly
    model = sd_unet(
        2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=len(TIME_IDS) * TIME_WIDTH + WIDTH,
    )
    state = dict(sd.state_dict())
    for name, weight in state.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            state[name] = (weight @ norm / 2).repeat(1, 2)
    missing = model.load_state_dict(state, strict=False)
    if missing.unexpected_keys or any("add_embedding" not in name for name in missing.missing_keys):
        raise RuntimeError(f"the shapes do not fit: {missing}")
    nn.init.zeros_(model.add_embedding.linear_2.weight)
    nn.init.zeros_(model.add_embedding.linear_2.bias)
    return model


@torch.no_grad()
def larger_autoencoder(small: AutoencoderKL) -> AutoencoderKL:
    """An autoencoder of twice `small`'s downscale around its levels: the new ones pass their input on at first."""
    large = autoencoder.build(64, 1024)
    state = large.state_dict()
    for name, value in small.state_dict().items():
        if name.startswith("encoder.conv_in"):
            continue
        parts = name.split(".")
        if parts[:2] == ["encoder", "down_blocks"]:
            parts[2] = str(int(parts[2]) + 1)
        state[".".join(parts)] = value
    large.load_state_dict(state)
    up = large.decoder.up_blocks[-2].upsamplers[0].conv
    nn.init.dirac_(up.weight)
    nn.init.zeros_(up.bias)
    for resnet in large.decoder.up_blocks[-1].resnets:
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    return large


def outer_levels(large: AutoencoderKL) -> list[nn.Module]:
    """What is new in `larger_autoencoder`'s result, and what is trained."""
    decoder = large.decoder
    outside = [decoder.up_blocks[-2].upsamplers[0], decoder.up_blocks[-1], decoder.conv_norm_out, decoder.conv_out]
    return [large.encoder.conv_in, large.encoder.down_blocks[0], *outside]


def loss_of(large: AutoencoderKL, small: AutoencoderKL, sprites: Tensor, pixels: int, batch: int) -> Tensor:
    """The large one must find the latents that `small` finds of the halved picture, and draw the picture from them."""
    device = next(large.parameters()).device
    pictures = torch.stack([crop(sprites, pixels, (960, 1100)) for _ in range(batch)]).to(device)
    with torch.no_grad():
        wanted: Tensor = small.encoder.conv_in(functional.avg_pool2d(pictures, 2))
        latents = small.encode(functional.avg_pool2d(pictures, 2)).latent_dist.mean
    found: Tensor = large.encoder.down_blocks[0](large.encoder.conv_in(pictures))
    error: Tensor = large.decode(latents).sample - pictures
    return (found - wanted).square().mean() + error.abs().mean() + 2 * error.square().mean()
