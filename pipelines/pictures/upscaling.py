"""A picture made larger by a model, in tiles, so that memory does not grow with it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipelines.errors import InvalidValueError, NonFiniteError
from pipelines.tensors import TensorBundle
from pipelines.torch_compat import ran_out_of_memory

logger = logging.getLogger(__name__)

TILE, MARGIN, LEAST_TILE = 256, 16, 64
"""Pixels of a tile's side, and of what each side sees beyond what is kept; tiles are halved where memory ends."""
MOST_PIXELS = 100_000_000
"""Of what a model makes of a picture before it is resized: 300 MB."""
MOST_PASSES = 3
"""Times a model goes over a picture to reach a size, as in A1111; Pillow does the rest."""


@dataclass(frozen=True)
class Pixels(TensorBundle):
    """A picture between two deployments."""

    values: torch.Tensor
    """`[height, width, 3]` uint8, RGB."""

    @classmethod
    def of(cls, image: Image.Image) -> Pixels:
        """The pixels of an RGB picture."""
        return cls(torch.from_numpy(np.array(image)))

    def image(self) -> Image.Image:
        """Them as a picture."""
        return Image.fromarray(self.values.numpy())


class Upscaler:
    """A model that makes pictures a whole number of times as wide and as high."""

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        scale: int,
        device: str,
        dtype: torch.dtype,
        tile: int | None = TILE,
        margin: int = MARGIN,
        multiple: int = 1,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: `[1, 3, height, width]` in 0..1 -> the same, `scale` times as wide and high.
            scale: how many times.
            device: where it computes.
            dtype: its number format.
            tile: side of a tile in pixels, margins included; None for a model that must see a picture whole.
            margin: pixels that each side of a tile sees beyond what it makes. Where they are as many as the model looks
                far, tiles are the picture made in one piece; published ones look farther, but hardly.
            multiple: tiles begin at multiples of so many pixels, which a model takes together.
        """
        self._model = model
        self.scale = scale
        self._device = device
        self._dtype = dtype
        self._tile = tile
        self._margin = margin
        self._multiple = multiple

    def enlarge(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """An RGB picture of `width` x `height` pixels: the model over it until it is no smaller, then Lanczos.

        Raises:
            InvalidValueError: what the model makes on the way is too large.
            NonFiniteError: it made values that are not finite numbers.
        """
        for _ in range(MOST_PASSES):
            between = (image.width * self.scale, image.height * self.scale)
            if between[0] * between[1] > MOST_PIXELS:
                raise InvalidValueError(
                    f"the upscaler makes {between[0]}x{between[1]} of {image.width}x{image.height}, and at most "
                    f"{MOST_PIXELS:,} pixels are kept on the way: send a smaller picture or use another upscaler",
                    "upscaler",
                )
            image = self.once(image)
            if image.width >= width and image.height >= height:
                break
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)

    @torch.inference_mode()
    def once(self, image: Image.Image) -> Image.Image:
        """The picture, `scale` times as wide and as high."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        while True:
            try:
                return self._in_tiles(pixels)
            except Exception as error:
                if self._tile is None or self._tile // 2 < LEAST_TILE or not ran_out_of_memory(error):
                    raise
                logger.warning("out of memory: tiles of %d pixels from now on: %s", self._tile // 2, str(error))
            self._tile //= 2
            if self._device == "cuda":
                torch.cuda.empty_cache()

    def _in_tiles(self, pixels: torch.Tensor) -> Image.Image:
        height, width = pixels.shape[-2:]
        scale = self.scale
        result = np.empty((height * scale, width * scale, 3), np.uint8)
        for down, across in itertools.product(self._spans(height), self._spans(width)):
            seen = pixels[..., down.begin : down.end, across.begin : across.end]
            drawn = self._model(seen.to(self._device, self._dtype) / 255)[0].float()
            if not bool(drawn.isfinite().all()):
                raise NonFiniteError(
                    "the upscaler made values that are not finite numbers; use another one", "upscaler"
                )
            bytes_ = (drawn.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            result[down.kept(scale), across.kept(scale)] = bytes_[down.cut(scale), across.cut(scale)]
        return Image.fromarray(result)

    def _spans(self, length: int) -> list[_Span]:
        """Tiles along one side, of one length but for the last, so that few shapes are computed."""
        tile, multiple = self._tile, self._multiple
        if tile is None or length <= tile:
            return [_Span(0, length, 0, length)]
        step = (tile - 2 * self._margin) // multiple * multiple
        begins = [*range(0, length - tile, step), (length - tile) // multiple * multiple]
        made = [0, *(begin + self._margin for begin in begins[1:]), length]
        ends = [*(begin + tile for begin in begins[:-1]), length]
        return [_Span(*span) for span in zip(begins, ends, made, made[1:], strict=False)]


@dataclass(frozen=True)
class _Span:
    """One tile along one side, in pixels of the picture: what it sees, and what is kept of it."""

    begin: int
    end: int
    first: int
    last: int

    def kept(self, scale: int) -> slice:
        """Where it goes in the larger picture."""
        return slice(self.first * scale, self.last * scale)

    def cut(self, scale: int) -> slice:
        """Which part of the larger tile that is."""
        return slice((self.first - self.begin) * scale, (self.last - self.begin) * scale)
