"""The options of A1111's API that have an effect here, for each caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from config.catalog import Catalog, ModelSpec
from deployments.api.a1111.checkpoints import checkpoint, short_hash, title
from deployments.api.forms import validated
from pipelines.errors import InvalidValueError
from pipelines.plan import MAX_CLIP_SKIP, MIN_CLIP_SKIP, OUTPUT_QUALITY, Emphasis, OutputFormat

SampleFormat = Annotated[
    Literal["png", "jpg", "jpeg", "webp"], BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v)
]
OWN_VAE = ("automatic", "none")
"""What A1111 calls the VAE that comes with a model."""


class Options(BaseModel):
    """Options that a caller may set, by A1111's names; others are ignored."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    sd_model_checkpoint: str | None = Field(None, max_length=200, description="Default: the catalog's default model.")
    sd_vae: str | None = Field(None, max_length=200, description="Automatic, None or the name of the model's own VAE.")
    CLIP_stop_at_last_layers: int | None = Field(
        None, ge=MIN_CLIP_SKIP, le=MAX_CLIP_SKIP, description="Clip skip; as in A1111 it changes nothing with SDXL."
    )
    samples_format: SampleFormat | None = Field(None, description="Of the pictures in replies; default png.")
    jpeg_quality: int | None = Field(None, ge=1, le=100, description=f"Of JPEG and WebP; default {OUTPUT_QUALITY}.")
    emphasis: Emphasis | None = Field(None, description="How weights in prompts act; default Original.")
    live_previews_enable: bool | None = Field(
        None, description="Whether progress shows the unfinished picture; default true."
    )
    randn_source: Literal["CPU"] | None = Field(None, description="Noise is drawn on the CPU.")
    eta_noise_seed_delta: Literal[0] | None = Field(None, description="Noise of a picture has its own seed.")

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> Options:
        """Options merged from several layers; later ones win, and null or empty values are skipped.

        Raises:
            RequestValidationError: a value of another type or out of range.
        """
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= {n: value for n, value in layer.items() if n in cls.model_fields and value not in (None, "")}
        return validated(cls, merged)

    def kept(self) -> dict[str, Any]:
        """The options that a caller set, as they are stored."""
        return self.model_dump(exclude_none=True)

    def model(self, catalog: Catalog, default: str | None = None) -> ModelSpec:
        """The model that draws; `default` is what a body says outside its options."""
        if self.sd_model_checkpoint is not None:
            return checkpoint(self.sd_model_checkpoint, catalog)
        return checkpoint(default or catalog.default_model(), catalog)

    def check(self, model: ModelSpec) -> None:
        """Raise InvalidValueError for options that the model cannot honour."""
        if self.sd_vae is not None and self.sd_vae.casefold() not in (*OWN_VAE, model.vae.casefold()):
            raise InvalidValueError(
                f"sd_vae '{self.sd_vae}' is not the VAE of {model.name}. Only {['Automatic', 'None', model.vae]} "
                "allowed now; a checkpoint in a library names another one in its YAML file",
                "sd_vae",
            )

    @property
    def file_format(self) -> OutputFormat:
        """Ours of `samples_format`."""
        if self.samples_format == "webp":
            return "webp"
        return "jpeg" if self.samples_format in ("jpg", "jpeg") else "png"

    @property
    def quality(self) -> int | None:
        """Of the file; PNG has none."""
        return None if self.file_format == "png" else self.jpeg_quality

    def shown(self, catalog: Catalog) -> dict[str, Any]:
        """All options with their values, and further ones that clients read."""
        model = self.model(catalog)
        return {
            "sd_model_checkpoint": title(model, catalog),
            "sd_checkpoint_hash": short_hash(model, catalog),
            "sd_vae": self.sd_vae or "Automatic",
            "CLIP_stop_at_last_layers": self.CLIP_stop_at_last_layers or MIN_CLIP_SKIP,
            "samples_format": self.samples_format or "png",
            "jpeg_quality": self.jpeg_quality or OUTPUT_QUALITY,
            "emphasis": self.emphasis or "Original",
            "live_previews_enable": self.live_previews_enable is not False,
            "randn_source": "CPU",
            "eta_noise_seed_delta": 0,
        }
