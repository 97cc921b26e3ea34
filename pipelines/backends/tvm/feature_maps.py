"""Converters of elementwise operations and of those that move data. Feature maps stay in NHWC between kernels.

A converter computes a feature map in NHWC, and emits a permutation back to NCHW for the importer. The next converter
finds the NHWC form of its input and reads that, so that dead-code elimination removes the permutations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te


class UnsupportedOperationError(ValueError):
    """The model uses an operation in a form that no converter supports."""


class FeatureMapConverters:
    """Converters of operations without weights. They remember the NHWC form of each feature map."""

    def __init__(self) -> None:
        self._nhwc: dict[relax.Expr, relax.Expr] = {}

    def table(self) -> dict[str, Callable[[fx.Node, Any], relax.Expr]]:
        """Converters by ATen name."""
        return {
            "permute.default": self._permute,
            "silu.default": self._silu,
            "gelu.default": self._gelu,
            "add.Tensor": self._add,
            "div.Tensor": self._div,
            "cat.default": self._cat,
            "upsample_nearest2d.vec": self._upsample,
            "contiguous.default": self._same,
            "dropout.default": self._same,
            "to.dtype": self._to,
        }

    def to_nhwc(self, bb: Any, x: relax.Expr) -> relax.Expr:
        """The NHWC form of a feature map x in NCHW."""
        if x not in self._nhwc:
            self._nhwc[x] = bb.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
        return self._nhwc[x]

    def from_nhwc(self, bb: Any, y: relax.Expr) -> relax.Expr:
        """The NCHW form of a feature map y in NHWC."""
        x = bb.emit(relax.op.permute_dims(y, [0, 3, 1, 2]))
        self._nhwc[x] = y
        return x

    def _permute(self, node: fx.Node, importer: Any) -> relax.Expr:
        x, axes = importer.retrieve_args(node)[:2]
        if list(axes) == [0, 2, 3, 1]:
            return self.to_nhwc(importer.block_builder, x)
        if list(axes) == [0, 3, 1, 2]:
            return self.from_nhwc(importer.block_builder, x)
        return importer.block_builder.emit(relax.op.permute_dims(x, list(axes)))

    def _silu(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, x = importer.block_builder, importer.retrieve_args(node)[0]

        def silu(y: relax.Expr) -> relax.Expr:
            one = relax.const(np.float32(1))
            return relax.op.divide(y, relax.op.add(one, relax.op.exp(relax.op.negative(y))))

        if x in self._nhwc:
            return self.from_nhwc(bb, bb.emit(silu(self._nhwc[x])))
        return bb.emit(silu(x))

    def _gelu(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, x = importer.block_builder, importer.retrieve_args(node)[0]
        if node.kwargs.get("approximate", "none") != "none":
            raise UnsupportedOperationError(f"{node}: the approximate GELU")
        half, one, root = (relax.const(np.float32(v)) for v in (0.5, 1.0, math.sqrt(0.5)))
        erf = relax.op.erf(relax.op.multiply(x, root))
        return bb.emit(relax.op.multiply(relax.op.multiply(x, half), relax.op.add(erf, one)))

    def _add(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, y = importer.retrieve_args(node)[:2]
        if node.kwargs.get("alpha", 1) != 1:
            raise UnsupportedOperationError(f"{node}: a sum with alpha")
        if not isinstance(x, relax.Expr):
            x, y = y, x
        if not isinstance(y, relax.Expr):
            return bb.emit(relax.op.add(x, relax.const(np.float32(y))))
        (wide, tall), shape, other = (len(shape_of(x)), len(shape_of(y))), shape_of(x), shape_of(y)
        if wide == tall == 4:
            picture = self.to_nhwc(bb, x)
            if other[2:] == (1, 1):  # the time embedding, one value a channel
                second = bb.emit(relax.op.reshape(y, (other[0], 1, 1, other[1])))
            elif other == shape:
                second = self.to_nhwc(bb, y)
            else:
                raise UnsupportedOperationError(f"{node}: a sum of {shape} and {other}")
            return self.from_nhwc(bb, bb.emit(relax.op.add(picture, second)))
        return bb.emit(relax.op.add(x, y))

    def _div(self, node: fx.Node, importer: Any) -> relax.Expr:
        x, y = importer.retrieve_args(node)[:2]
        if not isinstance(y, relax.Expr):
            if float(y) == 1.0:
                return x
            y = relax.const(np.float32(y))
        return importer.block_builder.emit(relax.op.divide(x, y))

    def _cat(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        parts, axis = filled(importer.retrieve_args(node), (0,), 1)
        if len(shape_of(parts[0])) == 4 and axis == 1:
            pictures = [self.to_nhwc(bb, part) for part in parts]
            return self.from_nhwc(bb, bb.emit(relax.op.concat(pictures, axis=3)))
        return bb.emit(relax.op.concat(list(parts), axis=axis))

    def _upsample(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, x = importer.block_builder, importer.retrieve_args(node)[0]
        picture = self.to_nhwc(bb, x)
        batch, height, width, channels = shape_of(picture)
        tall, wide = (int(side) for side in node.meta["val"].shape[2:])

        def nearest(t: te.Tensor) -> te.Tensor:
            return te.compute(
                (batch, tall, wide, channels),
                lambda n, h, w, c: t[n, h * height // tall, w * width // wide, c],
                name="nearest",
            )

        return self.from_nhwc(bb, bb.emit_te(nearest, picture, primfunc_name_hint="upsample"))

    def _to(self, node: fx.Node, importer: Any) -> relax.Expr:
        """Convert to another type. An input whose exported type is already the wanted one is kept, even as bfloat16."""
        x, wanted, given = importer.retrieve_args(node)[0], node.meta["val"].dtype, node.args[0]
        if isinstance(given, fx.Node) and given.meta["val"].dtype == wanted:
            return x
        return importer.block_builder.emit(relax.op.astype(x, str(wanted).removeprefix("torch.")))

    def _same(self, node: fx.Node, importer: Any) -> relax.Expr:
        return importer.retrieve_args(node)[0]


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a Relax tensor."""
    return tuple(int(side) for side in value.ty.shape)


def filled(given: tuple[Any, ...], defaults: tuple[Any, ...], required: int) -> list[Any]:
    """The arguments of an ATen call, completed with `defaults`, which are those of the arguments after `required`."""
    return [*given, *defaults[len(given) - required :]]


def argument(node: fx.Node, index: int) -> Any:
    """A positional argument of an ATen call, or None if it was not given."""
    return node.args[index] if len(node.args) > index else None
