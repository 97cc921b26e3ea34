"""Kernels of matrix products and convolutions with packed weights, in NHWC.

They follow Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008): a block of
`Tile.rows` x `Tile.columns` of the result stays in registers, and a chunk of the packed weights stays in the cache
while all rows are multiplied with it. A convolution is the same product, whose outer chunks are the taps of the filter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from tvm.tirx.script import builder as ir

from pipelines.backends.tvm.bfloat16 import HALF, LANES, PAIR, add_products, instruction, pair, rounded
from pipelines.backends.tvm.tir import FLOAT, kernel

CHUNK = 256
"""Number of products that a block sums before the next rows follow: their weights (16 KB on AVX2) stay in L1."""
GROUP = 96
"""Number of rows that are multiplied with all columns together: their chunk of the input stays in the L2 cache."""
JOBS = 8
"""The least number of parallel jobs that a kernel is divided into where its sizes allow."""


@dataclass(frozen=True)
class Tile:
    """How products use the registers of one core: the block size and the arithmetic."""

    columns: int
    """The largest number of columns of the result in a block, which is also the width of a panel of packed weights."""
    rows: int
    """The largest number of rows of the result in a block."""
    arithmetic: Literal["float32", "bfloat16", "emulated"] = "float32"
    """`float32`; `bfloat16`: pairs of bfloat16, by the processor's instruction; `emulated`: such pairs, in float32."""

    @classmethod
    def of(cls, vector_bits: int, arithmetic: Literal["float32", "bfloat16", "emulated"] = "float32") -> Tile:
        """The tile for 32 registers of 512 bits, or for 16 registers of 256 bits."""
        return cls(64, 6, arithmetic) if vector_bits >= 512 else cls(16, 6, arithmetic)

    @property
    def halved(self) -> bool:
        """Whether products multiply bfloat16 values."""
        return self.arithmetic != "float32"

    def in_float32(self) -> Tile:
        """The same block size for a layer that multiplies in float32 in every precision."""
        return replace(self, arithmetic="float32")

    def panel(self, columns: int) -> int:
        """The number of columns of a panel, for a result of `columns` columns."""
        return math.gcd(columns, self.columns)

    def row_block(self, rows: int) -> int:
        """The number of rows of a block: the largest that divides `rows`, or if that is small, one with a remainder."""
        fitting = [n for n in range(self.rows, 0, -1) if rows % n == 0]
        return fitting[0] if fitting[0] * 3 >= self.rows * 2 or rows < self.rows else self.rows - 2


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(n for n in range(max(1, min(number, most)), 0, -1) if number % n == 0)


@dataclass(frozen=True)
class _Product:
    """The loops of a matrix product over packed weights."""

    batch: int
    """Independent products."""
    lines: int
    width: int
    """The result has `lines` x `width` rows, where the `width` rows of a line are neighbours."""
    columns: int
    panel: int
    """Number of columns of the result, and of a panel of packed weights."""
    parts: int
    chunk: int
    """Each sum has `parts` x `chunk` products, or pairs of products in bfloat16."""
    block: int
    """Number of rows of a block, which is held in registers."""
    tile: Tile

    def write(
        self,
        a: Callable[[Any, Any, Any, Any, Any], Any],
        b: Callable[[Any, Any, Any, Any, Any], Any],
        bias: Any,
        result: Callable[[Any, Any, Any], tuple[Any, list[Any]]],
    ) -> None:
        """Write the loops of the product.

        Args:
            a: function of `(product, line, row, part, k)` to a value of the input, or to a pair in bfloat16.
            b: function of `(product, panel, part, k, lane)` to a weight, or to a pair in bfloat16.
            bias: buffer `[columns]`, or None for none.
            result: function of `(product, line, row)` to the buffer of the result and the indices of the row in it. If
                its values are bfloat16, there must be one part.
        """
        with instruction() if self._native else nullcontext():
            self._write(a, b, bias, result)

    @property
    def _native(self) -> bool:
        """Whether the processor's instruction is used. It needs panels that consist of whole vectors."""
        return self.tile.arithmetic == "bfloat16" and self.panel % LANES == 0

    def _write(self, a: Any, b: Any, bias: Any, result: Any) -> None:
        groups = self.lines // _divisor(self.lines, max(1, GROUP // self.width))
        panels = self.columns // self.panel
        shares = 1
        while self.batch * groups * shares < JOBS and (more := _next_divisor(panels, shares)):
            shares = more
        with ir.parallel(0, self.batch * groups * shares) as job:
            t, group, share = job // (groups * shares), job // shares % groups, job % shares

            def part(number: Any, begins: bool) -> None:
                with ir.serial(0, panels // shares) as own, ir.serial(0, self.lines // groups) as line:
                    where = (t, group * (self.lines // groups) + line, share * (panels // shares) + own, number)
                    blocks = self.width // self.block
                    if blocks:
                        with ir.serial(0, blocks) as nth:
                            self._block(a, b, bias, result, where, nth * self.block, self.block, begins)
                    if rest := self.width % self.block:
                        self._block(a, b, bias, result, where, blocks * self.block, rest, begins)

            part(0, True)
            if self.parts > 1:
                with ir.serial(1, self.parts) as number:
                    part(number, False)

    def _block(
        self, a: Any, b: Any, bias: Any, result: Any, where: tuple[Any, ...], row: Any, rows: int, begins: bool
    ) -> None:
        t, line, panel, part = where
        sums = ir.alloc_buffer((rows, self.panel), FLOAT)
        pairs = ir.alloc_buffer((rows,), PAIR) if self.tile.halved else None
        for i in range(rows):
            y, indices = result(t, line, row + i)
            with ir.vectorized(0, self.panel) as z:
                column = panel * self.panel + z
                start = bias[column] if bias is not None else ir.float32(0)
                value = start if begins else y[*indices, column]
                ir.buffer_store(sums, value, [i, z])
        with ir.serial(0, self.chunk) as k:
            for i in range(rows):
                if pairs is None:
                    with ir.vectorized(0, self.panel) as z:
                        product = a(t, line, row + i, part, k) * b(t, panel, part, k, z)
                        ir.buffer_store(sums, sums[i, z] + product, [i, z])
                else:
                    ir.buffer_store(pairs, a(t, line, row + i, part, k), [i])
                    weights = functools.partial(b, t, panel, part, k)
                    add_products(sums, i, self.panel, pairs[i], weights, self._native)
        for i in range(rows):
            y, indices = result(t, line, row + i)
            with ir.vectorized(0, self.panel) as z:
                value = rounded(sums[i, z]) if y.dtype == HALF else sums[i, z]
                ir.buffer_store(y, value, [*indices, panel * self.panel + z])


def _next_divisor(number: int, above: int) -> int | None:
    return next((n for n in range(above + 1, number + 1) if number % n == 0), None)


def gemm(name: str, batch: int, rows: int, columns: int, depth: int, bias: bool, halved: bool, tile: Tile) -> Any:
    """A kernel that computes `y[t] = x[t] @ w[t] + bias`.

    It takes x `[batch, rows, depth]`, packed w `[batch, columns / panel, depth, panel]` and, with `bias`, a bias
    `[columns]`. It writes y `[batch, rows, columns]`, in bfloat16 if `halved`. If the tile multiplies bfloat16, x is
    bfloat16 and w consists of pairs.
    """
    panel, width = tile.panel(columns), _divisor(rows, GROUP)
    steps = depth // 2 if tile.halved else depth
    chunk = steps if halved else _divisor(steps, CHUNK)
    if width < tile.rows and rows > width:  # no suitable divisor: one line, whose last block is smaller
        width = rows
    loops = _Product(batch, rows // width, width, columns, panel, steps // chunk, chunk, tile.row_block(width), tile)

    def body(x: Any, w: Any, *rest: Any) -> None:
        def value(t: Any, line: Any, row: Any, part: Any, k: Any) -> Any:
            where, step = [t, line * width + row], part * chunk + k
            return pair(x, where, step) if tile.halved else x[*where, step]

        loops.write(
            value,
            lambda t, p, part, k, z: w[t, p, part * chunk + k, z],
            rest[0] if bias else None,
            lambda t, line, row: (rest[-1], [t, line * width + row]),
        )

    shapes = {"x": (batch, rows, depth), "w": (batch, columns // panel, steps, panel)}
    shapes |= {"bias": (columns,)} if bias else {}
    return kernel(name, shapes | {"y": (batch, rows, columns)}, body, _types(tile) | ({"y": HALF} if halved else {}))


def _types(tile: Tile) -> dict[str, str]:
    return {"x": HALF, "w": PAIR} if tile.halved else {}


def conv2d(
    name: str, batch: int, height: int, width: int, channels: int, filters: int, taps: int, stride: int, tile: Tile
) -> Any:
    """A kernel for a convolution with filters of `taps` x `taps`.

    It takes x `[batch, height, width, channels]`, already padded, packed w
    `[filters / panel, taps, taps, channels, panel]` and a bias `[filters]`, and writes y `[batch, h, w, filters]`. If
    the tile multiplies bfloat16, x is bfloat16 and w consists of pairs.
    """
    high, wide = (height - taps) // stride + 1, (width - taps) // stride + 1
    steps = channels // 2 if tile.halved else channels
    panel, chunk = tile.panel(filters), _divisor(steps, CHUNK)
    pieces = steps // chunk
    loops = _Product(1, batch * high, wide, filters, panel, taps * taps * pieces, chunk, tile.row_block(wide), tile)

    def body(x: Any, w: Any, bias: Any, y: Any) -> None:
        def value(t: Any, line: Any, row: Any, part: Any, k: Any) -> Any:
            down, right, piece = part // (taps * pieces), part // pieces % taps, part % pieces
            where, step = [line // high, line % high * stride + down, row * stride + right], piece * chunk + k
            return pair(x, where, step) if tile.halved else x[*where, step]

        def weight(t: Any, p: Any, part: Any, k: Any, z: Any) -> Any:
            return w[p, part // (taps * pieces), part // pieces % taps, part % pieces * chunk + k, z]

        loops.write(value, weight, bias, lambda t, line, row: (y, [line // high, line % high, row]))

    shapes = {"x": (batch, height, width, channels), "w": (filters // panel, taps, taps, steps, panel)}
    return kernel(name, shapes | {"bias": (filters,), "y": (batch, high, wide, filters)}, body, _types(tile))
