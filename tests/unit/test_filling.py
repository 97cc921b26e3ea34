"""A hole in a picture is filled with what is around it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pipelines.pictures.filling import filled

SIZE = (96, 80)


def hole(fill: int = 255) -> Image.Image:
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle((40, 20, 70, 60), fill=fill)
    return mask


def halves(under: tuple[int, int, int]) -> Image.Image:
    """Red on the left, blue on the right, and `under` where the hole is."""
    picture = Image.new("RGB", SIZE, (200, 10, 10))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((56, 0, 95, 79), fill=(10, 10, 200))
    draw.rectangle((40, 20, 70, 60), fill=under)
    return picture


def test_what_is_black_stays_and_what_was_under_white_is_forgotten() -> None:
    one, other = (filled(halves(under), hole()) for under in ((0, 255, 0), (255, 255, 255)))
    assert np.array_equal(np.asarray(one), np.asarray(other))
    stays = np.asarray(hole()) == 0
    assert np.array_equal(np.asarray(one)[stays], np.asarray(halves((0, 255, 0)))[stays])


def test_a_hole_takes_the_colours_next_to_it() -> None:
    pixels = np.asarray(filled(halves((0, 255, 0)), hole())).astype(int)
    left, right = pixels[40, 42], pixels[40, 68]
    assert left[0] > left[2] + 60
    assert right[2] > right[0] + 60
    assert pixels[..., 1].max() <= 14, "nothing of the green that was there"


def test_one_colour_around_is_one_colour_inside() -> None:
    picture = Image.new("RGB", SIZE, (90, 120, 30))
    ImageDraw.Draw(picture).rectangle((40, 20, 70, 60), fill="white")
    assert np.abs(np.asarray(filled(picture, hole())).astype(int) - (90, 120, 30)).max() <= 6, "what 8 bits round"
