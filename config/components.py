"""Components: sets of weights, each hosted by one deployment, and how large pictures may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from config.sources import CheckpointSource, Source, Spec

Family = Literal["sd", "sdxl"]
Dtype = Literal["float32", "float16", "bfloat16"]
Architecture = Literal["sd15", "sd2", "sdxl", "sdxl-refiner", "ssd"]
ARCHITECTURES = Path(__file__).parent / "architectures"
"""Published configurations; a ControlNet's lies beside that of the UNet it steers."""


class Size(Spec):
    """A picture size in pixels."""

    width: int = Field(ge=8)
    height: int = Field(ge=8)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            width, _, height = value.partition("x")
            return {"width": width, "height": height}
        return value

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class SchedulerSettings(Spec):
    """Settings of a UNet's `scheduler_config.json` that stand above what its files say; those not given are theirs."""

    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    rescale_betas_zero_snr: bool | None = None
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None
    steps_offset: int | None = Field(default=None, ge=0, le=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    beta_start: float | None = Field(default=None, gt=0, lt=1)
    beta_end: float | None = Field(default=None, gt=0, lt=1)


class ComponentSpec(Spec):
    """One set of weights: what one deployment hosts."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    kind: Literal["text_encoder", "unet", "vae", "controlnet", "upscaler"]
    family: Family | Literal["any"] = "any"
    """Upscalers alone are for pictures of any."""
    source: Source
    file: str | None = Field(default=None, pattern=r"^[^/]+\.safetensors$")
    """Upscalers only: the file in a folder or repository; a checkpoint is one itself."""
    subfolder: str | None = None
    """Folder of the weights inside the source: by default the kind's usual one; "" is the root."""
    dtype: Dtype = "float32"
    """Number format on a GPU; a CPU always computes in float32."""
    architecture: Architecture | None = None
    """What it is a fine-tune of, for whoever needs its shapes without its files: those on the hub say it."""
    text_encoders: tuple[int, ...] = ()
    """UNets only: which encoders of the stack feed it: SDXL base `[0, 1]`, its refiner `[1]`, SD `[0]`."""
    inpainting: bool = False
    """UNets only: beside the latents it reads a mask and what that leaves of the picture (9 channels instead of 4)."""
    force_zeros_for_empty_prompt: bool = False
    """UNets only: an absent negative prompt is a zero embedding (SDXL base), not the empty text's."""
    scheduler: SchedulerSettings = SchedulerSettings()
    """UNets only: what its files say otherwise, or do not say."""
    base: str | None = None
    """ControlNets only: id of the UNet it steers."""
    union: bool = False
    """ControlNets only: one set of weights for several controls, told apart by a mode (ControlNetUnionModel)."""

    @model_validator(mode="after")
    def _check_upscaler(self) -> ComponentSpec:
        upscales = self.kind == "upscaler"
        if upscales != (self.family == "any"):
            raise ValueError(f"component {self.id}: upscalers have no family, and everything else has one")
        if (self.file is not None) != (upscales and not isinstance(self.source, CheckpointSource)):
            raise ValueError(f"component {self.id}: `file` names an upscaler in a folder or repository, nothing else")
        return self
