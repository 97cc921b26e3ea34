"""What the parity suites share."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from pipelines.text2image import Text2Image


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A smooth picture with edges, larger than what it is resized to."""
    y, x = np.mgrid[0:300, 0:400]
    pixels = np.stack([x * 255 / 400, y * 255 / 300, 128 + 127 * np.sin(x / 40)], axis=-1).astype(np.uint8)
    pixels[80:200, 120:240] = (250, 30, 60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def text2image(catalog: Catalog) -> Text2Image:
    return Text2Image(catalog)


@pytest.fixture(scope="module")
def plain_xl(catalog: Catalog) -> Text2Image:
    """The tiny catalog with a plain ControlNet in the place of SDXL's union one."""
    data = catalog.model_dump()
    for component in data["components"]:
        if component["id"] == "controlnet-sdxl-union":
            component |= {"union": False, "source": {"folder": "models/tiny/controlnet-sdxl"}}
    for control in data["controlnets"]:
        if control["component"] == "controlnet-sdxl-union":
            control["mode"] = None
    return Text2Image(Catalog.model_validate(data))
