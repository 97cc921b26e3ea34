"""Writing TIR loop by loop: a scheduled kernel over buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as ir

FLOAT = "float32"
VECTOR = 16
"""Neighbours that elementwise work takes together: one AVX-512 register, two of AVX2."""


def kernel(
    name: str, arguments: dict[str, tuple[int, ...]], body: Callable[..., None], types: Mapping[str, str] | None = None
) -> Any:
    """A scheduled, opaque PrimFunc over buffers; `body` writes it. Those that `types` does not name are float32."""
    with IRBuilder() as builder, ir.prim_func():
        ir.func_name(name)
        buffers = [ir.arg(n, ir.buffer(shape, (types or {}).get(n, FLOAT))) for n, shape in arguments.items()]
        ir.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        body(*buffers)
    return builder.get()
