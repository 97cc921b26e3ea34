"""Where the stages of training work: a build folder, a size, and what lies there already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import autoencoder, diffusion, sdxl
from training.data import BUILD, load_sprites
from training.words import OBJECTS, PARTS


class Workshop:
    """One build folder; every part in it is a folder that a stage wrote."""

    def __init__(self, scale: float, build: Path = BUILD) -> None:
        """Multiply every stage's steps by `scale` and work in `build`."""
        self._scale, self._build = scale, build
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _steps(self, steps: int) -> int:
        return max(2, round(steps * self._scale))

    def _count(self, pictures: int) -> int:
        return max(16, round(pictures * min(1.0, self._scale)))

    def _known(self) -> Tensor:
        return load_sprites().named(list(OBJECTS.values()))

    def _psnr(self, pixels: int) -> Callable[[nn.Module], str]:
        known = self._known()
        return lambda model: f"{autoencoder.psnr(model, known, pixels, 29):.1f} dB at {pixels} px"

    def _pool(self, vae: str) -> diffusion.Pool:
        path = self._build / "pool-512"
        return diffusion.encode_pool(self._vae(vae), self._known(), 512, self._count(5000), path)

    def _whole_pool(self, vae: str) -> diffusion.Pool:
        """With backgrounds alone, and objects on colours without a name."""
        path = self._build / "pool-512-parts"
        parts = diffusion.encode_pool(self._vae(vae), self._known(), 512, self._count(1500), path, PARTS)
        return self._pool(vae).and_also(parts)

    def _vae(self, name: str) -> AutoencoderKL:
        vae = load(AutoencoderKL, self._build / name)
        return vae.eval().requires_grad_(False).to(self._device, memory_format=torch.channels_last)

    def _unet(self, name: str) -> UNet2DConditionModel:
        """A frozen UNet; training thaws what it trains."""
        unet = load(UNet2DConditionModel, self._build / name).eval().requires_grad_(False)
        return unet.to(self._device, memory_format=torch.channels_last)

    def _tower(self) -> CLIPTextModel:
        return load(CLIPTextModel, self._build / "text").eval().requires_grad_(False).to(self._device)

    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self._build / "tokenizer")

    def _sdxl_texts(self) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
        classes = {"sdxl-text": CLIPTextModel, "sdxl-text-2": CLIPTextModelWithProjection}
        first, second = (load(kind, self._build / name).eval().to(self._device) for name, kind in classes.items())
        return first, second

    def _sd_bank(self, per_subject: int) -> diffusion.CaptionBank:
        return diffusion.CaptionBank(diffusion.conditions_of_sd(self._tower(), self._tokenizer()), per_subject)

    def _sdxl_bank(self, per_subject: int) -> diffusion.CaptionBank:
        return diffusion.CaptionBank(sdxl.conditions_of_sdxl(*self._sdxl_texts(), self._tokenizer()), per_subject)

    def _save(self, model: nn.Module, name: str) -> None:
        model.save_pretrained(self._build / name)


def load(model_class: Any, folder: Path) -> Any:
    """A saved model in float32, whatever it was saved in."""
    return model_class.from_pretrained(folder).float()


@torch.no_grad()
def soup(model: nn.Module, start: nn.Module) -> None:
    """Average `model` with the weights its fine-tuning began with, in place.

    Better than either by our gates, as in Wortsman et al. 2022 (arXiv:2203.05482).
    """
    for mine, its in zip(model.parameters(), start.parameters(), strict=True):
        mine.lerp_(its.to(mine.device), 0.5)
