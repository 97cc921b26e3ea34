"""Winograd's convolution F(m x m, 3 x 3), arXiv:1509.09308: the transforms before and after the products."""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as ir

from pipelines.backends.tvm.bfloat16 import HALF, rounded
from pipelines.backends.tvm.packing import WINOGRAD_AT, WINOGRAD_BT
from pipelines.backends.tvm.tir import FLOAT, VECTOR, kernel


def winograd_input(name: str, batch: int, height: int, width: int, channels: int, m: int, halved: bool) -> Any:
    """A kernel for the input transform, B^T d B of every tile.

    It takes x `[batch, height + 2, width + 2, channels]`, already padded, and writes y `[(m + 2)^2, tiles, channels]`,
    in bfloat16 if `halved`.
    """
    side, high, wide = m + 2, height // m, width // m
    lanes = math.gcd(channels, VECTOR)
    transform = WINOGRAD_BT[m]

    def body(x: Any, y: Any) -> None:
        with ir.parallel(0, batch * high * wide) as tile:
            image, down, right = tile // (high * wide), tile // wide % high * m, tile % wide * m
            patch, half = (ir.alloc_buffer((side * side, lanes), FLOAT) for _ in range(2))
            with ir.serial(0, channels // lanes) as group:
                for i in range(side):
                    for j in range(side):
                        with ir.vectorized(0, lanes) as z:
                            value = x[image, down + i, right + j, group * lanes + z]
                            ir.buffer_store(patch, value, [i * side + j, z])
                for i in range(side):
                    for j in range(side):
                        with ir.vectorized(0, lanes) as z:
                            value = _weighted(transform[i], [patch[r * side + j, z] for r in range(side)])
                            ir.buffer_store(half, value, [i * side + j, z])
                for i in range(side):
                    for j in range(side):
                        with ir.vectorized(0, lanes) as z:
                            value = _weighted(transform[j], [half[i * side + r, z] for r in range(side)])
                            where = [i * side + j, tile, group * lanes + z]
                            ir.buffer_store(y, rounded(value) if halved else value, where)

    tiles = batch * high * wide
    shapes = {"x": (batch, height + 2, width + 2, channels), "y": (side * side, tiles, channels)}
    return kernel(name, shapes, body, {"y": HALF} if halved else None)


def winograd_output(name: str, batch: int, height: int, width: int, filters: int, m: int) -> Any:
    """A kernel for the output transform, A^T x A + bias of every tile.

    It takes x `[(m + 2)^2, tiles, filters]` and a bias `[filters]`, and writes y `[batch, height, width, filters]`.
    """
    side, high, wide = m + 2, height // m, width // m
    lanes = math.gcd(filters, VECTOR)
    transform = WINOGRAD_AT[m]

    def body(x: Any, bias: Any, y: Any) -> None:
        with ir.parallel(0, batch * high * wide) as tile:
            image, down, right = tile // (high * wide), tile // wide % high * m, tile % wide * m
            patch = ir.alloc_buffer((side * side, lanes), FLOAT)
            half = ir.alloc_buffer((m * side, lanes), FLOAT)
            with ir.serial(0, filters // lanes) as group:
                for i in range(side * side):
                    with ir.vectorized(0, lanes) as z:
                        ir.buffer_store(patch, x[i, tile, group * lanes + z], [i, z])
                for i in range(m):
                    for j in range(side):
                        with ir.vectorized(0, lanes) as z:
                            value = _weighted(transform[i], [patch[r * side + j, z] for r in range(side)])
                            ir.buffer_store(half, value, [i * side + j, z])
                for i in range(m):
                    for j in range(m):
                        with ir.vectorized(0, lanes) as z:
                            column = group * lanes + z
                            value = _weighted(transform[j], [half[i * side + r, z] for r in range(side)])
                            ir.buffer_store(y, bias[column] + value, [image, down + i, right + j, column])

    tiles = batch * high * wide
    shapes = {"x": (side * side, tiles, filters), "bias": (filters,)}
    return kernel(name, shapes | {"y": (batch, height, width, filters)}, body)


def _weighted(weights: tuple[float, ...], values: list[Any]) -> Any:
    """The sum of weights times values, without products with 0 and 1."""
    terms = [v if w == 1 else ir.float32(w) * v for w, v in zip(weights, values, strict=True) if w]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
