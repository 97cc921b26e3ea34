"""The kernels of GroupNorm and LayerNorm."""

from __future__ import annotations

import math
from typing import Any

from tvm.tirx.script import builder as ir

from pipelines.backends.tvm.bfloat16 import HALF, rounded
from pipelines.backends.tvm.tir import FLOAT, VECTOR, kernel


def group_norm(name: str, batch: int, pixels: int, channels: int, groups: int, eps: float) -> Any:
    """A kernel for the scale and shift that GroupNorm applies to every channel.

    It takes x `[batch, pixels, channels]`, weight and bias `[channels]`, and writes y `[batch, 2, channels]`; the
    normalised x is `x * y[:, 0] + y[:, 1]`. Sums run over the pixels of each channel, then over a group's channels.
    """
    size = channels // groups
    lanes = math.gcd(channels, VECTOR)

    def body(x: Any, weight: Any, bias: Any, y: Any) -> None:
        sums = ir.alloc_buffer((batch, 2, channels), FLOAT)
        with ir.parallel(0, batch * (channels // lanes)) as job:
            image, first = job // (channels // lanes), job % (channels // lanes) * lanes
            running = ir.alloc_buffer((2, lanes), FLOAT)
            for moment in range(2):
                with ir.vectorized(0, lanes) as z:
                    ir.buffer_store(running, ir.float32(0), [moment, z])
            with ir.serial(0, pixels) as pixel:
                for moment in range(2):
                    with ir.vectorized(0, lanes) as z:
                        value = x[image, pixel, first + z]
                        ir.buffer_store(running, running[moment, z] + (value * value if moment else value), [moment, z])
            for moment in range(2):
                with ir.vectorized(0, lanes) as z:
                    ir.buffer_store(sums, running[moment, z], [image, moment, first + z])
        with ir.serial(0, batch * groups) as job:
            image, first = job // groups, job % groups * size
            total = ir.alloc_buffer((2,), FLOAT)
            for moment in range(2):
                ir.buffer_store(total, ir.float32(0), [moment])
                with ir.serial(0, size) as c:
                    ir.buffer_store(total, total[moment] + sums[image, moment, first + c], [moment])
                ir.buffer_store(total, total[moment] * ir.float32(1 / (pixels * size)), [moment])
            deviation = ir.sqrt(ir.max(total[1] - total[0] * total[0], ir.float32(0)) + ir.float32(eps))
            ir.buffer_store(total, ir.float32(1) / deviation, [1])
            with ir.serial(0, size) as c:
                scale = weight[first + c] * total[1]
                ir.buffer_store(y, scale, [image, 0, first + c])
                ir.buffer_store(y, bias[first + c] - total[0] * scale, [image, 1, first + c])

    shapes = {"x": (batch, pixels, channels), "weight": (channels,), "bias": (channels,)}
    return kernel(name, shapes | {"y": (batch, 2, channels)}, body)


def layer_norm(name: str, rows: int, width: int, eps: float, halved: bool) -> Any:
    """A kernel for LayerNorm over the last axis, in two passes: first the mean, then the variance.

    It takes x `[rows, width]`, weight and bias `[width]`, and writes y `[rows, width]`, in bfloat16 if `halved`.
    """
    lanes = math.gcd(width, VECTOR)

    def body(x: Any, weight: Any, bias: Any, y: Any) -> None:
        with ir.parallel(0, rows) as row:
            running, total = ir.alloc_buffer((lanes,), FLOAT), ir.alloc_buffer((2,), FLOAT)
            for moment in range(2):
                with ir.vectorized(0, lanes) as z:
                    ir.buffer_store(running, ir.float32(0), [z])
                with ir.serial(0, width // lanes) as group, ir.vectorized(0, lanes) as z:
                    value = x[row, group * lanes + z]
                    away = value - total[0]
                    ir.buffer_store(running, running[z] + (away * away if moment else value), [z])
                ir.buffer_store(total, ir.float32(0), [moment])
                with ir.serial(0, lanes) as z:
                    ir.buffer_store(total, total[moment] + running[z], [moment])
                ir.buffer_store(total, total[moment] * ir.float32(1 / width), [moment])
            ir.buffer_store(total, ir.float32(1) / ir.sqrt(total[1] + ir.float32(eps)), [1])
            with ir.serial(0, width // lanes) as group, ir.vectorized(0, lanes) as z:
                column = group * lanes + z
                value = (x[row, column] - total[0]) * total[1] * weight[column] + bias[column]
                ir.buffer_store(y, rounded(value) if halved else value, [row, column])

    shapes = {"x": (rows, width), "weight": (width,), "bias": (width,)}
    return kernel(name, shapes | {"y": (rows, width)}, body, {"y": HALF} if halved else None)
