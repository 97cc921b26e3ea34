"""Whether two files hold the same text encoders or VAE, in whatever layout: by the bytes of their tensors (GRA-17).

Fine-tunes mostly change the UNet alone. What they leave as it was need not be held twice. Names differ between layouts
and shapes by dimensions of one, so that only bytes are compared: two sets of tensors are equal when each has its twin.
OpenCLIP keeps queries, keys and values in one matrix and its projection the other way round; both are undone here. An
SD2 checkpoint holds one layer more than diffusers' folders, so that its text encoder is never found to be equal.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from config.catalog import ROOT
from pipelines.weights.headers import read_header
from pipelines.weights.kinds.models import TEXT_ENCODERS, VAE_PREFIXES
from pipelines.weights.versions import version_of

Shared = Literal["text_encoder", "vae"]

MEMORY = ROOT / "build" / "library.json"
"""Digests by file, size and time: reading the encoders of an SDXL checkpoint takes seconds."""
_COUNTED = re.compile(r"position_ids$|logit_scale$|^(vision_model|visual)\.|^model_ema\.")
"""Further tensors of published files, which no picture depends on."""


class Digests:
    """Digests of parts of files, remembered on disk where that is possible."""

    def __init__(self, memory: Path = MEMORY) -> None:
        """Remember in the file `memory`."""
        self._memory = memory
        try:
            self._known: dict[str, str] = json.loads(memory.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(self, files: Iterable[Path], part: Shared) -> str | None:
        """A digest of the tensors that belong to a part, None where there are none or a file cannot be read."""
        digests = []
        for file in files:
            key = f"{part} {version_of(file)} {file}"
            if key not in self._known:
                try:
                    self._known[key] = _digest(file, part)
                except (OSError, ValueError):
                    return None
                self._remember()
            digests.append(self._known[key])
        told = sorted(digest for digest in digests if digest)
        return " ".join(told) or None

    def _remember(self) -> None:
        """Write what is known, for the next start; where nothing can be written the next start reads again."""
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            written = self._memory.with_suffix(".new")
            written.write_text(json.dumps(self._known))
            written.replace(self._memory)
        except OSError:
            pass


def _digest(file: Path, part: Shared) -> str:
    """The digest of one file's share of a part; of SDXL's two text encoders each has its own; empty if it has none."""
    header = read_header(file)
    prefixes = tuple(TEXT_ENCODERS) if part == "text_encoder" else VAE_PREFIXES[:2]
    inside = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in header.tensors)]
    told = []
    with file.open("rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        offsets = {
            name: entry["data_offsets"]
            for name, entry in json.loads(opened.read(start - 8)).items()
            if name in header.tensors
        }
        for prefix in inside or [""]:
            twins = []
            for name, tensor in header.tensors.items():
                bare = name.removeprefix(prefix)
                if not name.startswith(prefix) or _COUNTED.search(bare):
                    continue
                data = _read(opened, start + offsets[name][0], tensor.bytes)
                twins += [_hash(tensor.dtype, piece) for piece in _pieces(bare, data, tensor.shape)]
            if twins:
                told.append(hashlib.blake2b("".join(sorted(twins)).encode(), digest_size=16).hexdigest())
    return " ".join(sorted(told))


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _pieces(name: str, data: bytes, shape: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of a tensor as the other layout has them."""
    if re.search(r"\.in_proj_(weight|bias)$", name):
        third = len(data) // 3
        yield from (data[:third], data[third : 2 * third], data[2 * third :])
    elif name == "text_projection" and len(shape) == 2:
        width = len(data) // (shape[0] * shape[1])
        yield np.frombuffer(data, dtype=f"V{width}").reshape(shape).T.tobytes()
    else:
        yield data


def _hash(dtype: str, data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, person=dtype.encode()[:16]).hexdigest()
