"""The VAE: pictures <-> latents."""

from __future__ import annotations

from typing import cast

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipelines.errors import NonFiniteError
from pipelines.sampling.latents import Latents, LatentSpace, make_generator

TILE_ABOVE_PIXELS = 2048 * 2048
"""Larger pictures are coded in overlapping tiles, so that memory stops growing with them."""


PREVIEW_LATENTS, PREVIEW_PIXELS = 32, 256
"""A preview decodes at most so many latents a side and shows at most so many pixels."""


class VAE:
    """An AutoencoderKL with its latent space."""

    def __init__(self, model: AutoencoderKL, space: LatentSpace, tile_above_pixels: int = TILE_ABOVE_PIXELS) -> None:
        """Wrap a loaded model.

        A VAE in float16 whose config says `force_upcast` overflows in half precision, so it is turned to float32 once,
        here, where diffusers turns it back and forth at every call.
        """
        if model.dtype == torch.float16 and model.config.force_upcast:
            model = model.to(torch.float32)
        self._model = model.eval()
        self._tile_above_pixels = tile_above_pixels
        self.space = space
        self._processor = VaeImageProcessor(vae_scale_factor=self.space.downscale)

    @torch.inference_mode()
    def encode(self, image: Image.Image, seed: int) -> Latents:
        """Latents of an RGB picture, sampled with the job's generator, whose state goes on with them."""
        pixels = self._processor.preprocess(image).to(self._model.device, self._model.dtype)
        generator = make_generator(seed)
        self._tile(image.width * image.height)
        sampled = self._model.encode(pixels).latent_dist.sample(generator=generator)
        return Latents(self.space.normalise(sampled), generator.get_state())

    @torch.inference_mode()
    def decode(self, latents: Latents) -> Image.Image:
        """The picture of `latents`, RGB 8 bit.

        Raises:
            NonFiniteError: pixels that are not finite numbers, which would be drawn black.
        """
        values = latents.values.to(self._model.device, self._model.dtype)
        self._tile(values.shape[-1] * values.shape[-2] * self.space.downscale**2)
        pixels = self._model.decode(self.space.denormalise(values), return_dict=False)[0]
        if not bool(pixels.isfinite().all()):
            raise NonFiniteError(
                "the VAE made pixels that are not finite numbers of these latents. Try another sampler, other steps, "
                "a lower cfg_scale or smaller weights of LoRAs",
                "sampler",
            )
        return cast(Image.Image, self._processor.postprocess(pixels.float(), output_type="pil")[0])

    @torch.inference_mode()
    def preview(self, latents: Latents) -> Image.Image:
        """A rough picture of unfinished latents, at most 32 latents a side, for progress."""
        values = latents.values.to(self._model.device, self._model.dtype)
        scale = min(1.0, PREVIEW_LATENTS / max(values.shape[-2:]))
        small = torch.nn.functional.interpolate(values, scale_factor=scale, mode="area") if scale < 1 else values
        pixels = self._model.decode(self.space.denormalise(small), return_dict=False)[0]
        image = cast(Image.Image, self._processor.postprocess(pixels.float(), output_type="pil")[0])
        image.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
        return image

    def _tile(self, pixels: int) -> None:
        if pixels > self._tile_above_pixels:
            self._model.enable_tiling()
        else:
            self._model.disable_tiling()
