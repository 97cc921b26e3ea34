"""Pictures of one shape in another."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import InvalidValueError
from pipelines.pictures.fitting import Fit, fitted
from tests.support.pictures import png


def halves(width: int, height: int) -> bytes:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return png(image)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("how", ["stretch", "crop", "fill"])
def test_the_same_shape_is_the_same_file(how: Fit) -> None:
    data = halves(40, 20)
    assert fitted(data, "image", 80, 40, how) is data
    assert (fitted(data, "image", 50, 50, how) is data) == (how == "stretch")


def test_crop_takes_the_middle() -> None:
    cut = pixels(fitted(halves(80, 20), "image", 40, 40, "crop"))
    assert cut.shape == (40, 40, 3)
    assert (cut[:, 0] == (255, 0, 0)).all()
    assert (cut[:, -1] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("size", "whole"), [((80, 20), (slice(15, 25), slice(None))), ((10, 40), (slice(None), slice(15, 25)))]
)
def test_fill_keeps_all_and_draws_the_edges_out(size: tuple[int, int], whole: tuple[slice, slice]) -> None:
    filled = pixels(fitted(halves(*size), "image", 40, 40, "fill"))
    kept = np.asarray(
        Image.open(io.BytesIO(halves(*size))).resize(filled[whole].shape[1::-1], Image.Resampling.LANCZOS)
    )
    assert np.array_equal(filled[whole], kept)
    assert (filled[:, 0] == (255, 0, 0)).all()
    assert (filled[:, -1] == (0, 0, 255)).all()


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="PNG"):
        fitted(b"x", "image", 8, 8, "crop")
