"""The autoencoder: AutoencoderKL that divides width and height by 32 or 64, into 32 channels.

Sprites are smooth, so few latents carry a large picture, and the UNet's work is small. What makes it learn in minutes
is the start: every cell's mean colour is carried straight through, residual branches are silent, details come on top.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import Tensor, nn

from training.scenes import composite, crop
from training.words import HELD_OUT

LATENT_CHANNELS = 32
CHANNELS = {32: (8, 16, 32, 64, 96, 128), 64: (8, 8, 16, 32, 64, 96, 128)}


def build(downscale: int, sample_size: int) -> AutoencoderKL:
    """An untrained autoencoder that already passes mean colours."""
    channels = CHANNELS[downscale]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more groups over 8 channels would wipe out flat colour
        mid_block_add_attention=False,
        sample_size=sample_size,
        scaling_factor=1.0,
    )
    _pass_colours(vae)
    return vae


@torch.no_grad()
def _pass_colours(vae: AutoencoderKL) -> None:
    box = torch.zeros(3, 3)
    box[:2, :2] = 0.25  # diffusers pads right and below before it strides
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1.0
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                weight = module.conv_shortcut.weight
                kept = min(weight.shape[:2])
                weight[:kept] = 0
                weight[range(kept), range(kept)] = 1
                nn.init.zeros_(module.conv_shortcut.bias)
        elif isinstance(module, Downsample2D):
            _carry(module.conv, box)
        elif isinstance(module, Upsample2D):
            _carry(module.conv, centre)
    for coder in (vae.encoder, vae.decoder):
        _carry(coder.conv_in, centre)
        nn.init.normal_(coder.conv_in.weight[3:], std=0.05)
    _open_tail(vae.encoder.mid_block.resnets[-1], vae.encoder.conv_norm_out, vae.encoder.conv_out, centre)
    _open_tail(vae.decoder.up_blocks[-1].resnets[-1], vae.decoder.conv_norm_out, vae.decoder.conv_out, centre)
    vae.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.05  # log-variances start small
    vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5
    for mixer in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(mixer.weight)
        nn.init.zeros_(mixer.bias)


def _carry(conv: nn.Conv2d, tap: Tensor) -> None:
    """The first three channels pass `conv` through `tap` and read nothing else."""
    conv.weight[:3] = 0
    for channel in range(3):
        conv.weight[channel, channel] = tap
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def _open_tail(last: ResnetBlock2D, norm: nn.GroupNorm, conv: nn.Conv2d, tap: Tensor) -> None:
    """Let colours through norm, SiLU and `conv`.

    Two large constants in the last channels fix the norm's deviation, so that it only rescales; a bias of 4 puts
    colours where SiLU is nearly the identity, and `conv` takes it off again.
    """
    scale = 1.41
    spread = scale * (norm.num_channels / 2) ** 0.5
    last.conv2.bias[-1] += spread
    last.conv2.bias[-2] -= spread
    norm.weight.fill_(scale)
    norm.bias[:3] = 4
    _carry(conv, tap)
    assert conv.bias is not None
    conv.bias[:3] = -4


def loss_of(
    vae: AutoencoderKL, sprites: Tensor, pixels: int, batch: int, canvases: tuple[int, int] = (448, 1100)
) -> Tensor:
    """L1 and squared error, L1 of the picture at a quarter and a sixteenth, and a very small KL term."""
    device = next(vae.parameters()).device
    pictures = torch.stack([crop(sprites, pixels, canvases) for _ in range(batch)]).to(device)
    posterior = vae.encode(pictures).latent_dist
    error: Tensor = vae.decode(posterior.sample()).sample - pictures
    loss = error.abs().mean() + 2 * error.square().mean()
    for factor in (4, 16):
        loss = loss + 0.5 * functional.avg_pool2d(error, factor).abs().mean()
    kl: Tensor = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return loss + 1e-4 * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, sprites: Tensor, pixels: int, count: int) -> float:
    """Mean signal-to-noise ratio in dB over `count` held-out composites of `pixels` squared; sprites as in OBJECTS."""
    device = next(vae.parameters()).device
    values = []
    with torch.random.fork_rng():
        torch.manual_seed(2024)
        for subject in HELD_OUT[:count]:
            picture = composite(sprites, subject, pixels, pixels)[None].to(device)
            again = vae.decode(vae.encode(picture).latent_dist.mean).sample.clamp(-1, 1)
            values.append(10 * torch.log10(4 / (again - picture).square().mean()))
    return float(torch.stack(values).mean())
