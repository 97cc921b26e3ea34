"""How a finished picture or its latents become larger before they are drawn over: names, the request, the plan.

The names and the second pass ("hires fix") are A1111's; `pipelines/second_pass.py` decides.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from config.upscalers import LATENT_METHODS

MIN_SCALE, MAX_SCALE = 1, 8
MAX_HIRES_STEPS = 1000


class HiresParams(BaseModel):
    """A second pass over the picture, larger: what A1111 calls hires fix."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Hires")

    scale: FiniteFloat = Field(
        2.0,
        ge=MIN_SCALE,
        le=MAX_SCALE,
        description="How many times as wide and as high; sides are rounded down to what the model takes.",
    )
    steps: int | None = Field(
        None, ge=1, le=MAX_HIRES_STEPS, description="Steps of the second pass, all of which run; default: `steps`."
    )
    strength: FiniteFloat = Field(
        0.7, gt=0, le=1, description="How much of the enlarged picture is redrawn, as A1111's denoising strength."
    )
    upscaler: str = Field(
        "latent",
        max_length=200,
        description="latent interpolates latents (also -antialiased, -bicubic, -bicubic-antialiased, -nearest, "
        "-nearest-exact); lanczos, nearest and the models of /v1/upscalers enlarge the picture. A1111's names work.",
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        """Null is absent, and so is an empty name, as everywhere in a request."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None and (name, value) != ("upscaler", "")}


class Enlargement(BaseModel):
    """What happens to the latents of the stage before, at the head of a second pass."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    upscaler: str
    """A canonical name."""
    component: str | None = None
    """The model that enlarges the picture; None where none is needed."""
    scale: float
    """As it was asked for; the stage's own size is what came of it."""

    @property
    def of_latents(self) -> bool:
        """Whether latents are interpolated; otherwise the picture is decoded, enlarged and encoded."""
        return self.upscaler in LATENT_METHODS
