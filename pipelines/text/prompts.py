"""The texts of a request -> what each text encoder reads. No tensors: the ingress decides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from config.catalog import ComponentSpec, StylePreset
from pipelines.plan import EmbeddingUse, GenerationParams, TextPlan, TextReading
from pipelines.text.syntax import LoraTag, check_weights, take_lora_tags


@dataclass(frozen=True)
class Prompts:
    """The four texts with the style applied and LoRA tags taken out, and how they are read."""

    prompt: str
    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    reading: TextReading
    lora_tags: tuple[LoraTag, ...] = ()
    embeddings: Mapping[str, tuple[EmbeddingUse, ...]] = field(default_factory=dict)
    """The textual inversions that the texts name, by the UNets that have them."""

    @classmethod
    def create(cls, params: GenerationParams, style: StylePreset | None, reading: TextReading) -> Prompts:
        """Apply the style: its template to `prompt`, its negative text after the caller's.

        The `_2` prompts are left as they came: who writes one wants that encoder to read exactly it. LoRA tags count in
        the two positive texts; elsewhere they are text, as in A1111.

        Raises:
            InvalidValueError: a weight out of range, or a LoRA tag that cannot be read.
        """
        prompt, negative = params.prompt, params.negative_prompt
        if style is not None:
            prompt, negative = style.applied(prompt, negative)
        if reading.syntax == "plain":
            return cls(prompt, params.prompt_2, negative, params.negative_prompt_2, reading)
        prompt, tags = take_lora_tags(prompt, "prompt")
        prompt_2, tags_2 = take_lora_tags(params.prompt_2 or "", "prompt_2")
        read = cls(prompt, prompt_2 or None, negative, params.negative_prompt_2, reading, tags + tags_2)
        for param in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            check_weights(getattr(read, param) or "", param)
        return read

    def plan(self, unet: ComponentSpec) -> TextPlan:
        """Hand each encoder its text as diffusers' `encode_prompt` does: in order, a missing `_2` repeats the first.

        The refiner has one encoder, so it reads `prompt`, as StableDiffusionXLImg2ImgPipeline does.
        """
        count = len(unet.text_encoders)
        negative, negative_2 = self.negative_prompt, self.negative_prompt_2
        prompts = (self.prompt, self.prompt_2 or self.prompt)[:count]
        if negative is None and negative_2:
            negative = ""  # diffusers drops a lone negative_prompt_2; here it is read, as if negative_prompt were ""
        if negative is None and unet.force_zeros_for_empty_prompt:
            negatives = None
        else:
            negatives = (negative or "", negative_2 or negative or "")[:count]
        return TextPlan(
            encoders=unet.text_encoders,
            prompts=prompts,
            negative_prompts=negatives,
            embeddings=self.embeddings.get(unet.id, ()),
            reading=self.reading,
        )
