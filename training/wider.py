"""A UNet with a wider outermost level out of a narrower one, that draws the same before it is trained further.

Every channel of the outermost level is doubled and what reads it takes a random share from each copy, as in Net2Net
(Chen et al. 2016, arXiv:1511.05641). Copies lie in the groups of their originals: most group norms see what they saw.

Why wider: to answer v at low noise a UNet must pass its input through, 32 channels of it, beside all it has to say.
With 64 channels it cannot: on flat backgrounds half the noise of time 20 stayed, and pictures were mottled.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

GROUPS = 16


def doubled(narrow: UNet2DConditionModel) -> UNet2DConditionModel:
    """`narrow` with twice the channels at the outermost level."""
    channels = narrow.config.block_out_channels
    config = {name: value for name, value in narrow.config.items() if name != "_use_default_values"}
    changed = {"block_out_channels": (2 * channels[0], *channels[1:]), "time_embedding_dim": 4 * channels[0]}
    wide = UNet2DConditionModel.from_config(config | changed)
    state = narrow.state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, target in wide.state_dict().items():
            grown = state[name].float()
            if name == "time_embedding.linear_1.weight":  # twice as many frequencies, every second one as before
                target.zero_()
                target[:, ::2] = grown
                continue
            for dimension in range(min(2, grown.ndim)):
                if grown.shape[dimension] != target.shape[dimension]:
                    kept = _kept(name, channels[0], grown.shape[dimension])
                    grown = _grown(grown, dimension, kept, channels[0] // GROUPS, dimension == 1)
            target.copy_(grown)
    return wide


def _kept(name: str, width: int, size: int) -> int:
    """How many channels in front are not the outermost level's: of two tensors side by side only the second is."""
    both = name.startswith("up_blocks.") and size > 2 * width
    return size - width if both else 0


def _grown(weight: Tensor, dimension: int, kept: int, group: int, reads: bool) -> Tensor:
    """Channels from number `kept` on twice, the copies of each `group` of them behind their originals."""
    numbers = torch.arange(weight.shape[dimension])
    groups = numbers[kept:].reshape(-1, group)
    order = torch.cat([numbers[:kept], torch.cat([groups, groups], 1).flatten()])
    grown = weight.index_select(dimension, order)
    if reads:  # the shares of the copies add up to one
        share = torch.rand(groups.shape) * 0.6 + 0.2
        shares = torch.cat([torch.ones(kept), torch.cat([share, 1 - share], 1).flatten()])
        grown = grown * shares.reshape([-1 if d == dimension else 1 for d in range(grown.ndim)])
    return grown
