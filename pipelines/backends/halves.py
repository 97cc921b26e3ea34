"""A UNet in two halves, so that a ControlNet's residuals are needed only when the second one begins.

The same modules in the same order as `UNet2DConditionModel.forward` of diffusers, and bit-equal to it: the way down and
through the middle does not read the residuals, so a ControlNet elsewhere can compute them meanwhile, and the two
halves can be recorded apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from pipelines.errors import WeightsError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

UNSUPPORTED = {
    "time_cond_proj_dim": "takes the guidance scale as an input (LCM-distilled)",
    "class_embed_type": "takes class labels",
    "num_class_embeds": "takes class labels",
    "encoder_hid_dim_type": "projects its text embeddings",
    "center_input_sample": "centers its input",
}
"""Keys of a UNet's config that require inputs which this project does not produce."""


@dataclass
class Lower:
    """The output of the first half. The second half removes it piece by piece, so that memory is free early."""

    hidden: torch.Tensor
    """`[rows, channels, height, width]`, after the mid block."""
    skips: list[torch.Tensor]
    """Outputs of the way down, the first one first; a ControlNet has a residual for each, and one for `hidden`."""
    embedding: torch.Tensor
    """`[rows, channels]`, of the timestep and of what else the UNet is told."""


class UNetHalves:
    """The two halves of a loaded UNet."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        """Take the modules of `unet`.

        Raises:
            WeightsError: the UNet needs an input this graph does not produce.
        """
        for key, reason in UNSUPPORTED.items():
            if unet.config.get(key):
                raise WeightsError(f"this UNet {reason}; it is not supported")
        if unet.config.addition_embed_type not in (None, "text_time"):
            raise WeightsError(f"this UNet takes '{unet.config.addition_embed_type}'; it is not supported")
        self._unet = unet
        self.out_channels: int = unet.config.out_channels
        """Of the model output."""

    def lower(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        added_conditions: Mapping[str, torch.Tensor],
    ) -> Lower:
        """Down and through the mid block; the arguments are a `StepBatch`'s."""
        unet = self._unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
        added = unet.get_aug_embed(
            emb=embedding, encoder_hidden_states=prompt_embeds, added_cond_kwargs=dict(added_conditions)
        )
        embedding = embedding if added is None else embedding + added
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        hidden = unet.conv_in(sample)
        skips = [hidden]
        for block in unet.down_blocks:
            hidden, own = block(hidden_states=hidden, temb=embedding, **_text(block, prompt_embeds))
            skips += own
        if unet.mid_block is not None:
            hidden = unet.mid_block(hidden, embedding, **_text(unet.mid_block, prompt_embeds))
        return Lower(hidden, skips, embedding)

    def upper(
        self, lower: Lower, prompt_embeds: torch.Tensor, residuals: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Up to the model output, `[rows, channels, height, width]`.

        Args:
            lower: what the first half left; used up.
            prompt_embeds: those that it was given.
            residuals: one for each of `lower.skips` in their order and one for `lower.hidden`, of the same shapes;
                None without a ControlNet.
        """
        unet, hidden, skips = self._unet, lower.hidden, lower.skips
        left = None
        if residuals is not None:
            *left, middle = residuals
            hidden = hidden + middle
        # Maps that a level of the UNet does not halve exactly must be told their size on the way up.
        told = any(side % 2**unet.num_upsamplers for side in skips[0].shape[-2:])
        for block in unet.up_blocks:
            own = _taken(skips, len(block.resnets))
            if left is not None:
                own = tuple(skip + extra for skip, extra in zip(own, _taken(left, len(own)), strict=True))
            hidden = block(
                hidden_states=hidden,
                temb=lower.embedding,
                res_hidden_states_tuple=own,
                upsample_size=skips[-1].shape[2:] if told and skips else None,
                **_text(block, prompt_embeds),
            )
        if unet.conv_norm_out is not None:
            hidden = unet.conv_act(unet.conv_norm_out(hidden))
        return cast(torch.Tensor, unet.conv_out(hidden))


def _taken(tensors: list[torch.Tensor], count: int) -> tuple[torch.Tensor, ...]:
    """The last of them, which are gone from the list."""
    own = tuple(tensors[-count:])
    del tensors[-count:]
    return own


def _text(block: torch.nn.Module, prompt_embeds: torch.Tensor) -> dict[str, Any]:
    """The argument that only blocks with attention to the text take."""
    return {"encoder_hidden_states": prompt_embeds} if getattr(block, "has_cross_attention", False) else {}
