"""The header of a `.safetensors` file: names, number formats and shapes of its tensors, without reading the tensors.

safetensors' own reader maps the whole file and keeps whatever a header lists; this one reads only the header, with
bounds on memory, and says what is wrong with a file (WTS-4). The format: eight bytes with the header's length, the
header (a JSON object), the tensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 16 * 2**20
"""SDXL's checkpoint has 0.4 MB, the largest LyCORIS files 4 MB; trainers' metadata may hold a thumbnail."""
MAX_TENSORS = 65_536
"""An SDXL checkpoint with an average beside each weight has 5,000 tensors, a LoKr of every layer 20,000."""

MAX_DIMENSIONS = 8

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "BOOL": 8}
_BITS |= {f"{kind}{size}": size for kind in ("I", "U", "F") for size in (8, 16, 32, 64)} | {"BF16": 16}
_EIGHT_BITS = "F8_"

LFS_POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype html", b"<html")
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How pickles begin: torch's archive, and the protocols."""


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    """As safetensors spells it: F32, F16, BF16, F8_E4M3, I64, ..."""
    shape: tuple[int, ...]
    bytes: int
    begin: int
    """Its first byte, counted from the header's end."""


@dataclass(frozen=True)
class Header:
    """All that a file says before its tensors.

    Attributes:
        tensors: by name.
        metadata: whatever the program that wrote the file put there; nothing checks that it is true.
        bytes: its own length.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    bytes: int = 0


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        ValueError: this is no sound safetensors file; the message says why.
        OSError: the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is a folder, not a file" if stat.S_ISDIR(status.st_mode) else "this is not a plain file")
    start = check_start(path)
    if len(start) < 8:
        raise ValueError("it is truncated or damaged: it ends before its header")
    with path.open("rb") as file:
        length = int.from_bytes(start[:8], "little")
        room = os.fstat(file.fileno()).st_size - 8
        if length > room:
            raise ValueError(
                f"it is truncated or damaged: its header should be {length:,} bytes long, and {room:,} are left"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header is {length:,} bytes long; at most {MAX_HEADER_BYTES:,} are read")
        file.seek(8)
        tensors, metadata, end = _parse(file.read(length))
    if 8 + length + end > status.st_size:
        missing = 8 + length + end - status.st_size
        raise ValueError(f"it is truncated or damaged: {missing:,} bytes of its tensors are missing; copy it again")
    if 8 + length + end < status.st_size:
        raise ValueError(
            f"it is truncated or damaged: {status.st_size - 8 - length - end:,} bytes follow its last tensor"
        )
    return Header(tensors, metadata, 8 + length)


def check_start(path: Path) -> bytes:
    """The first 64 bytes of a file; ValueError if they say that it is something else than its name."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start.strip():
        raise ValueError("it is empty")
    if not start.strip(b"\0"):
        raise ValueError("it is truncated or damaged: it begins with zeros")
    if start.startswith(LFS_POINTER):
        raise ValueError("this is a Git LFS pointer; run git lfs pull")
    if start.lstrip().lower().startswith(PAGES):
        raise ValueError("this is an HTML page, as a server answers instead of a file; download it again")
    if start.startswith(PICKLES) and start[2:9] != b"\0\0\0\0\0\0{":  # a header of 640 bytes begins so too
        raise ValueError("this is a pickle under another name, which can run code; convert it to safetensors")
    if start.startswith(b"GGUF"):
        raise ValueError("this is a GGUF file, whose quantised weights are not read")
    return start


def _parse(text: bytes) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Tensors, metadata, and the length in bytes of all tensors together."""
    count = 0

    def entry(pairs: list[tuple[str, Any]]) -> Any:
        """Count each object of the header as soon as it is parsed, so that a million of them never stand in memory."""
        nonlocal count
        count += 1
        if count > MAX_TENSORS + 2:
            raise ValueError(f"it has more than {MAX_TENSORS:,} tensors; no model that is served here has")
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("it is damaged: its header names something twice")
        return names

    try:
        entries = json.loads(
            text.decode(), object_pairs_hook=entry, parse_int=_integer, parse_float=_refuse, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError("it is damaged: its header is nested without end") from None
    except UnicodeDecodeError:
        raise ValueError("it is truncated or damaged: its header is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is truncated or damaged: its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError("it is damaged: its header is not a JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("it is damaged: its metadata is not a JSON object")
    spans = []
    tensors = {}
    for name, described in entries.items():
        tensors[name], span = _tensor(name, described)
        spans.append(span)
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError("it is damaged: its tensors overlap or leave gaps")
        end = stop
    return tensors, {key: value for key, value in metadata.items() if isinstance(value, str)}, end


def _tensor(name: str, described: Any) -> tuple[Tensor, tuple[int, int]]:
    try:
        dtype, shape, (begin, stop) = described["dtype"], described["shape"], described["data_offsets"]
        if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in (*shape, begin, stop)):
            raise ValueError(shape)
        bits = 8 if dtype.startswith(_EIGHT_BITS) else _BITS[dtype]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"it is damaged: its header does not describe tensor {name[:100]} soundly") from None
    if math.prod(shape) * bits != (stop - begin) * 8:
        raise ValueError(f"it is damaged: tensor {name[:100]} has {stop - begin:,} bytes, which its shape contradicts")
    return Tensor(dtype, tuple(shape), stop - begin, begin), (begin, stop)


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < 20 else _refuse(digits)


def _refuse(number: str) -> int:
    raise ValueError(f"it is damaged: its header holds the number {number[:30]}")
