"""The UNet in two halves: bit-equal to diffusers' own forward pass, with and without a ControlNet's residuals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipelines.backends.halves import Lower, UNetHalves
from pipelines.errors import WeightsError
from pipelines.torch_compat import PeakBytes

FOLDERS = ["sd15", "sd2", "sdxl", "sdxl-refiner", "ssd"]


def unet_of(tiny_models: Path, folder: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_models / folder, subfolder="unet").eval()


def inputs(unet: UNet2DConditionModel, sides: tuple[int, int]) -> tuple[Any, ...]:
    """Two rows of random inputs in the order of the halves' arguments."""
    config, generator = unet.config, torch.Generator().manual_seed(1)
    sample = torch.randn(2, config.in_channels, *sides, generator=generator)
    context = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    added = {}
    if config.addition_embed_type == "text_time":
        count = 5 if (config.projection_class_embeddings_input_dim / config.addition_time_embed_dim) % 1 else 6
        width = config.projection_class_embeddings_input_dim - count * config.addition_time_embed_dim
        added = {"text_embeds": torch.randn(2, width, generator=generator), "time_ids": torch.full((2, count), 128.0)}
    return sample, torch.tensor([10.0, 500.0]), context, added


def forward(unet: UNet2DConditionModel, given: tuple[Any, ...], residuals: list[torch.Tensor] | None) -> torch.Tensor:
    sample, timesteps, context, added = given
    extra: dict[str, Any] = {}
    if residuals is not None:
        extra = {"down_block_additional_residuals": residuals[:-1], "mid_block_additional_residual": residuals[-1]}
    return unet(sample, timesteps, context, added_cond_kwargs=added or None, return_dict=False, **extra)[0]


def of_row_1(lower: Lower) -> list[torch.Tensor]:
    """Residuals for the second row of two; those of the first are zero."""
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(part.shape, generator=generator) for part in (*lower.skips, lower.hidden)]
    for part in made:
        part[0] = 0
    return made


@pytest.mark.parametrize("sides", [(16, 16), (10, 13)], ids=["halved exactly", "told their size"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_halves_are_bit_equal_to_the_whole(tiny_models: Path, folder: str, sides: tuple[int, int]) -> None:
    unet = unet_of(tiny_models, folder)
    given, halves = inputs(unet, sides), UNetHalves(unet)
    with torch.inference_mode():
        plain = forward(unet, given, None)
        assert torch.equal(halves.upper(halves.lower(*given), given[2]), plain)
        lower = halves.lower(*given)
        residuals = of_row_1(lower)
        steered = forward(unet, given, residuals)
        assert torch.equal(halves.upper(lower, given[2], residuals), steered)
    assert torch.equal(steered[0], plain[0])
    assert not torch.equal(steered[1], plain[1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("time_cond_proj_dim", 256, "LCM-distilled"),
        ("class_embed_type", "timestep", "class labels"),
        ("addition_embed_type", "image", "takes 'image'"),
    ],
)
def test_a_unet_that_needs_more_is_refused(tiny_models: Path, key: str, value: Any, message: str) -> None:
    unet = unet_of(tiny_models, "sd15")
    unet.register_to_config(**{key: value})
    with pytest.raises(WeightsError, match=message):
        UNetHalves(unet)


def test_the_way_up_holds_no_more_than_diffusers_own(tiny_models: Path) -> None:
    """Skips are let go of as they are used: a tick's rows are budgeted by what diffusers' forward pass holds."""
    unet = unet_of(tiny_models, "sd15")
    halves, given = UNetHalves(unet), inputs(unet, (32, 32))
    peaks = []
    for run in (lambda: forward(unet, given, None), lambda: halves.upper(halves.lower(*given), given[2])):
        with torch.inference_mode(), PeakBytes() as counted:
            run()
        peaks.append(counted.peak)
    assert peaks[1] <= 1.02 * peaks[0]
