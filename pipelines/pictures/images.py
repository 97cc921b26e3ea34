"""Pictures as bytes: read what clients send, write what they get, marked and with the plan inside. No tensors here."""

from __future__ import annotations

import io
import sys
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin

from pipelines.errors import InvalidValueError, TooLargeError
from pipelines.pictures.infotext import infotext
from pipelines.pictures.provenance import read_xmp, xmp_packet
from pipelines.plan import OUTPUT_QUALITY, GenerationPlan, OutputFormat
from pipelines.upscale import UpscalePlan

READABLE = ("PNG", "JPEG", "WEBP")
XMP_CHUNK, INFOTEXT_CHUNK = "XML:com.adobe.xmp", "parameters"
"""Text chunks of a PNG: XMP's (XMP specification part 3, 1.1.5) and A1111's."""
MAX_JPEG_EXIF, MAX_JPEG_XMP = 65_533, 65_502
"""Bytes of an APP1 segment, less its length field; XMP's begins with a name of its own."""
_UTF_16 = b"UNICODE\0"


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


@dataclass(frozen=True)
class PictureFile:
    """What a file tells of itself."""

    format: OutputFormat
    width: int
    height: int
    digital_source_type: str | None
    """A term of IPTC's vocabulary, such as `trainedAlgorithmicMedia` or `digitalCapture`."""
    plan: str | None
    """The plan of one of our pictures, as JSON."""
    infotext: str | None
    """A1111's, from us or from another program."""


def check_image(data: bytes, param: str, max_pixels: int) -> PictureFile:
    """Whether `data` is a picture that `read_image` reads: it is decoded as there.

    Size comes from the header, so a picture bomb never unfolds.

    Raises:
        InvalidValueError: not a complete PNG, JPEG or WebP.
        TooLargeError: more than `max_pixels` once decoded.
    """
    with _open(data, param) as image:
        _check_size(image, param, max_pixels)
        _decode(image, param)
        return _described(image)


def _described(image: Image.Image) -> PictureFile:
    """A loaded picture's file: a PNG may tell of itself behind its pixels."""
    xmp = image.info.get("xmp") or b""
    told = read_xmp(xmp.encode("utf-8", "replace") if isinstance(xmp, str) else bytes(xmp))
    comment = _user_comment(image)
    text = image.info.get(INFOTEXT_CHUNK) or comment
    plan = told.plan or image.info.get("sdgraph")  # where our pictures had it before they had XMP
    if plan is None and comment and comment.startswith("{"):
        plan, text = comment, None
    return PictureFile(
        _FORMATS[str(image.format)],
        *image.size,
        told.digital_source_type,
        str(plan) if plan else None,
        str(text) if text else None,
    )


_FORMATS: dict[str, OutputFormat] = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}


def picture_size(data: bytes, param: str, max_pixels: int = sys.maxsize) -> tuple[int, int]:
    """Width and height of a picture, upright; its pixels are not decoded.

    Raises:
        InvalidValueError: not a PNG, JPEG or WebP.
        TooLargeError: more than `max_pixels`, or so many that it must be a bomb.
    """
    with _open(data, param) as image:
        _check_size(image, param, max_pixels)
        width, height = image.size
        return (height, width) if _turn(image) in _SIDEWAYS else (width, height)


def _check_size(image: Image.Image, param: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(f"{param} is {width}x{height}; at most {max_pixels} pixels are decoded", param)


def read_image(data: bytes, param: str, width: int, height: int) -> Image.Image:
    """Decode to RGB of exactly `width` x `height` as a browser shows it, resized by Lanczos as diffusers does.

    Upright by its EXIF where that can be read, transparency on white, 16 bits scaled to 8. Colour profiles are ignored,
    as diffusers and A1111 ignore them.

    Raises:
        InvalidValueError: the bytes are not a complete picture.
    """
    image = read_whole_image(data, param)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def read_whole_image(data: bytes, param: str) -> Image.Image:
    """The same in the picture's own size."""
    with _open(data, param) as raw:
        return _decode(raw, param)


def read_alpha(data: bytes, param: str) -> Image.Image | None:
    """How opaque a picture is, 8 bit grey, upright; None for one without transparency.

    Raises:
        InvalidValueError: the bytes are not a complete picture.
    """
    with _open(data, param) as raw:
        try:
            raw.load()
            return _upright(raw).convert("RGBA").getchannel("A") if raw.has_transparency_data else None
        except Exception as error:  # Pillow's decoders raise many types on hostile bytes
            raise InvalidValueError(f"{param} is damaged and cannot be decoded", param) from error


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
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright, None if it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many types on hostile EXIF
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


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
_SIDEWAYS = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))


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


def write_image(
    image: Image.Image,
    file_format: OutputFormat,
    plan: GenerationPlan | UpscalePlan | None = None,
    quality: int = OUTPUT_QUALITY,
) -> EncodedImage:
    """Encode, with what the file tells of itself inside (`provenance.py`, `infotext.py`).

    Args:
        image: the pixels.
        file_format: of the file.
        plan: what made the picture; None for a preview, which is marked as machine-made all the same.
        quality: of JPEG and WebP.
    """
    buffer = io.BytesIO()
    text = infotext(plan) if plan else ""
    if file_format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(XMP_CHUNK, xmp_packet(plan).decode())
        if text:
            chunks.add_text(INFOTEXT_CHUNK, text)
        image.save(buffer, "PNG", pnginfo=chunks)
    else:
        limited = file_format == "jpeg"
        packet = xmp_packet(plan, MAX_JPEG_XMP if limited else None)
        block = _exif(text) if text else b""
        if limited and len(block) > MAX_JPEG_EXIF:
            block = b""
        image.save(buffer, file_format.upper(), quality=quality, exif=block, xmp=packet)
    return EncodedImage(buffer.getvalue(), file_format)


def _exif(comment: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UTF_16 + comment.encode("utf-16-be", "replace")
    return exif.tobytes()


def _user_comment(image: Image.Image) -> str | None:
    """EXIF's user comment, None where there is none or it cannot be read."""
    try:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # Pillow raises many types on hostile EXIF
        return None
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return None
    charset, text = comment[:8], comment[8:]
    if charset == _UTF_16:  # in the byte order of the file or of the writer's machine: programs differ
        big, little = text.decode("utf-16-be", "replace"), text.decode("utf-16-le", "replace")
        return little if "Steps: " in little else big
    return (text if charset.startswith((b"ASCII\0", b"\0\0")) else comment).decode("utf-8", "replace")


def read_plan(data: bytes) -> str | None:
    """The plan that `write_image` put into a file, as JSON; None if the file carries none."""
    return check_image(data, "image", sys.maxsize).plan
