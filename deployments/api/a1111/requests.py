"""A1111's requests for pictures: fields with an effect here, and fields of which only the default is possible."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from pipelines.enlargement import MAX_HIRES_STEPS, MAX_SCALE, MIN_SCALE
from pipelines.plan import (
    MAX_CFG_SCALE,
    MAX_CLIP_SKIP,
    MAX_ETA,
    MAX_INPAINT_PADDING,
    MAX_MASK_BLUR,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRENGTH,
    MIN_CFG_SCALE,
    MIN_CLIP_SKIP,
    MIN_ETA,
    MIN_SIDE,
    MIN_STEPS,
    MIN_STRENGTH,
    SEED_LIMIT,
)

MOST_PICTURES = 32
"""Of one request: `batch_size` x `n_iter`."""
WORDS_FOR_NOTHING = frozenset({"", "n/a", "none", "use same checkpoint", "use same sampler", "use same scheduler"})
"""Values that clients send for names that are not set."""
_NONE_SAYS_SOMETHING = frozenset({"prompt", "negative_prompt", "hr_prompt", "hr_negative_prompt", "hr_upscaler"})


class WebuiRequest(BaseModel):
    """The fields of both routes. Unknown fields are ignored; `null` means absent."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not _is_unset(name, value)}

    prompt: str = Field("", max_length=20_000, description="Read with weights, BREAK and <lora:name:weight>.")
    negative_prompt: str = Field("", max_length=20_000)
    styles: list[str] = Field([], max_length=20, description="See /sdapi/v1/prompt-styles.")
    seed: int = Field(-1, ge=-1, lt=SEED_LIMIT, description="-1 is random; picture i has seed + i.")
    subseed: int = Field(-1, description="Not used: see subseed_strength.")
    subseed_strength: FiniteFloat = Field(0, description="0: there are no variation seeds here.")
    seed_resize_from_h: int = Field(0, description="0 or less: not possible here.")
    seed_resize_from_w: int = Field(0, description="0 or less: not possible here.")
    sampler_name: str | None = Field(None, max_length=200, description="See /sdapi/v1/samplers.")
    sampler_index: str | int | None = Field(None, description="The same, where sampler_name is absent.")
    scheduler: str | None = Field(None, max_length=200, description="See /sdapi/v1/schedulers.")
    batch_size: int = Field(1, ge=1, le=MOST_PICTURES)
    n_iter: int = Field(1, ge=1, le=MOST_PICTURES, description=f"batch_size x n_iter is {MOST_PICTURES} at most.")
    steps: int | None = Field(None, ge=MIN_STEPS, le=MAX_STEPS, description="Default: the model's.")
    cfg_scale: FiniteFloat | None = Field(None, ge=MIN_CFG_SCALE, le=MAX_CFG_SCALE, description="Default: the model's.")
    width: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE, description="Default: the model's.")
    height: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE, description="Default: the model's.")
    clip_skip: int | None = Field(
        None, ge=MIN_CLIP_SKIP, le=MAX_CLIP_SKIP, description="The field of sd.cpp's clients."
    )
    model: str | None = Field(
        None, max_length=200, description="The field of sd.cpp's clients; override_settings take precedence."
    )
    denoising_strength: FiniteFloat | None = Field(None, ge=MIN_STRENGTH, le=MAX_STRENGTH, description="Default 0.75.")
    eta: FiniteFloat | None = Field(
        None, ge=MIN_ETA, le=MAX_ETA, description="Used by the sampler DDIM; with others, 0 and 1 are ignored."
    )
    restore_faces: bool = Field(False, description="Not possible here.")
    tiling: bool = Field(False, description="Not possible here.")
    s_churn: FiniteFloat = Field(0, description="0: not possible here.")
    s_noise: FiniteFloat = Field(1, description="1: not possible here.")
    refiner_checkpoint: str | None = Field(None, max_length=200, description="The model's own refiner.")
    refiner_switch_at: FiniteFloat | None = Field(None, description="0.8, or 1 for no refiner.")
    override_settings: dict[str, Any] = Field({}, description="Options of this request alone.")
    send_images: bool = True
    script_name: str | None = Field(None, max_length=200, description="There are no scripts here.")
    alwayson_scripts: dict[str, Any] = Field({}, description="Only ControlNet is supported.")

    @property
    def count(self) -> int:
        """Number of requested pictures."""
        return self.batch_size * self.n_iter

    @property
    def sampler(self) -> str | None:
        """The requested sampler, by A1111's name."""
        if self.sampler_name is not None:
            return self.sampler_name
        return self.sampler_index if isinstance(self.sampler_index, str) else None


class Txt2ImgRequest(WebuiRequest):
    """`POST /sdapi/v1/txt2img`."""

    enable_hr: bool = Field(False, description="A second pass at a larger size; denoising_strength is its own.")
    hr_scale: FiniteFloat = Field(2.0, ge=MIN_SCALE, le=MAX_SCALE)
    hr_upscaler: str = Field("Latent", max_length=200, description="See /sdapi/v1/upscalers and latent-upscale-modes.")
    hr_second_pass_steps: int = Field(
        0, ge=0, le=MAX_HIRES_STEPS, description="All of these steps run; 0 means as many as steps."
    )
    hr_resize_x: int = Field(0, ge=0, le=MAX_SIDE, description="Its width, in place of hr_scale.")
    hr_resize_y: int = Field(0, ge=0, le=MAX_SIDE, description="Its height, in place of hr_scale.")
    hr_prompt: str = Field(
        "", max_length=20_000, description="Must equal prompt or be empty: both passes have one prompt."
    )
    hr_negative_prompt: str = Field("", max_length=20_000, description="Must equal negative_prompt or be empty.")
    hr_checkpoint_name: str | None = Field(None, max_length=200, description="That of both passes.")
    hr_sampler_name: str | None = Field(None, max_length=200, description="That of both passes.")
    hr_scheduler: str | None = Field(None, max_length=200, description="That of both passes.")
    firstphase_width: int = Field(0, description="0: send width and height of the first pass.")
    firstphase_height: int = Field(0, description="0: send width and height of the first pass.")


class Img2ImgRequest(WebuiRequest):
    """`POST /sdapi/v1/img2img`."""

    init_images: list[str] = Field([], description="One picture, in base64 or as a data URI.")
    resize_mode: int = Field(
        0, ge=0, le=3, description="0 stretches the picture; other values are possible where shapes agree."
    )
    mask: str | None = Field(
        None, description="A mask of the picture's size: white, or in a transparent picture opaque, is repainted."
    )
    mask_blur: int = Field(4, ge=0, le=MAX_MASK_BLUR)
    inpainting_fill: Literal[0, 1, 2, 3] = Field(0, description="0 fill, 1 original, 2 latent noise, 3 latent nothing.")
    inpaint_full_res: bool = Field(True, description="Draw only the masked area, at width x height.")
    inpaint_full_res_padding: int = Field(0, ge=0, le=MAX_INPAINT_PADDING)
    inpainting_mask_invert: Literal[0, 1] = Field(0, description="1: black is repainted.")
    initial_noise_multiplier: FiniteFloat = Field(1, description="1: not possible here.")
    include_init_images: bool = False


class WebuiReply(BaseModel):
    """Pictures."""

    images: list[str]
    """Base64, no data-URI prefix, in the format of option `samples_format`."""
    parameters: dict[str, Any]
    """The request."""
    info: str
    """JSON: seeds, prompts and infotexts of the pictures."""


def _is_unset(name: str, value: Any) -> bool:
    """Whether a value means absent: null, or a word for none in a field of names."""
    if value is None:
        return True
    if name in _NONE_SAYS_SOMETHING:
        return bool(value == "")
    return isinstance(value, str) and value.strip().casefold() in WORDS_FOR_NOTHING
