"""Names that clients of other services use for models, and the default model of a catalog."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from config.sources import Spec


class ModelNames(Spec):
    """`model_names.yaml` of a catalog."""

    default: str | None = None
    """The first served model that takes any request, if absent or not served."""
    aliases: Mapping[str, str] = Field(default_factory=dict)
    """Name -> model, such as `gpt-image-1: SDXL1.0-base`."""
