"""Pictures as files."""

from __future__ import annotations

import io

from PIL import Image


def png(image: Image.Image) -> bytes:
    """A PNG of it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
