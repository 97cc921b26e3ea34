"""The types of a request (GenerationParams) and of the decisions about it (GenerationPlan), without tensors.

A plan is frozen, serialisable and complete: the same plan gives the same picture. The refiner is the second StagePlan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from config.precision import Precision
from pipelines.control_plan import ControlParams, ControlUse
from pipelines.enlargement import Enlargement, HiresParams

BackendName = Literal["torch", "tvm"]
OutputFormat = Literal["jpeg", "png", "webp"]
OUTPUT_QUALITY = 95
"""Of JPEG and WebP, 0 to 100."""
PromptSyntax = Literal["plain", "weighted"]
"""`plain` text is read as it stands; `pipelines/text/syntax.py` says what `weighted` text may hold."""
Emphasis = Literal["Original", "No norm", "Ignore"]
"""What weights do to embeddings, by AUTOMATIC1111's names; see `pipelines/text/emphasis.py`."""
InpaintArea = Literal["whole", "masked"]
"""Whether the whole picture is drawn at the plan's size, or what is masked, cut out of the picture."""
InpaintFill = Literal["original", "noise", "surroundings", "nothing"]
"""What the masked part begins from before it is noised: itself, noise, the colours around it, latents of zero."""
LongPrompt = Literal["chunk", "cut"]
"""A prompt longer than a text encoder's context is read in chunks, or cut as CLIP's own tokenizer does."""

# What a request may ask for: planning checks it, and the API says it in its schema.
SEED_LIMIT = 2**32
"""Seeds are 0 to this, itself excluded."""
MIN_SIDE, MAX_SIDE = 128, 2496
"""Width and height in pixels."""
MIN_STEPS, MAX_STEPS = 1, 1000
MIN_CFG_SCALE, MAX_CFG_SCALE = 0, 50
MIN_STRENGTH, MAX_STRENGTH = 0, 1
MIN_GUIDANCE_RESCALE, MAX_GUIDANCE_RESCALE = 0, 1
MIN_ETA, MAX_ETA = 0, 1
MAX_MASK_BLUR = 64
"""Standard deviation of the blur, in pixels of the sent picture."""
MAX_INPAINT_PADDING = 256
"""In pixels of the sent picture."""
MIN_CLIP_SKIP, MAX_CLIP_SKIP = 1, 12
REFINER_SHARE = 0.8
"""The base runs this share of the schedule, the refiner the rest: the ensemble of experts of SDXL, arXiv:2307.01952."""


@dataclass(frozen=True, kw_only=True)
class GenerationParams:
    """A request without HTTP. None means absent; the model's defaults fill it."""

    model_name: str
    prompt: str
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    prompt_syntax: str = "plain"
    emphasis: str = "Original"
    long_prompt: str = "chunk"
    clip_skip: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    eta: float = 0.0
    sampler: str | None = None
    seed: int | None = None
    style_preset: str | None = None
    backend: str = "auto"
    image: bytes | None = None
    strength: float | None = None
    mask_image: bytes | None = None
    mask_blur: float = 0.0
    inpaint_area: str = "whole"
    inpaint_padding: int = 32
    inpaint_fill: str = "original"
    enable_refiner: bool = False
    hires: HiresParams | None = None
    controlnet_name: str | None = None
    controlnet_image: bytes | None = None
    controlnet_preprocess: bool = True
    controlnets: tuple[ControlParams, ...] = ()
    loras: Mapping[str, float | PartWeights] = field(default_factory=dict)
    output_format: OutputFormat = "jpeg"
    output_quality: int | None = None

    @property
    def controls(self) -> tuple[ControlParams, ...]:
        """The controls of the picture: `controlnets`, or the one of `controlnet_name` and `controlnet_image`."""
        if self.controlnet_name is None or self.controlnet_image is None:
            return self.controlnets
        one = ControlParams(
            name=self.controlnet_name, image=self.controlnet_image, preprocess=self.controlnet_preprocess
        )
        return (one, *self.controlnets)

    @property
    def pictures(self) -> tuple[tuple[str, bytes], ...]:
        """Every picture that came with the request, and the field it came in."""
        single = {"image": self.image, "mask_image": self.mask_image, "controlnet_image": self.controlnet_image}
        listed = (("controlnets", control.image) for control in self.controlnets)
        return (*((param, data) for param, data in single.items() if data is not None), *listed)


@dataclass(frozen=True)
class CompiledSize:
    """A picture size that a UNet is compiled for on this server."""

    component: str
    """The UNet."""
    width: int
    height: int
    """Width and height are in pixels."""
    control: bool
    """Whether ControlNets may steer it."""
    speedup: float
    """How many times as fast as torch it was when its replica started."""
    precision: Precision = "float32"
    """What it multiplies."""
    loras: bool = False
    """Whether requests may bring LoRAs."""

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class _Plan(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextReading(_Plan):
    """How text encoders read the texts of a picture.

    `clip_skip` counts hidden states from the end, 1 being the last one; a family whose UNets read an earlier one by
    default (SDXL: 2) begins there. `max_chunks` is what the model allows one text.
    """

    syntax: PromptSyntax = "plain"
    emphasis: Emphasis = "Original"
    long_prompt: LongPrompt = "chunk"
    clip_skip: int = 1
    max_chunks: int = 16


class EmbeddingUse(_Plan):
    """One textual inversion that a text names; `file` and `version` as of a `LoraUse`."""

    name: str
    file: str | None = None
    version: str | None = None


class TextPlan(_Plan):
    """What each text encoder of a stage reads. One entry an encoder, styles applied.

    `negative_prompts` None means a zero embedding as the unconditional one (SDXL base without a negative prompt).
    """

    encoders: tuple[int, ...]
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...] | None
    embeddings: tuple[EmbeddingUse, ...] = ()
    """Textual inversions that the texts name as `<name>`."""
    reading: TextReading = TextReading()


class ScheduleSlice(_Plan):
    """Which part of a schedule a stage runs.

    `strength` begins late on a noised picture (img2img); `start` begins where another stage stopped; `end` stops early.
    Shares are of the training timesteps, as diffusers' `denoising_start` and `denoising_end`. `eta` is how much noise
    the steps of DDIM draw anew (eq. 16 of Song et al. 2020, arXiv:2010.02502); no other sampler has one.
    """

    steps: int
    strength: float | None = None
    start: float | None = None
    end: float | None = None
    eta: float = 0.0

    @property
    def steps_run(self) -> int:
        """Steps that `strength` leaves, as in diffusers."""
        return self.steps if self.strength is None else int(self.steps * self.strength)


class PartWeights(_Plan):
    """A LoRA's weight for each part of a model. As in diffusers, a part that is not named has weight 1."""

    unet: FiniteFloat | None = None
    text_encoder: FiniteFloat | None = None
    """Of every text encoder, unless the second one has its own."""
    text_encoder_2: FiniteFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_the_parts(cls, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := [str(key) for key in data if key not in cls.model_fields]):
            raise ValueError(
                f"unexpected part '{unknown[0]}' of a LoRA's weights. Only {list(cls.model_fields)} allowed"
            )
        return data


class LoraUse(_Plan):
    """One LoRA of a mixture, by its canonical name.

    `file` and `version` say which file it was where the name is a library's: its path there, and what changes with it.
    """

    name: str
    weight: float
    """The UNet's, and the text encoders' where these have none of their own."""
    text_encoder: float | None = None
    text_encoder_2: float | None = None
    file: str | None = None
    version: str | None = None

    def weight_of(self, part: str) -> float:
        """Of `unet`, `text_encoder` or `text_encoder_2`."""
        second = self.text_encoder if self.text_encoder_2 is None else self.text_encoder_2
        own = {"unet": self.weight, "text_encoder": self.text_encoder, "text_encoder_2": second}[part]
        return self.weight if own is None else own

    def as_requested(self) -> float | dict[str, float]:
        """The weight as a request gives it: a number, or one for each part."""
        if self.text_encoder is None:
            return self.weight
        weights = {"unet": self.weight, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {part: weight for part, weight in weights.items() if weight is not None}


class InpaintPlan(_Plan):
    """How a part of a picture is repainted; picture and mask come beside the plan.

    `blur` and `padding` are in pixels of the sent picture; `padding` is what is drawn around a masked part.
    """

    blur: float = 0.0
    area: InpaintArea = "whole"
    padding: int = 32
    fill: InpaintFill = "original"


class StagePlan(_Plan):
    """What one denoiser does for one picture."""

    component: str
    backend: BackendName
    precision: Precision | None = None
    """What a compiled UNet multiplies; None on torch, where the replica's device decides."""
    sampler: str
    schedule: ScheduleSlice
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    text: TextPlan
    width: int
    height: int
    seed: int
    loras: tuple[LoraUse, ...] = ()
    controls: tuple[ControlUse, ...] = ()
    inpaint: InpaintPlan | None = None
    enlargement: Enlargement | None = None
    """At the head of a second pass: how the latents of the stage before become as large as this one."""
    reads_mask: bool = False
    """The UNet is one for inpainting. Where no mask was sent, all of the picture is masked."""

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs: as in diffusers, only above 1."""
        return self.guidance_scale > 1


class SourcePicture(_Plan):
    """The picture a request starts from, as far as its file tells."""

    sha256: str
    """Of the file, in hexadecimal."""
    digital_source_type: str | None = None
    """How it says that it was made: a term of IPTC's vocabulary."""

    @classmethod
    def of(cls, file: bytes, digital_source_type: str | None) -> SourcePicture:
        """The picture in `file`."""
        return cls(sha256=hashlib.sha256(file).hexdigest(), digital_source_type=digital_source_type)


class GenerationPlan(_Plan):
    """A picture, decided."""

    model: str
    seed: int
    width: int
    height: int
    """Width and height are the first pass's; `size` is that of the last stage."""
    text_encoder: str
    vae: str
    stages: tuple[StagePlan, ...]
    output_format: OutputFormat = "jpeg"
    output_quality: int = OUTPUT_QUALITY
    source: SourcePicture | None = None
    """Set by the server, which has the file, for requests that start from one."""

    @property
    def ai_system(self) -> str | None:
        """The model that a picture's file names."""
        return self.model

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what the last stage draws, in pixels."""
        return self.stages[-1].width, self.stages[-1].height

    @property
    def second_pass(self) -> StagePlan | None:
        """The stage that begins a second pass."""
        return next((stage for stage in self.stages if stage.enlargement is not None), None)

    @property
    def refined(self) -> bool:
        """Whether a refiner draws the end."""
        return self.stages[-1].schedule.start is not None

    @property
    def pixel_steps(self) -> int:
        """What the picture costs, by the request: steps x width x height, of both passes."""
        cost, second = self.stages[0].schedule.steps * self.width * self.height, self.second_pass
        return cost if second is None else cost + second.schedule.steps_run * second.width * second.height
