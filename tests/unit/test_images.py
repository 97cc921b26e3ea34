"""Pictures as bytes: hostile, odd and ordinary ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InvalidValueError, TooLargeError
from pipelines.pictures.images import check_image, read_image, read_metadata, write_image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = encoded(Image.new("1", (30_000, 30_000)), optimize=True)
    assert len(bomb) < 200_000
    with pytest.raises(TooLargeError, match=r"30000x30000|too many pixels"):
        check_image(bomb, "image", 25_000_000)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(InvalidValueError, match="PNG"):
        check_image(encoded(Image.new("RGB", (8, 8)), kind), "image", 100)


def test_a_phone_photo_is_turned_upright() -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    upright = read_image(encoded(image, "PNG", exif=exif), "image", 20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 255)
    assert upright.getpixel((10, 35)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = read_image(encoded(Image.new(mode, (16, 16)), kind), "image", 32, 8)
    assert (image.mode, image.size) == ("RGB", (32, 8))


def test_transparency_lies_on_white() -> None:
    clear = read_image(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), "image", 8, 8)
    assert clear.getpixel((4, 4)) == (255, 255, 255)


def test_long_plans_do_not_break_a_jpeg() -> None:
    image = Image.new("RGB", (16, 16), "teal")
    written = write_image(image, "jpeg", "x" * 70_000)
    assert read_metadata(written.data) is None
    assert Image.open(io.BytesIO(written.data)).size == (16, 16)
    assert read_metadata(write_image(image, "png", "x" * 70_000).data) == "x" * 70_000


def test_jpeg_is_near_the_picture() -> None:
    gradient = Image.linear_gradient("L").convert("RGB")
    written = write_image(gradient, "jpeg", "{}")
    back = np.asarray(Image.open(io.BytesIO(written.data))).astype(int)
    assert np.abs(back - np.asarray(gradient)).max() <= 4
