"""One control of a request, as JSON says it."""

from __future__ import annotations

from pydantic import ConfigDict, Field, FiniteFloat

from deployments.api.encoding import decode_base64
from deployments.api.nulls import NullsAbsent
from pipelines.control_plan import MAX_CONTROL_WEIGHT, MIN_CONTROL_WEIGHT, ControlParams


class ControlRequest(NullsAbsent):
    """A control map or a photo it is made of, and how it steers. `null` is absent; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=200, description="See /v1/controlnets.", examples=["canny"])
    image: str = Field(description="Base64 PNG, JPEG or WebP, or a data URI.")
    weight: FiniteFloat = Field(
        1.0, ge=MIN_CONTROL_WEIGHT, le=MAX_CONTROL_WEIGHT, description="How much it steers; 0 is not at all."
    )
    start: FiniteFloat = Field(0.0, ge=0, le=1, description="Share of the steps after which it begins to steer.")
    end: FiniteFloat = Field(1.0, ge=0, le=1, description="Share of the steps after which it steers no more.")
    preprocess: bool = Field(True, description="False: `image` already is the control map.")
    guess: bool = Field(
        False,
        description="Steer the prompt's side of the guidance alone, and coarse features more than fine ones: the map "
        "counts more than the prompt.",
    )

    def to_params(self, position: int) -> ControlParams:
        """The control without HTTP; raises InvalidValueError for broken base64."""
        image = decode_base64(self.image, f"controlnets.{position}.image", "controlnets")
        assert image is not None
        return ControlParams(image=image, **self.model_dump(exclude={"image"}))
