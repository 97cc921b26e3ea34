"""A picture made larger without a model, as Pillow does it."""

from __future__ import annotations

from PIL import Image

from pipelines.pictures.images import EncodedImage, read_whole_image, write_image
from pipelines.plan import StagePlan
from pipelines.upscale import UpscalePlan

RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
"""Of each of `PICTURE_METHODS`."""


def enlarged(image: Image.Image, stage: StagePlan) -> Image.Image:
    """An RGB picture, resized to a second pass's stage by the method that it names."""
    assert stage.enlargement is not None
    return image.resize((stage.width, stage.height), RESAMPLING[stage.enlargement.upscaler])


def enlarged_file(data: bytes, plan: UpscalePlan) -> EncodedImage:
    """The file of a sent picture, resized."""
    image = read_whole_image(data, "image").resize((plan.width, plan.height), RESAMPLING[plan.upscaler])
    return write_image(image, plan.output_format, plan, plan.output_quality)
