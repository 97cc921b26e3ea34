"""Pictures as bytes: hostile, odd and ordinary ones."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from pipelines.errors import InvalidValueError, TooLargeError
from pipelines.pictures.images import check_image, read_image, write_image

EXIF_FILES = Path(__file__).parent / "exif"


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


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    image = read_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), "image", 32, 8)
    assert (image.mode, image.size) == ("RGB", (32, 8))
    assert np.abs(np.asarray(image).astype(int) - (255, 0, 0)).max() <= 2


GREY, TRUE, PALETTE, GREY_ALPHA, TRUE_ALPHA = 0, 2, 3, 4, 6
"""PNG colour types."""
DEPTHS = {GREY: (1, 2, 4, 8, 16), TRUE: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), TRUE_ALPHA: (8, 16)}
CHANNELS = {GREY: 1, TRUE: 3, PALETTE: 1, GREY_ALPHA: 2, TRUE_ALPHA: 4}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, colour: int, depth: int, *chunks: bytes) -> bytes:
    """A PNG written by hand of `[height, width, channels]`, for what Pillow cannot write."""
    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1)[..., None] >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_depth_and_colour_type_looks_as_the_png_standard_says(data: st.DataObject) -> None:
    """Samples scaled to 8 bits by value (PNG 13.12), alpha laid on white, each to within a rounding step."""
    colour = data.draw(st.sampled_from(sorted(DEPTHS)), "colour type")
    depth = data.draw(st.sampled_from(DEPTHS[colour]), "depth")
    random = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    samples = random.integers(0, 2**depth, (5, 7, CHANNELS[colour]))
    transparent = data.draw(st.booleans(), "has a transparent value")
    chunks = []
    alpha = np.full((5, 7), 255.0)
    shown = samples * 255.0 / (2**depth - 1)
    if colour == PALETTE:
        palette = random.integers(0, 256, (2**depth, 3))
        chunks.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
        shown = palette[samples[..., 0]].astype(float)
        if transparent:
            alphas = random.integers(0, 256, 2**depth)
            chunks.append(chunk(b"tRNS", alphas.astype(np.uint8).tobytes()))
            alpha = alphas[samples[..., 0]].astype(float)
    elif colour in (GREY_ALPHA, TRUE_ALPHA):
        alpha, shown = shown[..., -1], shown[..., :-1]
    elif transparent:
        value = samples[2, 3]
        chunks.append(chunk(b"tRNS", b"".join(struct.pack(">H", int(v)) for v in value)))
        alpha = np.where((samples == value).all(axis=-1), 0.0, 255.0)
    expected = (shown * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255
    file = png(samples, colour, depth, *chunks)
    check_image(file, "image", 100)
    read = np.asarray(read_image(file, "image", 7, 5)).astype(float)
    assert np.abs(read - np.broadcast_to(expected, read.shape)).max() <= 2.5


def with_exif(kind: str, exif: bytes) -> bytes:
    """A picture of two colours with this EXIF block, readable or not."""
    image = Image.new("RGB", (6, 4), "red")
    image.paste("blue", (0, 0, 3, 4))
    if kind == "PNG":
        plain = encoded(image)
        return plain[:33] + chunk(b"eXIf", exif) + plain[33:]
    if kind == "PNG raw profile":  # ImageMagick's older way, in hexadecimal
        plain = encoded(image)
        text = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
        return plain[:33] + chunk(b"tEXt", text) + plain[33:]
    return encoded(image, kind, exif=b"Exif\0\0" + exif, **({"lossless": True} if kind == "WEBP" else {}))


KINDS = ["PNG", "PNG raw profile", "JPEG", "WEBP"]


@given(
    kind=st.sampled_from(KINDS),
    garbage=st.binary(min_size=1, max_size=60),
    prefix=st.sampled_from([b"", b"II*\0\x08\0\0\0"]),
)
@settings(max_examples=150, deadline=None)
def test_unreadable_exif_is_ignored(kind: str, garbage: bytes, prefix: bytes) -> None:
    file = with_exif(kind, prefix + garbage)
    check_image(file, "image", 100)
    assert read_image(file, "image", 6, 4).size == (6, 4)


@pytest.mark.parametrize("file", sorted(EXIF_FILES.glob("*.bin")), ids=lambda path: path.stem)
def test_files_with_broken_exif_that_were_met(file: Path) -> None:
    check_image(file.read_bytes(), "image", 10_000)
    assert read_image(file.read_bytes(), "image", 64, 64).size == (64, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = with_exif(kind, exif.tobytes().removeprefix(b"Exif\0\0"))
    oracle = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    assert np.array_equal(np.asarray(read_image(file, "image", *oracle.size)), np.asarray(oracle))


def test_a_jpeg_without_its_end_marker_is_drawn() -> None:
    whole = encoded(Image.effect_noise((64, 48), 80).convert("RGB"), "JPEG")
    assert whole.endswith(b"\xff\xd9")
    for cut in (whole[:-2], whole[:-2] + b"\0" * 100):
        check_image(cut, "image", 10_000)
        assert np.array_equal(read_image(cut, "image", 64, 48), read_image(whole, "image", 64, 48))


def test_transparency_lies_on_white() -> None:
    clear = read_image(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), "image", 8, 8)
    assert clear.getpixel((4, 4)) == (255, 255, 255)


def test_jpeg_is_near_the_picture() -> None:
    gradient = Image.linear_gradient("L").convert("RGB")
    written = write_image(gradient, "jpeg")
    back = np.asarray(Image.open(io.BytesIO(written.data))).astype(int)
    assert np.abs(back - np.asarray(gradient)).max() <= 4
