"""Enlarging a picture that was sent: its request, its plan, and the decisions between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from config.catalog import Catalog
from config.choices import UnknownChoiceError
from pipelines.enlargement import MAX_SCALE, MIN_SCALE
from pipelines.errors import InvalidValueError
from pipelines.plan import OUTPUT_QUALITY, OutputFormat, SourcePicture

DEFAULT_SCALE = 2.0
"""A1111's."""


@dataclass(frozen=True, kw_only=True)
class UpscaleParams:
    """A request without HTTP. None means absent."""

    image: bytes
    upscaler: str | None = None
    scale: float | None = None
    output_format: OutputFormat = "png"
    output_quality: int | None = None


class UpscalePlan(BaseModel):
    """A larger picture, decided."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    upscaler: str
    """A canonical name."""
    component: str | None
    """The model; None where Pillow does."""
    scale: float
    width: int
    height: int
    """Width and height are those of the larger picture."""
    source: SourcePicture
    source_infotext: str | None = None
    """What its file says of how it was made, in A1111's words."""
    output_format: OutputFormat
    output_quality: int = OUTPUT_QUALITY

    @property
    def ai_system(self) -> str | None:
        """The model that a picture's file names."""
        return self.upscaler if self.component is not None else None

    @property
    def pixel_steps(self) -> int:
        """What it costs: its pixels, as one step would."""
        return self.width * self.height


def plan_upscale(
    params: UpscaleParams,
    size: tuple[int, int],
    source: SourcePicture,
    infotext: str | None,
    catalog: Catalog,
    max_pixels: int,
) -> UpscalePlan:
    """Decide how a picture of `size` is enlarged.

    Args:
        params: what is asked.
        size: width and height of the sent picture.
        source: what its file is.
        infotext: what its file says of its making.
        catalog: the upscalers.
        max_pixels: most that a picture may have here.

    Raises:
        InvalidValueError: an unknown upscaler, a scale out of range or one that makes too large a picture.
    """
    try:
        choices = catalog.upscaler_choices(latents=False)
        upscaler = choices.resolve(params.upscaler or default_upscaler(catalog))
    except UnknownChoiceError as error:
        raise InvalidValueError(str(error), "upscaler") from None
    scale = params.scale if params.scale is not None else DEFAULT_SCALE
    if not (math.isfinite(scale) and MIN_SCALE <= scale <= MAX_SCALE):
        raise InvalidValueError(f"scale {scale} is out of range: {MIN_SCALE} to {MAX_SCALE}", "scale")
    width, height = (int(side * scale) for side in size)
    if width * height > max_pixels:
        most = math.floor(100 * math.sqrt(max_pixels / (size[0] * size[1]))) / 100
        raise InvalidValueError(
            f"scale {scale:g} makes {width}x{height} of {size[0]}x{size[1]}, and a picture has at most {max_pixels:,} "
            f"pixels here: use at most {most:g}",
            "scale",
        )
    return UpscalePlan(
        upscaler=upscaler,
        component=catalog.upscaler_component(upscaler),
        scale=scale,
        width=width,
        height=height,
        source=source,
        source_infotext=infotext,
        output_format=params.output_format,
        output_quality=OUTPUT_QUALITY if params.output_quality is None else params.output_quality,
    )


def default_upscaler(catalog: Catalog) -> str:
    """Of a request that names none: the catalog's first model, Pillow's Lanczos where it has none."""
    return catalog.upscalers[0].name if catalog.upscalers else "lanczos"
