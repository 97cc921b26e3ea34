"""Pictures in JSON: base64 and data URIs."""

from __future__ import annotations

import base64
import binascii
import re

from pipelines.errors import InvalidValueError

_URL = re.compile(r"^\s*(https?|ftp|file|s3|gs):", re.IGNORECASE)
_DATA_URI = re.compile(r"^\s*data:[^,]*,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


def decode_base64(text: str | None, field: str, param: str | None = None) -> bytes | None:
    """Bytes of a base64 string or a data URI of whatever type, with either alphabet of RFC 4648, padded or not.

    Raises:
        InvalidValueError: it is neither, or empty. The message calls it `field`; `param` is the field of the request
            that it is a part of, if it is not the field itself.
    """
    if text is None:
        return None
    param = param or field
    if _URL.match(text):
        raise InvalidValueError(
            f"{field} is an address, and this server fetches none: send the picture itself, in base64 or as a data URI",
            param,
        )
    digits = "".join(_DATA_URI.sub("", text, count=1).split()).rstrip("=").translate(_URL_SAFE)
    try:
        data = base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidValueError(f"{field} is not valid base64", param) from None
    if not data:
        raise InvalidValueError(f"{field} is empty", param)
    return data
