"""Tensors of a `.safetensors` file, by plain reads.

safetensors' own reader maps the file and holds Python's lock while it waits for a page. On a volume that hangs, the
whole process would stop, with all its requests and its health checks. A plain read waits without the lock, so this
class reads the files that are needed while requests are served (GRA-18). Weights are read before that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch

from pipelines.weights.headers import read_header

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
"""Number formats by their names in headers."""


class TensorFile:
    """A file whose tensors are read one by one. A context manager."""

    def __init__(self, path: Path) -> None:
        """Read its header.

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        self._header = read_header(path)
        self.tensors, self.metadata = self._header.tensors, self._header.metadata
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own.

        Raises:
            ValueError: it has a number format that torch has not, or the file became shorter.
            OSError: it cannot be read.
        """
        described = self.tensors[name]
        if described.dtype not in DTYPES:
            raise ValueError(f"tensor {name[:100]} has the number format {described.dtype}, which is not read")
        raw = torch.empty(described.bytes, dtype=torch.uint8)
        room = raw.numpy().data
        self._file.seek(self._header.bytes + described.begin)
        while room:
            count = self._file.readinto(room)
            if not count:
                raise ValueError(f"it was truncated while it was read, in tensor {name[:100]}")
            room = room[count:]
        return raw.view(DTYPES[described.dtype]).reshape(described.shape)
