"""OpenAI's image requests: its own fields, and ours and other servers' by the names their clients know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import AliasChoices, Field, FiniteFloat, model_validator

from config.catalog import Catalog
from config.choices import UnknownChoiceError
from deployments.api.schemas import PictureRequest
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams

MOST_PICTURES, MOST_PARTIALS = 10, 3
STEPS_FOR_QUALITY = {"low": 0.5, "medium": 1, "standard": 1, "auto": 1, "high": 1.5, "hd": 1.5, "xhigh": 2, "max": 2}
"""Steps for each quality, in shares of the model's own."""
FAITHFUL_STRENGTH = 0.5
"""Strength of an edit whose `input_fidelity` is high."""
_SPELLINGS = {"true_cfg_scale": "cfg_scale", "image_url": "image", "image_loras": "loras", "lora": "loras"}
"""Names of Qwen-Image's servers and of Together."""


class ImageRequest(PictureRequest):
    """OpenAI's request for pictures. `model` is optional; every field of `/v1/image/generation` works here too."""

    model_name: str = Field(
        "",
        max_length=200,
        validation_alias=AliasChoices("model_name", "model"),
        description="The catalog's default if absent; the catalog also maps names such as gpt-image-1.",
    )
    n: int | None = Field(None, ge=1, le=MOST_PICTURES, description="Pictures, of consecutive seeds; default 1.")
    size: str | None = Field(None, pattern=r"^(auto|\d{2,5}x\d{2,5})$", description="WIDTHxHEIGHT or auto.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None,
        description="How many steps, if `steps` is absent: low half of the model's, high and hd 1.5 times as many.",
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures have no transparent parts.")
    style: Literal["vivid"] | None = Field(None, description="The default of dall-e-3; see style_preset for styles.")
    response_format: Literal["b64_json", "base64", "url"] | None = Field(
        None,
        description="b64_json (default), or url: a signed link that expires where the server has a store for "
        "pictures, else a data URI. base64 is Together's word for b64_json.",
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP; default 95.")
    stream: bool | None = Field(None, description="Server-sent events: partial images, then each finished picture.")
    partial_images: int | None = Field(None, ge=0, le=MOST_PARTIALS, description="With stream; default 0.")
    reference_images: list[Any] | None = Field(None, description="Not possible here; `image` is img2img.")
    frame_count: int | None = Field(None, ge=1, le=1, description="Pictures do not move.")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {k: v for k, v in data.items() if not _is_unset(k, v)}
        for other, ours in _SPELLINGS.items():
            if other in kept:
                value = kept.pop(other)
                kept.setdefault(ours, value)
        if "loras" in kept:
            kept["loras"] = _mixture(kept["loras"])
        for name in {"hires", "controlnets"} & kept.keys():
            kept[name] = _from_json(kept[name])
        return kept

    @property
    def count(self) -> int:
        """Number of requested pictures."""
        return self.n or 1

    def for_model(self, catalog: Catalog) -> GenerationParams:
        """The parameters of the request; the model decides how many steps a quality means.

        Raises:
            InvalidValueError: a value that cannot be honoured.
        """
        if self.reference_images:
            raise InvalidValueError("reference_images is not possible here: send one picture as 'image'", "image")
        model = self.model_name or catalog.default_model()
        return self.to_params(
            model_name=model,
            steps=self.steps if self.steps is not None else self._steps(model, catalog),
            output_format=self.output_format or "png",
            output_quality=self.output_compression,
            **self._size(),
        )

    def _size(self) -> dict[str, int]:
        if self.size in (None, "auto"):
            return {}
        width, height = map(int, str(self.size).split("x"))
        if (self.width or width, self.height or height) != (width, height):
            raise InvalidValueError(f"size '{self.size}' and width and height disagree; send either", "size")
        return {"width": width, "height": height}

    def _steps(self, model: str, catalog: Catalog) -> int | None:
        share = STEPS_FOR_QUALITY[self.quality or "auto"]
        if share == 1:
            return None
        try:
            defaults = catalog.model(catalog.model_choices().resolve(model)).defaults
        except UnknownChoiceError:
            return None  # planning refuses the model
        return max(1, round(defaults.steps * share))


class EditRequest(ImageRequest):
    """OpenAI's request to change a picture. In a form `image` and `mask` are files."""

    image: Any = Field(None, description="The picture: in a form a file, in JSON base64 or a data URI.")
    images: list[Any] | None = Field(None, description='In JSON: [{"image_url": "data:..."}].')
    mask: Any = Field(
        None, description="A PNG that is transparent where the picture is repainted, or, without transparency, white."
    )
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="high keeps more of the picture: strength 0.5 unless strength is given."
    )
    markup: Any = Field(None, description="Not possible here; send a mask.")

    def for_edit(self, catalog: Catalog, source: bytes, size: Mapping[str, int]) -> GenerationParams:
        """The edit of `source`; `size` is what `auto` means."""
        if self.markup is not None:
            raise InvalidValueError("markup is not possible here; send a mask", "markup")
        self.image = None
        if self.strength is None and self.input_fidelity == "high":
            self.strength = FAITHFUL_STRENGTH
        if self.size in (None, "auto") and self.width is None and self.height is None:
            self.width, self.height = size["width"], size["height"]
        return replace(self.for_model(catalog), image=source)


def _is_unset(name: str, value: Any) -> bool:
    """Null, or an empty string in a field that cannot be empty: forms and careless clients send both."""
    return value is None or (value == "" and isinstance(value, str) and name not in ("prompt", "negative_prompt"))


def _from_json(value: Any) -> Any:
    """The value of a form's field, decoded if it is JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _mixture(loras: Any) -> Any:
    """LoRAs as name -> weight, whether they come so, as JSON in a form, or as the lists of Together and vLLM-Omni."""
    loras = _from_json(loras)
    if isinstance(loras, dict) and isinstance(loras.get("name", loras.get("path")), str):
        loras = [loras]
    if not isinstance(loras, list) or not all(isinstance(one, dict) for one in loras):
        return loras
    named = [(one.get("name", one.get("path")), one.get("scale", one.get("weight", 1.0))) for one in loras]
    if len({str(name) for name, _ in named}) < len(named):
        raise InvalidValueError("loras: a name is given twice", "loras")
    return dict(named) if all(isinstance(name, str) for name, _ in named) else loras


FiniteNumber = FiniteFloat
