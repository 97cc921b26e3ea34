"""bfloat16 in kernels: a value is stored as `uint16`, two neighbouring values as one `int32`; sums are float32.

TVM's code generator has no bfloat16. The processor's product (`vdpbf16ps`, Intel's Architecture Instruction Set
Extensions) is therefore called through LLVM IR that is attached to a kernel. Where the processor lacks it, the same
kernels multiply in float32, which represents the product of two bfloat16 values exactly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tvm import te, tirx
from tvm.tirx.script import builder as ir

from pipelines.backends.tvm.tir import FLOAT

HALF, PAIR = "uint16", "int32"
LANES = 16
"""Number of float32 sums that one instruction adds to."""

_DOT = "sdgraph_dot_bfloat16"
_DOT_LLVM = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define <16 x float> @{_DOT}(<16 x float> %sums, <16 x i32> %a, <16 x i32> %b) {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %z = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sums, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %z
}}
"""


def rounded(value: Any) -> Any:
    """Round a float32 expression to the nearest bfloat16, ties to even. Infinities and NaN stay what they are.

    The exception is a NaN whose mantissa is all ones, which would become zero; arithmetic never produces it.
    """
    bits = tirx.reinterpret("uint32", value)
    odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
    return ((bits + tirx.const(0x7FFF, "uint32") + odd) >> tirx.const(16, "uint32")).astype(HALF)


def rounded_tensor(x: te.Tensor) -> te.Tensor:
    """Round a float32 tensor to bfloat16."""
    return te.compute(x.shape, lambda *index: rounded(x(*index)), name="rounded")


def pair(buffer: Any, outer: list[Any], number: Any) -> Any:
    """Load values `2 * number` and `2 * number + 1` of a bfloat16 row as one int32, the first in its lower half."""
    return tirx.reinterpret(PAIR, buffer[*outer, ir.ramp(2 * number, 1, 2)])


def instruction() -> AbstractContextManager[Any]:
    """A context around the loops of a kernel that calls `add_products` with `native`; it attaches the LLVM IR."""
    begun: AbstractContextManager[Any] = ir.attr(tirx.IntImm("int32", 0), "pragma_import_llvm", _DOT_LLVM)
    return begun


def add_products(sums: Any, row: int, panel: int, a: Any, b: Any, native: bool) -> None:
    """Add the products of one pair with a panel of pairs to a row of sums.

    Args:
        sums: float32 buffer `[rows, panel]`.
        row: index of the row.
        panel: number of columns; a multiple of `LANES` if `native`.
        a: the pair of bfloat16 values, as int32.
        b: function from a column to its pair.
        native: use the processor's instruction; otherwise multiply in float32.
    """
    if native:
        for first in range(0, panel, LANES):
            columns = ir.ramp(first, 1, LANES)
            value = tirx.call_pure_extern(
                f"{FLOAT}x{LANES}", _DOT, sums[row, columns], ir.broadcast(a, LANES), b(columns)
            )
            ir.buffer_store(sums, value, [row, columns])
        return
    with ir.vectorized(0, panel) as z:
        other = b(z)
        value = sums[row, z] + _low(a) * _low(other) + _high(a) * _high(other)
        ir.buffer_store(sums, value, [row, z])


def _low(word: Any) -> Any:
    return tirx.reinterpret(FLOAT, word << tirx.const(16, PAIR))


def _high(word: Any) -> Any:
    return tirx.reinterpret(FLOAT, word & tirx.const(-0x10000, PAIR))
