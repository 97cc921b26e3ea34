"""Annotators: a photo -> the control map a ControlNet was trained on. A new one: a line in ANNOTATORS."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from pipelines.errors import InvalidValueError

CANNY_LOW, CANNY_HIGH = 100, 200
"""Thresholds of the ControlNet authors' own annotator (lllyasviel/ControlNet v1.1, `canny`)."""


def canny(photo: Image.Image) -> Image.Image:
    """White edges on black (Canny 1986), without weights."""
    edges = cv2.Canny(np.asarray(photo.convert("RGB")), CANNY_LOW, CANNY_HIGH)
    return Image.fromarray(edges).convert("RGB")


ANNOTATORS: dict[str, Callable[[Image.Image], Image.Image]] = {"canny": canny}


def annotate(name: str, photo: Image.Image) -> Image.Image:
    """The control map `[height, width]` RGB of a photo.

    Raises:
        InvalidValueError: no annotator of this name is here.
    """
    check_annotator(name)
    return ANNOTATORS[name](photo)


def check_annotator(name: str) -> None:
    """Raise InvalidValueError, naming the way out, when a photo cannot be turned into this control map here."""
    if name not in ANNOTATORS:
        raise InvalidValueError(
            f"controlnet_name '{name}': this server has no annotator for it. Send a ready control map with "
            f"controlnet_preprocess false, or use one of {sorted(ANNOTATORS)}",
            "controlnet_name",
        )
