"""Canny ControlNets: edges of our own composites, and residuals that make a frozen UNet draw along them.

Where things are needs no words, so these ControlNets are the UNet's way down without its attention and SDXL's added
conditions: 2 M weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.control.annotators import canny
from training.diffusion import noised, take_over
from training.pool import CaptionBank, Pool, numbered

EMBEDDING = {32: (4, 8, 16, 32, 64, 64), 64: (4, 4, 8, 16, 32, 64, 64)}
"""Channels of the map's embedding, which divides it by 2 for each entry after the first, as the autoencoder does."""


def edge_maps(sprites: Tensor, pool: Pool, pixels: int, path: Path) -> Tensor:
    """Edges of every picture of `pool` at `pixels` squared, eight to a byte, `[n, pixels, pixels / 8]`; cached."""
    if not path.exists():
        packed = np.empty((len(pool.latents), pixels, pixels // 8), np.uint8)
        for number, subject in enumerate(tqdm(pool.subjects, "edges", mininterval=5)):
            picture = (numbered(sprites, subject, number, pixels).permute(1, 2, 0) + 1) * 127.5
            drawn = canny(Image.fromarray(picture.round().byte().numpy()))
            packed[number] = np.packbits(np.asarray(drawn)[..., 0] > 0, axis=-1)
        torch.save(torch.from_numpy(packed), path)
    edges: Tensor = torch.load(path)
    return edges


def unpack(maps: Tensor) -> Tensor:
    """Packed edges to what a ControlNet reads, `[n, 3, pixels, pixels]` of 0 and 1."""
    bits = torch.from_numpy(np.unpackbits(maps.numpy(), axis=-1))
    return bits.float()[:, None].expand(-1, 3, -1, -1)


def controlnet(unet: UNet2DConditionModel, downscale: int) -> ControlNetModel:
    """A ControlNet of `unet` with its convolutions on the way down, and nothing to say yet."""
    kept = ("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
    net = ControlNetModel(
        **{name: unet.config[name] for name in (*kept, "attention_head_dim")},
        down_block_types=("DownBlock2D",) * len(unet.config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=EMBEDDING[downscale],
    )
    take_over(net, unet.state_dict())
    _enliven(net.controlnet_cond_embedding)
    return net


@torch.no_grad()
def _enliven(embedding: nn.Module) -> None:
    """Let sparse edges through the embedding at a scale the UNet knows.

    As diffusers starts it, a map is gone after a dozen narrow layers and a last one of zeros: in 700 steps nothing was
    learnt. The zeros of the residuals' own convolutions keep the ControlNet silent at first.
    """
    convolutions = [module for module in embedding.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    edges = (torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0)) < 0.03).float()
    values = edges
    for index, conv in enumerate(convolutions):  # every layer's output gets a variance of 1
        values = conv(values)
        conv.weight /= values.std()
        values = values / values.std()
        if index + 1 < len(convolutions):
            values = nn.functional.silu(values)


@torch.no_grad()
def larger(net: ControlNetModel, unet: UNet2DConditionModel) -> ControlNetModel:
    """The SDXL shape's ControlNet out of the SD shape's: one more halving of the map in front, the rest taken over."""
    large = controlnet(unet, 64)
    state = net.state_dict()
    blocks = "controlnet_cond_embedding.blocks."
    shifted = {}
    for name, value in state.items():
        if name.startswith(blocks):
            number, rest = name.removeprefix(blocks).split(".")
            name = f"{blocks}{int(number) + 2}.{rest}"
        shifted[name] = value
    take_over(large, shifted)
    keep, halve = large.controlnet_cond_embedding.blocks[:2]
    nn.init.dirac_(keep.weight)
    nn.init.zeros_(halve.weight)
    for channel in range(halve.weight.shape[0]):
        halve.weight[channel, channel, 1:, 1:] = 0.5
    for conv in (keep, halve):
        nn.init.zeros_(conv.bias)
    return large


def loss_of(net: nn.Module, unet: nn.Module, pool: Pool, bank: CaptionBank, maps: Tensor, batch: int) -> Tensor:
    """Squared error of v of the steered, frozen `unet`."""
    device = next(net.parameters()).device
    drawn = noised(pool, bank, batch, device)
    down, mid = net(
        drawn.noisy,
        drawn.times,
        drawn.context,
        unpack(maps[drawn.rows]).to(device),
        added_cond_kwargs=drawn.added,
        return_dict=False,
    )
    steered = drawn.ask(unet, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    return (steered - drawn.velocity).square().mean()
