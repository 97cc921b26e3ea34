"""How the UNets' loss is spread over the times of a schedule."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import nn

from training import diffusion
from training.pool import CaptionBank, Pool
from training.words import Subject


class Foretells(nn.Module):
    """Answers v exactly below time 500 and nothing above it, for pictures that are all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, *_: object, **__: object) -> object:
        alphas = diffusion.DDIMScheduler(**diffusion.NOISE).alphas_cumprod[times, None, None, None]
        noise = noisy / (1 - alphas).sqrt()  # the picture is zero
        known = (times < 500)[:, None, None, None]
        return UNet2DConditionOutput(torch.where(known, 0.9 * alphas.sqrt() * noise, 0))


def zeros() -> tuple[Pool, CaptionBank]:
    pool = Pool(torch.zeros(4, 2, 4, 4), [Subject(0, 0)] * 4, [""] * 4)
    return pool, CaptionBank(lambda texts: {"encoder_hidden_states": torch.zeros(len(texts), 1, 1)}, pool.captions)


def test_times_of_a_batch_are_spread_evenly() -> None:
    pool, bank = zeros()
    for seed in range(5):
        torch.manual_seed(seed)
        times = diffusion.noised(pool, bank, 20, torch.device("cpu"), lean=1.0).times
        assert torch.equal(times.sort().values * 20 // 1000, torch.arange(20)), "one in each twentieth"


def test_a_time_weighs_less_the_larger_its_loss_is() -> None:
    weights = diffusion.balance(Foretells(), *zeros())
    assert weights.shape == (1000,)
    assert abs(weights.mean() - 1) < 1e-5
    # Between 300 and 400 the loss is a hundredth of what it would be unforetold, so its root is a tenth.
    alphas = diffusion.DDIMScheduler(**diffusion.NOISE).alphas_cumprod
    expected = 10 * (alphas[850] / alphas[350]).sqrt()
    assert abs(weights[350] / weights[850] / expected - 1) < 0.15
