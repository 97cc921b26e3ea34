"""The build folder of the training stages: its size, and the results that exist already."""

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
from training.pool import CaptionBank, Pool, encode_pool
from training.words import OBJECTS


class Workshop:
    """One build folder; every part in it is a folder that a stage wrote."""

    def __init__(self, scale: float, build: Path = BUILD) -> None:
        """Multiply every stage's steps by `scale` and work in `build`."""
        self._scale, self._build = scale, build
        self._processes = max(1, torch.get_num_threads())
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

    def _pool(self, count: int = 20_000) -> Pool:
        """The first `count` pictures; what is missing is drawn and encoded."""
        return encode_pool(self._vae("vae-scaled"), 512, self._count(count), self._build / "pool-512", self._processes)

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

    def _sd_bank(self, pool: Pool) -> CaptionBank:
        return CaptionBank(diffusion.conditions_of_sd(self._tower(), self._tokenizer()), pool.captions)

    def _sdxl_bank(self, pool: Pool) -> CaptionBank:
        return CaptionBank(sdxl.conditions_of_sdxl(*self._sdxl_texts(), self._tokenizer()), pool.captions)

    def _save(self, model: Any, name: str) -> None:
        """Save a model of diffusers or transformers in its own layout."""
        model.save_pretrained(self._build / name)


def load(model_class: Any, folder: Path) -> Any:
    """A saved model in float32, whatever it was saved in."""
    return model_class.from_pretrained(folder).float()
