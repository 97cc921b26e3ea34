"""Writing a kernel in TIR, TVM's language of loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as ir

FLOAT = "float32"
VECTOR = 16
"""Number of float32 values that a vector operation takes: one register of AVX-512, or two of AVX2."""


def kernel(
    name: str, arguments: dict[str, tuple[int, ...]], body: Callable[..., None], types: Mapping[str, str] | None = None
) -> Any:
    """A PrimFunc whose loops `body` writes, and which TVM neither schedules nor fuses.

    `arguments` gives the shape of each buffer, `types` its type, which is float32 for those it does not name.
    """
    with IRBuilder() as builder, ir.prim_func():
        ir.func_name(name)
        buffers = [ir.arg(n, ir.buffer(shape, (types or {}).get(n, FLOAT))) for n, shape in arguments.items()]
        ir.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        body(*buffers)
    return builder.get()
