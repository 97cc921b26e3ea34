"""The VAE: pictures <-> latents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipelines.errors import NonFiniteError
from pipelines.sampling.latents import Latents, LatentSpace, make_generator
from pipelines.torch_compat import ran_out_of_memory

logger = logging.getLogger(__name__)

R = TypeVar("R")

TILE_ABOVE_PIXELS = 2048 * 2048
"""Larger pictures are coded in overlapping tiles, so that memory stops growing with them."""
PREVIEW_LATENTS, PREVIEW_PIXELS = 32, 256
"""A preview decodes at most so many latents a side and shows at most so many pixels."""


class VAE:
    """An AutoencoderKL with its latent space."""

    def __init__(
        self,
        model: AutoencoderKL,
        space: LatentSpace,
        upcasts: bool = False,
        tile_above_pixels: int = TILE_ABOVE_PIXELS,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the VAE.
            space: its latents.
            upcasts: whether the family's pipelines heed `force_upcast`, which says that a VAE overflows in float16:
                SDXL's do, SD's do not. It is turned to float32 once, here, where diffusers turns it back and forth
                at every call.
            tile_above_pixels: larger pictures are coded in tiles.
        """
        if upcasts and model.dtype == torch.float16 and model.config.force_upcast:
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
        encoded = self._in_tiles_if_it_must(image.width * image.height, lambda: self._model.encode(pixels))
        return Latents(self.space.normalise(encoded.latent_dist.sample(generator=generator)), generator.get_state())

    @torch.inference_mode()
    def decode(self, latents: Latents) -> Image.Image:
        """The picture of `latents`, RGB 8 bit.

        Raises:
            NonFiniteError: pixels that are not finite numbers, which would be drawn black.
        """
        values = self.space.denormalise(latents.values.to(self._model.device, self._model.dtype))
        size = values.shape[-1] * values.shape[-2] * self.space.downscale**2
        pixels = self._in_tiles_if_it_must(size, lambda: self._model.decode(values, return_dict=False)[0])
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

    def _in_tiles_if_it_must(self, pixels: int, code: Callable[[], R]) -> R:
        """What `code` makes of a picture of so many pixels: in tiles if it is large, or if memory ran out for it whole.

        The second try begins outside the `except` block, whose exception keeps the activations of the first alive.
        """
        if pixels <= self._tile_above_pixels:
            self._model.disable_tiling()
            try:
                return code()
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                logger.warning("out of memory: a picture of %d pixels is coded in tiles: %s", pixels, str(error))
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
        self._model.enable_tiling()
        return code()
