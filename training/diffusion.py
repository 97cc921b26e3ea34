"""The UNets: v-prediction on latents that were encoded once, conditioned by a frozen text tower."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from training.autoencoder import LATENT_CHANNELS
from training.pool import CaptionBank, Conditions, Pool
from training.text import WIDTH, ids

# clip_sample must be off: DDIM and DDPM would clip these latents.
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd_unet(context: int = WIDTH, **extra: object) -> UNet2DConditionModel:
    """A UNet over 16x16 latents, without attention at the outermost level."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=context,
        attention_head_dim=(4, 4, 5),
        **extra,
    )


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold a scale for each channel into the 1x1 convolutions around the latents, once.

    Afterwards the latents of `latents`' kind have mean 0 and variance 1 overall. A channel's deviation becomes the root
    of what it was, not 1: equalised, the detail channels would take 29/32 of the UNet's attention.
    Stable Diffusion's pipelines know one factor for all channels; this needs none.
    """
    mean = latents.float().mean((0, 2, 3))
    deviation = latents.float().std((0, 2, 3))
    divisor = deviation.sqrt() * deviation.mean().sqrt()
    divisor = divisor * ((deviation / divisor).square().mean()).sqrt()
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] /= divisor[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / divisor
    encode.bias[channels:] -= 2 * divisor.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= divisor[None, :, None, None]


def conditions_of_sd(tower: CLIPTextModel, tokenizer: CLIPTokenizer) -> Callable[[list[str]], Conditions]:
    """The SD UNet reads the tower's last hidden state."""

    def encode(texts: list[str]) -> Conditions:
        device = next(tower.parameters()).device
        return {"encoder_hidden_states": tower(input_ids=ids(tokenizer, texts).to(device)).last_hidden_state}

    return encode


@dataclass(frozen=True)
class Noised:
    """A training batch: latents at random times, and what the UNet is told.

    Attributes:
        rows: which pictures of the pool, `[n]`.
        latents, noise, noisy: `[n, channels, height, width]`.
        times: `[n]`, 0..999.
        context: `[n, tokens, width]`.
        added: SDXL's added conditions, or None.
    """

    rows: list[int]
    latents: Tensor
    noise: Tensor
    times: Tensor
    noisy: Tensor
    context: Tensor
    added: Conditions | None

    @property
    def velocity(self) -> Tensor:
        """What a v-predicting UNet should answer."""
        velocity: Tensor = DDIMScheduler(**NOISE).get_velocity(self.latents, self.noise, self.times)
        return velocity

    def ask(self, unet: nn.Module, **more: object) -> Tensor:
        """The UNet's answer."""
        answer: Tensor = unet(self.noisy, self.times, self.context, added_cond_kwargs=self.added, **more).sample
        return answer


def noised(
    pool: Pool, bank: CaptionBank, batch: int, device: torch.device, lean: float = 1.3, before: int = 1000
) -> Noised:
    """A random batch; times below `before`, leaning towards high noise, where objects and colours are decided."""
    rng = random.Random(int(torch.randint(2**31, (1,))))
    rows, latents = pool.batch(batch, rng)
    conditions = {name: value.to(device) for name, value in bank.rows(rows).items()}
    context = conditions.pop("encoder_hidden_states")
    latents = latents.to(device)
    # Evenly spread over 0..1 from a random start (Kingma et al. 2021, arXiv:2107.00630): less noise between batches.
    spread = (torch.rand(1) + torch.arange(batch) / batch) % 1
    times = ((before - 1) * (1 - spread**lean)).round().long().to(device)
    noise = torch.randn(latents.shape).to(device)
    noisy = DDIMScheduler(**NOISE).add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
    return Noised(rows, latents, noise, times, noisy, context, conditions or None)


def take_over(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load from `state` what `model` has by the same name in the same shape."""
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in state.items() if k in own and v.shape == own[k].shape})


CLEAREST = 4.0
"""Signal-to-noise ratio above which a time's weight falls: there most of the loss is noise nobody can foretell."""


def loss_of(unet: nn.Module, pool: Pool, bank: CaptionBank, batch: int, balance: Tensor | None = None) -> Tensor:
    """Mean of `losses` over a random batch, each time's by its weight in `balance` [1000] where that is given."""
    drawn = noised(pool, bank, batch, next(unet.parameters()).device)
    each = losses(unet, drawn)
    return (each if balance is None else each * balance.to(each.device)[drawn.times]).mean()


def losses(unet: nn.Module, drawn: Noised) -> Tensor:
    """Squared error of v for each row, at low noise as if of the picture alone: `[n]`.

    v's error is the picture's times SNR + 1; the factor is cut at CLEAREST + 1, in the manner of min-SNR (Hang et al.
    2023, arXiv:2303.09556), which weighs epsilon's error.
    """
    device = drawn.latents.device
    with torch.autocast(device.type, torch.bfloat16):
        answer = drawn.ask(unet)
    alphas: Tensor = DDIMScheduler(**NOISE).alphas_cumprod.to(device)[drawn.times]
    weight = ((CLEAREST + 1) * (1 - alphas)).clamp(max=1)  # SNR + 1 = 1 / (1 - alphas)
    return weight * (answer.float() - drawn.velocity).square().mean((1, 2, 3))


@torch.no_grad()
def balance(unet: nn.Module, pool: Pool, bank: CaptionBank, batches: int = 24, bins: int = 10) -> Tensor:
    """Weights of the 1000 times, mean 1: one over the root of the loss that a trained `unet` has there.

    At high noise most of the loss is what the caption leaves open, and drowns the rest. Karras et al. (2024,
    arXiv:2312.02696) divide by the loss itself; the root is half of that way, for backgrounds are decided there too.
    """
    torch.manual_seed(0)
    device = next(unet.parameters()).device
    drawn = [noised(pool, bank, 32, device, lean=1.0) for _ in range(batches)]
    each = torch.cat([losses(unet, few) for few in drawn]).cpu()
    part = torch.cat([few.times for few in drawn]).cpu() * bins // 1000
    means = torch.stack([each[part == number].mean() for number in range(bins)])
    curve = nn.functional.interpolate(means[None, None], 1000, mode="linear")[0, 0].rsqrt()
    return curve / curve.mean()
