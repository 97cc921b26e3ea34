"""Pictures as bytes: read what clients send, write what they get, with the plan inside. No tensors here."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from pipelines.errors import InvalidValueError, TooLargeError
from pipelines.plan import OutputFormat

READABLE = ("PNG", "JPEG", "WEBP")
JPEG_QUALITY = 95
METADATA_KEY = "sdgraph"


@dataclass(frozen=True)
class EncodedImage:
    """A finished picture file."""

    data: bytes
    format: OutputFormat


def _open(data: bytes, param: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            return Image.open(io.BytesIO(data), formats=READABLE)
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{param} has too many pixels", param) from error
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise InvalidValueError(f"{param} is no readable picture; send one of {list(READABLE)}", param) from error


def _load(image: Image.Image, param: str) -> None:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise InvalidValueError(f"{param} is damaged and cannot be decoded", param) from error


def check_image(data: bytes, param: str, max_pixels: int) -> None:
    """Whether `data` is a picture this server reads. Size comes from the header, so a picture bomb never unfolds.

    Raises:
        InvalidValueError: not a complete PNG, JPEG or WebP.
        TooLargeError: more than `max_pixels` once decoded.
    """
    with _open(data, param) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise TooLargeError(f"{param} is {width}x{height}; at most {max_pixels} pixels are decoded", param)
        _load(image, param)


def read_image(data: bytes, param: str, width: int, height: int) -> Image.Image:
    """Decode to RGB of exactly `width` x `height`: upright by its EXIF, transparency on white, Lanczos as diffusers.

    Raises:
        InvalidValueError: the bytes are no complete picture.
    """
    with _open(data, param) as raw:
        _load(raw, param)
        image = ImageOps.exif_transpose(raw)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def write_image(image: Image.Image, file_format: OutputFormat, metadata: str) -> EncodedImage:
    """Encode, with `metadata` (the plan as JSON) in a PNG text chunk or the EXIF user comment."""
    buffer = io.BytesIO()
    if file_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt(METADATA_KEY, metadata)
        image.save(buffer, "PNG", pnginfo=text)
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + metadata.encode("utf-16-be")
        # An EXIF block holds 64 KB; a longer plan (a 20,000 character prompt) travels without.
        block = exif.tobytes() if len(metadata) < 30_000 else b""
        if file_format == "jpeg":
            image.save(buffer, "JPEG", quality=JPEG_QUALITY, exif=block)
        else:
            image.save(buffer, "WEBP", quality=JPEG_QUALITY, exif=block)
    return EncodedImage(buffer.getvalue(), file_format)


def read_metadata(data: bytes) -> str | None:
    """The plan written by `write_image`, None if the file carries none."""
    with _open(data, "image") as image:
        image.load()
        if METADATA_KEY in image.info:
            return str(image.info[METADATA_KEY])
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be") if comment else None
