"""One control of a picture: as it is asked for, and as it was decided."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

MAX_CONTROLS = 4
"""Control maps of one picture: each is one more pass of a ControlNet at every step."""
MIN_CONTROL_WEIGHT, MAX_CONTROL_WEIGHT = 0, 2


@dataclass(frozen=True, kw_only=True)
class ControlParams:
    """One control of a request; the fields mean what those of `ControlUse` do."""

    name: str
    image: bytes
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocess: bool = True
    guess: bool = False


class ControlUse(BaseModel):
    """One control map that steers a stage; its picture comes beside the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    component: str
    mode: int | None
    """Control type of a union ControlNet, None for a plain one."""
    preprocess: bool = True
    """False: the picture sent already is the control map."""
    weight: float = 1.0
    """What its residuals are multiplied by (diffusers' `controlnet_conditioning_scale`)."""
    start: float = 0.0
    end: float = 1.0
    """It steers from one share of the picture's ticks to the other (diffusers' `control_guidance_start` and `_end`)."""
    guess: bool = False
    """Steer the cond row alone, deep residuals more than shallow ones (section 3.4 of arXiv:2302.05543)."""
