"""A picture made larger without a model, as Pillow does it."""

from __future__ import annotations

from PIL import Image

from pipelines.plan import StagePlan

RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
"""Of each of `PICTURE_METHODS`."""


def enlarged(image: Image.Image, stage: StagePlan) -> Image.Image:
    """An RGB picture, resized to a second pass's stage by the method that it names."""
    assert stage.enlargement is not None
    return image.resize((stage.width, stage.height), RESAMPLING[stage.enlargement.upscaler])
