"""Requests and replies of Hyperbolic's API, field by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, Tag, model_validator

from deployments.api.controls import ControlRequest
from deployments.api.encoding import decode_base64
from pipelines.control_plan import MAX_CONTROLS
from pipelines.enlargement import HiresParams
from pipelines.plan import (
    MAX_CFG_SCALE,
    MAX_CLIP_SKIP,
    MAX_ETA,
    MAX_GUIDANCE_RESCALE,
    MAX_INPAINT_PADDING,
    MAX_MASK_BLUR,
    MAX_SIDE,
    MAX_STEPS,
    MAX_STRENGTH,
    MIN_CFG_SCALE,
    MIN_CLIP_SKIP,
    MIN_ETA,
    MIN_GUIDANCE_RESCALE,
    MIN_SIDE,
    MIN_STEPS,
    MIN_STRENGTH,
    SEED_LIMIT,
    Emphasis,
    GenerationParams,
    InpaintArea,
    InpaintFill,
    LongPrompt,
    OutputFormat,
    PartWeights,
    PromptSyntax,
)

LoraWeight = Annotated[
    Annotated[FiniteFloat, Tag("weight")] | Annotated[PartWeights, Tag("weights")],
    Discriminator(lambda given: "weights" if isinstance(given, dict | PartWeights) else "weight"),
]
"""A number, or one for each part. The form is decided first, so that an error is about the one that was sent."""
RANDOM_SEED = -1
"""What A1111, ComfyUI and their clients send for a random seed."""


def _without_unset(data: Any, empty_is_unset: frozenset[str]) -> Any:
    """A body without its nulls, and without the empty strings of optional fields that cannot be empty.

    Clients send both for fields they do not set; a null must not hide the field's other spelling either.
    """
    if not isinstance(data, dict):
        return data
    return {
        name: value
        for name, value in data.items()
        if value is not None and not (value == "" and isinstance(value, str) and name in empty_is_unset)
    }


class PictureRequest(BaseModel):
    """The fields that all dialects share. Unknown fields are ignored and `null` means absent: real clients do so."""

    model_config = ConfigDict(protected_namespaces=(), extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        return _without_unset(data, _HYPERBOLIC_UNSET)

    model_name: str = Field(max_length=200, examples=["SDXL1.0-base"], description="See /v1/models.")
    prompt: str = Field(min_length=1, max_length=20_000, description="What the picture shows.")
    prompt_2: str | None = Field(None, max_length=20_000, description="For the second text encoder; SDXL family only.")
    negative_prompt: str | None = Field(None, max_length=20_000, description="What the picture should not show.")
    negative_prompt_2: str | None = Field(None, max_length=20_000, description="SDXL family only.")
    prompt_syntax: str | None = Field(
        None,
        max_length=200,
        examples=list(get_args(PromptSyntax)),
        description="plain (default): the prompts are read literally. weighted: A1111's syntax applies: (x), [x], "
        "(x:1.3), a backslash before a bracket that is text, BREAK, <lora:name:weight>; weights are -100 to 100.",
    )
    emphasis: str | None = Field(
        None,
        max_length=200,
        examples=list(get_args(Emphasis)),
        description="How weights of words act: Original (default) scales each chunk back to its mean, No norm does "
        "not, Ignore drops the weights.",
    )
    long_prompt: str | None = Field(
        None,
        max_length=200,
        examples=list(get_args(LongPrompt)),
        description="chunk (default): a prompt longer than the text encoder's context is read in chunks. cut: its end "
        "is dropped. The header x-prompt-tokens has the length.",
    )
    clip_skip: int | None = Field(
        None,
        ge=MIN_CLIP_SKIP,
        le=MAX_CLIP_SKIP,
        description="Which hidden state of the text encoder is read, counted from its end as in A1111: 1 (default) is "
        "the last. SDXL reads the one before it, so 1 and 2 are the same there. The same value of diffusers is "
        "smaller by 1, with SDXL by 2.",
    )
    width: int | None = Field(
        None, ge=MIN_SIDE, le=MAX_SIDE, description="Pixels; the model's default if absent (1024)."
    )
    height: int | None = Field(
        None, ge=MIN_SIDE, le=MAX_SIDE, description="Pixels; the model's default if absent (1024)."
    )
    backend: str | None = Field(
        None, max_length=200, examples=["auto", "tvm", "torch"], description="auto, tvm or torch."
    )
    image: str | None = Field(None, description="Base64 PNG, JPEG or WebP, or a data URI: the picture to start from.")
    strength: FiniteFloat | None = Field(
        None, ge=MIN_STRENGTH, le=MAX_STRENGTH, description="How much of `image` is repainted; default 0.8."
    )
    mask_image: str | None = Field(
        None,
        description="A mask of the size of `image`: white is repainted, black is returned bit for bit. Base64 or a "
        "data URI.",
    )
    mask_blur: FiniteFloat | None = Field(
        None, ge=0, le=MAX_MASK_BLUR, description="Blur of the mask's edge in pixels; default 0."
    )
    inpaint_area: str | None = Field(
        None,
        max_length=200,
        examples=list(get_args(InpaintArea)),
        description="whole (default): the picture is drawn at width x height. masked: the masked area is cut out, "
        "drawn at width x height and pasted into the picture, which keeps its own size.",
    )
    inpaint_padding: int | None = Field(
        None,
        ge=0,
        le=MAX_INPAINT_PADDING,
        description="Margin in pixels that is cut out around a masked area; default 32.",
    )
    inpaint_fill: str | None = Field(
        None,
        max_length=200,
        examples=list(get_args(InpaintFill)),
        description="What the repainted area starts from: original (default), noise, surroundings, nothing.",
    )
    seed: int | None = Field(
        None,
        ge=RANDOM_SEED,
        lt=SEED_LIMIT,
        description="-1 or absent means random; the reply contains the seed that was used.",
    )
    cfg_scale: FiniteFloat | None = Field(
        None,
        ge=MIN_CFG_SCALE,
        le=MAX_CFG_SCALE,
        validation_alias=AliasChoices("cfg_scale", "guidance_scale"),
        description="How strongly the prompt guides; default 5. At 1 and below there is no guidance.",
    )
    guidance_rescale: FiniteFloat | None = Field(
        None,
        ge=MIN_GUIDANCE_RESCALE,
        le=MAX_GUIDANCE_RESCALE,
        description="How far the guided prediction is scaled back to the contrast without guidance (arXiv:2305.08891); "
        "default 0.",
    )
    guidance_start: FiniteFloat | None = Field(
        None,
        ge=0,
        le=1,
        description="Where guidance begins, as a share of the noise schedule; 0 (default) is pure noise.",
    )
    guidance_end: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Where guidance ends; default 1. Steps outside the window cost half as much."
    )
    eta: FiniteFloat | None = Field(
        None, ge=MIN_ETA, le=MAX_ETA, description="How much new noise each step of the sampler DDIM adds; default 0."
    )
    sampler: str | None = Field(None, max_length=200, description="See /v1/samplers; default DPM++ 2M SDE Heun Karras.")
    steps: int | None = Field(
        None,
        ge=MIN_STEPS,
        le=MAX_STEPS,
        validation_alias=AliasChoices("steps", "num_inference_steps"),
        description="Default 30.",
    )
    style_preset: str | None = Field(None, max_length=200, description="See /v1/styles.")
    enable_refiner: bool | None = Field(None, description="The SDXL refiner runs the last fifth of the schedule.")
    hires: HiresParams | None = Field(
        None,
        description="A second pass that redraws the picture larger (A1111's hires fix). Its noise starts anew from "
        "`seed`; the refiner draws only in the second pass.",
    )
    controlnet_name: str | None = Field(None, max_length=200, description="See /v1/controlnets.")
    controlnet_image: str | None = Field(None, description="Base64 or a data URI: the photo that steers the picture.")
    controlnet_preprocess: bool | None = Field(
        None, description="False if controlnet_image already is the control map."
    )
    controlnets: list[ControlRequest] | None = Field(
        None,
        description=f"Up to {MAX_CONTROLS} controls at once, with any model that has ControlNets; in place of "
        "controlnet_name and controlnet_image.",
        json_schema_extra={"maxItems": MAX_CONTROLS},
    )
    loras: dict[str, LoraWeight] | None = Field(
        None,
        validation_alias=AliasChoices("loras", "lora"),
        description="Each name maps to a weight, or to {unet, text_encoder, text_encoder_2}, where an absent weight "
        "is 1; text_encoder applies to both of SDXL's if text_encoder_2 is absent.",
    )
    output_format: OutputFormat | None = Field(None, description="Default jpeg.")

    def to_params(self, **changes: Any) -> GenerationParams:
        """The request without HTTP, but for `changes`; raises InvalidValueError for broken base64."""
        params = GenerationParams(
            model_name=self.model_name,
            prompt=self.prompt,
            prompt_2=self.prompt_2,
            negative_prompt=self.negative_prompt,
            negative_prompt_2=self.negative_prompt_2,
            prompt_syntax=self.prompt_syntax or "plain",
            emphasis=self.emphasis or "Original",
            long_prompt=self.long_prompt or "chunk",
            clip_skip=self.clip_skip,
            width=self.width,
            height=self.height,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            guidance_rescale=self.guidance_rescale or 0.0,
            guidance_start=self.guidance_start or 0.0,
            guidance_end=1.0 if self.guidance_end is None else self.guidance_end,
            eta=self.eta or 0.0,
            sampler=self.sampler,
            seed=None if self.seed == RANDOM_SEED else self.seed,
            style_preset=self.style_preset,
            backend=self.backend or "auto",
            image=decode_base64(self.image, "image"),
            strength=self.strength,
            mask_image=decode_base64(self.mask_image, "mask_image"),
            mask_blur=self.mask_blur or 0.0,
            inpaint_area=self.inpaint_area or "whole",
            inpaint_padding=32 if self.inpaint_padding is None else self.inpaint_padding,
            inpaint_fill=self.inpaint_fill or "original",
            enable_refiner=bool(self.enable_refiner),
            hires=self.hires,
            controlnet_name=self.controlnet_name,
            controlnet_image=decode_base64(self.controlnet_image, "controlnet_image"),
            controlnet_preprocess=self.controlnet_preprocess is not False,
            controlnets=tuple(control.to_params(i) for i, control in enumerate(self.controlnets or ())),
            loras=self.loras or {},
            output_format=self.output_format or "jpeg",
        )
        return replace(params, **changes)


class GenerationRequest(PictureRequest):
    """Hyperbolic's image request."""

    stream: bool | None = Field(None, description="Answer server-sent events: progress, then the reply.")
    preview: bool | None = Field(None, description="With stream: also send small JPEGs of the unfinished picture.")


_HYPERBOLIC_UNSET = frozenset(
    {"prompt_2", "negative_prompt_2", "backend", "image", "sampler", "style_preset"}
    | {"controlnet_name", "controlnet_image", "output_format", "prompt_syntax", "emphasis", "long_prompt"}
    | {"mask_image", "inpaint_area", "inpaint_fill"}
)
"""Optional fields of which an empty string means absent.

`negative_prompt` is not among them: SDXL base embeds an absent one as zeros.
"""


class GeneratedImage(BaseModel):
    """One picture of a reply."""

    index: int
    image: str
    """Base64, no data-URI prefix."""
    random_seed: int


class GenerationResponse(BaseModel):
    """Hyperbolic's image reply; every field is always present."""

    images: list[GeneratedImage]
    inference_time: float
    """Seconds between the parsed request and the finished picture."""


class ErrorDetail(BaseModel):
    """The fields of every error."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(ErrorDetail):
    """The body of an error. The fields are repeated under `error`, because some clients read them there."""

    object: Literal["error"] = "error"
    error: ErrorDetail
    detail: list[dict[str, Any]] | None = None
