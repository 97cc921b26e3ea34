"""What the parity suites share."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A smooth picture with edges, larger than what it is resized to."""
    y, x = np.mgrid[0:300, 0:400]
    pixels = np.stack([x * 255 / 400, y * 255 / 300, 128 + 127 * np.sin(x / 40)], axis=-1).astype(np.uint8)
    pixels[80:200, 120:240] = (250, 30, 60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
