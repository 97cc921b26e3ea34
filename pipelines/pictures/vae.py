"""The VAE: pictures <-> latents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from pipelines.errors import NonFiniteError
from pipelines.pictures.masks import Canvas
from pipelines.plan import GenerationPlan
from pipelines.sampling.latents import Latents, LatentSpace, draw_noise, make_generator
from pipelines.torch_compat import ran_out_of_memory
from pipelines.transfers import Fetching, fetch, pinned, send

logger = logging.getLogger(__name__)

R = TypeVar("R")

TILE_ABOVE_PIXELS = 2048 * 2048
"""Larger pictures are coded in overlapping tiles, so that memory stops growing with them."""
PREVIEW_LATENTS, PREVIEW_PIXELS = 32, 256
"""Largest side of a preview: in latents that are decoded, and in pixels that are shown."""


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
            tile_above_pixels: larger pictures are processed in tiles.
        """
        if upcasts and model.dtype == torch.float16 and model.config.force_upcast:
            model = model.to(torch.float32)
        self._model = model.eval()
        self._tile_above_pixels = tile_above_pixels
        self.space = space
        self._processor = VaeImageProcessor(vae_scale_factor=self.space.downscale)
        self._mask_processor = VaeImageProcessor(
            vae_scale_factor=self.space.downscale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def encode(self, image: Image.Image, seed: int, canvas: Canvas | None = None) -> Latents:
        """Latents of an RGB picture, sampled with the job's generator, whose state goes on with them.

        `canvas`, of which `image` is the part that is drawn, says which latents are.
        """
        return self.begin_encoding(image, seed, canvas).result()

    def decode(self, latents: Latents) -> Image.Image:
        """The picture of `latents`, RGB 8 bit.

        Raises:
            NonFiniteError: pixels that are not finite numbers, which would be drawn black.
        """
        return self.begin_decoding(latents).result()

    def preview(self, latents: Latents) -> Image.Image:
        """A rough picture of unfinished latents, at most 32 latents and 256 pixels a side, for progress."""
        return self.begin_preview(latents).result()

    def begin_start(self, plan: GenerationPlan, image: Image.Image, canvas: Canvas | None) -> Fetching[Latents]:
        """What the first stage of a plan begins from, queued on the device; see `read_start` for picture and canvas."""
        first = plan.stages[0]
        if not first.reads_mask:
            return self.begin_encoding(image, plan.seed, canvas)
        assert canvas is not None, "a UNet for inpainting always has a mask"
        return self.begin_encoding_masked(canvas, plan.seed, from_noise=first.schedule.strength in (None, 1))

    @torch.inference_mode()
    def begin_encoding(self, image: Image.Image, seed: int, canvas: Canvas | None = None) -> Fetching[Latents]:
        """`encode`, queued on the device."""
        generator = make_generator(seed)
        values = self._sampled(self._processor.preprocess(image), generator)
        mask = self._latent_mask(canvas, values.dtype) if canvas else None
        return Fetching(self._model.device, lambda: Latents(values, generator.get_state(), mask))

    @torch.inference_mode()
    def begin_encoding_masked(self, canvas: Canvas, seed: int, from_noise: bool) -> Fetching[Latents]:
        """What a UNet for inpainting reads of a canvas, queued on the device.

        Draws come in the order of diffusers' inpainting pipelines: the picture, unless all begins `from_noise` and
        nobody reads its latents; the noise, which the engine draws; the masked picture, for which the engine passes
        over one draw.
        """
        pixels, generator = self._processor.preprocess(canvas.part), make_generator(seed)
        stays = 1 - self._mask_processor.preprocess(canvas.part_mask)
        values = None if from_noise else self._sampled(pixels, generator)
        state = generator.get_state()
        draw_noise(self.space.shape(*canvas.part.size), generator, self._model.dtype)
        masked = self._sampled(pixels * stays, generator)
        mask = self._latent_mask(canvas, masked.dtype)
        begin = masked if values is None else values
        return Fetching(self._model.device, lambda: Latents(begin, state, mask, masked))

    def _sampled(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents of pixels `[1, 3, height, width]` in -1..1, on their way to the host."""
        device = self._model.device
        sent = send(pinned(pixels.to(self._model.dtype), device), device)
        size = pixels.shape[-1] * pixels.shape[-2]
        spread = self._in_tiles_if_it_must(size, lambda: self._model.encode(sent)).latent_dist
        noise = send(pinned(draw_noise(spread.mean.shape, generator, spread.mean.dtype), device), device)
        return fetch(self.space.normalise(spread.mean + spread.std * noise))

    def _latent_mask(self, canvas: Canvas, dtype: torch.dtype) -> torch.Tensor:
        """`[1, 1, height, width]`, 1 where latents are drawn."""
        return torch.tensor(canvas.latent_mask(self.space))[None, None].to(dtype)

    @torch.inference_mode()
    def begin_decoding(self, latents: Latents) -> Fetching[Image.Image]:
        """`decode`, queued on the device."""
        values = self.space.denormalise(self._on_device(latents))
        size = values.shape[-1] * values.shape[-2] * self.space.downscale**2
        return self._seen(self._in_tiles_if_it_must(size, lambda: self._model.decode(values, return_dict=False)[0]))

    @torch.inference_mode()
    def begin_preview(self, latents: Latents) -> Fetching[Image.Image]:
        """`preview`, queued on the device."""
        values = self._on_device(latents)
        scale = min(1.0, PREVIEW_LATENTS / max(values.shape[-2:]))
        small = torch.nn.functional.interpolate(values, scale_factor=scale, mode="area") if scale < 1 else values
        pixels = self._model.decode(self.space.denormalise(small), return_dict=False)[0]
        return self._seen(pixels, PREVIEW_PIXELS)

    def _on_device(self, latents: Latents) -> torch.Tensor:
        device = self._model.device
        return send(pinned(latents.values.to(self._model.dtype), device), device)

    def _seen(self, pixels: torch.Tensor, thumbnail: int | None = None) -> Fetching[Image.Image]:
        """Pixels `[1, 3, height, width]` in -1..1 as a picture. Bytes are made on the device: a quarter of the copy.

        Args:
            pixels: of the VAE.
            thumbnail: most pixels a side; None asks for a whole picture, whose values are finite.
        """
        shares = (pixels[0].float() / 2 + 0.5).clamp(0, 1)  # as diffusers' VaeImageProcessor rounds them
        shown = fetch((shares * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous())
        finite = fetch(pixels.isfinite().all())

        def finish() -> Image.Image:
            if thumbnail is None and not bool(finite):
                raise NonFiniteError(
                    "the VAE decoded these latents to pixels that are not finite numbers. Try another sampler, other "
                    "steps, a lower cfg_scale or smaller weights of LoRAs",
                    "sampler",
                )
            image = Image.fromarray(shown.numpy())
            if thumbnail is not None:
                image.thumbnail((thumbnail, thumbnail))
            return image

        return Fetching(pixels.device, finish)

    def _in_tiles_if_it_must(self, pixels: int, code: Callable[[], R]) -> R:
        """Run `code` on a picture of so many pixels: in tiles if it is large, or if memory runs out without them.

        The second try begins outside the `except` block, whose exception keeps the activations of the first alive.
        """
        if pixels <= self._tile_above_pixels:
            self._model.disable_tiling()
            try:
                return code()
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                logger.warning("out of memory: a picture of %d pixels is processed in tiles: %s", pixels, str(error))
            if self._model.device.type == "cuda":
                torch.cuda.empty_cache()
        self._model.enable_tiling()
        return code()
