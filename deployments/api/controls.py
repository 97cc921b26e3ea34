"""One entry of `controlnets` in a request."""

from __future__ import annotations

from pydantic import ConfigDict, Field, FiniteFloat

from deployments.api.encoding import decode_base64
from deployments.api.nulls import NullsAbsent
from pipelines.control_plan import MAX_CONTROL_WEIGHT, MIN_CONTROL_WEIGHT, ControlParams


class ControlRequest(NullsAbsent):
    """A control map, or a photo from which it is made, and how it steers.

    `null` means absent; unknown fields are errors.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=200, description="See /v1/controlnets.", examples=["canny"])
    image: str = Field(description="Base64 PNG, JPEG or WebP, or a data URI.")
    weight: FiniteFloat = Field(
        1.0, ge=MIN_CONTROL_WEIGHT, le=MAX_CONTROL_WEIGHT, description="How strongly it steers; 0 switches it off."
    )
    start: FiniteFloat = Field(0.0, ge=0, le=1, description="It steers from this share of the steps on.")
    end: FiniteFloat = Field(1.0, ge=0, le=1, description="It steers up to this share of the steps.")
    preprocess: bool = Field(True, description="False if `image` already is the control map.")
    guess: bool = Field(
        False,
        description="Steer only the conditional side of the guidance, and coarse features more than fine ones, so "
        "that the map counts more than the prompt.",
    )

    def to_params(self, position: int) -> ControlParams:
        """The control without HTTP; raises InvalidValueError for broken base64."""
        image = decode_base64(self.image, f"controlnets.{position}.image", "controlnets")
        assert image is not None
        return ControlParams(image=image, **self.model_dump(exclude={"image"}))
