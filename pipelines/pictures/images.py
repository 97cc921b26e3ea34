"""Pictures as bytes: read what clients send, write what they get, with the plan inside. No tensors here."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from pipelines.errors import InvalidValueError, TooLargeError
from pipelines.plan import OutputFormat

READABLE = ("PNG", "JPEG", "WEBP")
JPEG_QUALITY = 95
METADATA_KEY = "sdgraph"
MAX_JPEG_EXIF = 65_533
"""Bytes of an APP1 segment, less its length field."""


@dataclass(frozen=True)
class EncodedImage:
    """A finished picture file."""

    data: bytes
    format: OutputFormat


def _open(data: bytes, param: str) -> ImageFile.ImageFile:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata; our own limit of pixels is checked by check_image
            return Image.open(io.BytesIO(_ended(data)), formats=READABLE)
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{param} has too many pixels", param) from error
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise InvalidValueError(f"{param} is not a readable image; send one of {list(READABLE)}", param) from error


def _ended(data: bytes) -> bytes:
    """A JPEG with its end marker: files without one are common, and browsers draw what is there."""
    is_jpeg = data.startswith(b"\xff\xd8")
    return data + b"\xff\xd9" if is_jpeg and not data.rstrip(b"\0").endswith(b"\xff\xd9") else data


def check_image(data: bytes, param: str, max_pixels: int) -> None:
    """Whether `data` is a picture that `read_image` reads: it is decoded as there.

    Size comes from the header, so a picture bomb never unfolds.

    Raises:
        InvalidValueError: not a complete PNG, JPEG or WebP.
        TooLargeError: more than `max_pixels` once decoded.
    """
    with _open(data, param) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise TooLargeError(f"{param} is {width}x{height}; at most {max_pixels} pixels are decoded", param)
        _decode(image, param)


def read_image(data: bytes, param: str, width: int, height: int) -> Image.Image:
    """Decode to RGB of exactly `width` x `height` as a browser shows it, resized by Lanczos as diffusers does.

    Upright by its EXIF where that can be read, transparency on white, 16 bits scaled to 8. Colour profiles are ignored,
    as diffusers and A1111 ignore them.

    Raises:
        InvalidValueError: the bytes are not a complete picture.
    """
    with _open(data, param) as raw:
        image = _decode(raw, param)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def _decode(file: ImageFile.ImageFile, param: str) -> Image.Image:
    """The pixels in RGB."""
    try:
        stored = file.tile[0][3] if file.tile else None
        file.load()
        _scale_transparent_value(file, stored)
        image = _upright(file)
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise InvalidValueError(f"{param} is damaged and cannot be decoded", param) from error


def _scale_transparent_value(image: Image.Image, stored: object) -> None:
    """Pillow scales the samples of some PNGs to 8 bits but leaves their transparent value (`tRNS`) as it is stored."""
    value = image.info.get("transparency")
    if stored in ("L;2", "L;4") and isinstance(value, int):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[str(stored)]
    elif stored == "RGB;16B" and isinstance(value, tuple):
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation; EXIF that cannot be read is ignored, as browsers do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many types on hostile EXIF
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright (CIPA DC-008, 4.6.4); 1 is upright."""


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture, such as a depth map, in 8 bits; its transparent value becomes alpha.

    Pillow's own conversion clips at 255, which makes nearly every depth map white.
    """
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def write_image(image: Image.Image, file_format: OutputFormat, metadata: str) -> EncodedImage:
    """Encode, with `metadata` (the plan as JSON) in a PNG text chunk or the EXIF user comment.

    JPEG holds 64 KB of EXIF: a longer text is replaced by a JSON object that says so.
    """
    buffer = io.BytesIO()
    if file_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_itxt(METADATA_KEY, metadata)
        image.save(buffer, "PNG", pnginfo=text)
    else:
        block = _exif(metadata)
        if file_format == "jpeg" and len(block) > MAX_JPEG_EXIF:
            block = _exif(json.dumps({"omitted": f"{len(metadata)} characters, more than JPEG holds; PNG and WebP do"}))
        image.save(buffer, file_format.upper(), quality=JPEG_QUALITY, exif=block)
    return EncodedImage(buffer.getvalue(), file_format)


def _exif(comment: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + comment.encode("utf-16-be")
    return exif.tobytes()


def read_metadata(data: bytes) -> str | None:
    """The plan written by `write_image`, None if the file carries none."""
    with _open(data, "image") as image:
        image.load()
        if METADATA_KEY in image.info:
            return str(image.info[METADATA_KEY])
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be") if comment else None
