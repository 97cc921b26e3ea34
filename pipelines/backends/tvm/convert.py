"""torch.export graph -> Relax over our kernels: converters by ATen name, for TVM's importer.

Everything runs in NHWC. A converter of a picture-shaped operation emits NHWC and a lazy permutation back to NCHW; the
next one finds the NHWC twin of its input, so that the permutations die unused. Weights become arguments of their own,
in the kernels' layouts, named as in the model's state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from torch import fx
from torch.utils.dlpack import from_dlpack
from tvm import relax, te

from pipelines.backends.tvm import kernels
from pipelines.backends.tvm.kernels import FLOAT, Tile
from pipelines.backends.tvm.packing import Layout

SDPA = "sdgraph.scaled_dot_product_attention"
WINOGRAD_SIDE = 16
"""Winograd's weights are four times as large and read once an evaluation: they pay on maps this high and wide,"""
WINOGRAD_BYTES = 8 * 2**20
"""and on smaller ones if they are smaller than this."""


def _attention(query: Any, key: Any, value: Any, result: Any) -> None:
    """Torch's own attention, called from compiled code; all `[batch, tokens, heads, width]`."""
    q, k, v, out = (from_dlpack(t) for t in (query, key, value, result))
    attended = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out.copy_(attended.transpose(1, 2))


tvm_ffi.register_global_func(SDPA, _attention, override=True)


class UnsupportedOperationError(ValueError):
    """The model uses an operation in a form that no converter knows."""


class Converters:
    """One model's conversion; `weights` fills up on the way."""

    def __init__(self, exported: torch.export.ExportedProgram, tile: Tile, winograd: bool = True) -> None:
        """Convert `exported` for a machine with `tile`'s registers; without `winograd` every convolution is direct."""
        self._parameters = dict(exported.graph_signature.inputs_to_parameters)
        self._tile = tile
        self._winograd = winograd
        self._nhwc: dict[relax.Expr, relax.Expr] = {}
        self._untransposed: dict[relax.Expr, relax.Expr] = {}
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self.weights: dict[tuple[str, Layout], relax.Var] = {}

    def table(self) -> dict[str, Callable[[fx.Node, Any], relax.Expr]]:
        """ATen name -> converter; what is not here, TVM's importer converts."""
        return {
            "conv2d.default": self._conv2d,
            "linear.default": self._linear,
            "group_norm.default": self._group_norm,
            "layer_norm.default": self._layer_norm,
            "scaled_dot_product_attention.default": self._sdpa,
            "transpose.int": self._transpose,
            "permute.default": self._permute,
            "silu.default": self._silu,
            "gelu.default": self._gelu,
            "add.Tensor": self._add,
            "div.Tensor": self._div,
            "cat.default": self._cat,
            "upsample_nearest2d.vec": self._upsample,
            "contiguous.default": self._same,
            "dropout.default": self._same,
        }

    # Weights and kernels

    def _weight(self, node: Any, layout: Layout, imported: Any) -> relax.Var:
        """The argument that carries a weight in a layout."""
        name = self._parameters.get(getattr(node, "name", ""))
        if name is None:
            raise UnsupportedOperationError(f"{node} is computed, but a weight was expected")
        if (name, layout) not in self.weights:
            shape = layout.shape(_shape(imported))
            label = f"{name.replace('.', '_')}_{layout.kind}"
            self.weights[name, layout] = relax.Var(label, relax.TensorType(shape, FLOAT))
        return self.weights[name, layout]

    def _bias(self, node: Any, imported: Any, width: int) -> relax.Expr:
        return relax.const(np.zeros(width, FLOAT)) if node is None else self._weight(node, Layout(), imported)

    def _call(
        self, bb: Any, make: Callable[..., Any], sizes: tuple[Any, ...], arguments: list[Any], out: tuple[int, ...]
    ) -> relax.Expr:
        """Call the kernel `make(name, *sizes)`, made once."""
        key = (make.__name__, *sizes)
        if key not in self._kernels:
            name = "_".join(str(s).replace(".", "p").replace("-", "m") for s in key if not isinstance(s, Tile))
            self._kernels[key] = bb.add_func(make(name, *sizes).without_attr("global_symbol"), name)
        return bb.emit(relax.call_tir(self._kernels[key], arguments, relax.TensorType(out, FLOAT)))

    # Layout of pictures

    def _to_nhwc(self, bb: Any, x: relax.Expr) -> relax.Expr:
        if x not in self._nhwc:
            self._nhwc[x] = bb.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
        return self._nhwc[x]

    def _from_nhwc(self, bb: Any, y: relax.Expr) -> relax.Expr:
        x = bb.emit(relax.op.permute_dims(y, [0, 3, 1, 2]))
        self._nhwc[x] = y
        return x

    # Products

    def _conv2d(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, given = importer.block_builder, importer.retrieve_args(node)
        x, weight, bias, stride, padding, dilation, groups = _filled(given, (None, [1], [0], [1], 1), 2)
        picture = self._to_nhwc(bb, x)
        (batch, height, width, channels), (filters, _, taps, across) = _shape(picture), _shape(weight)
        stride, pad = stride[0], padding[0]
        if taps != across or dilation[0] != 1 or groups != 1 or len({*given[3]} if len(given) > 3 else {1}) != 1:
            raise UnsupportedOperationError(f"{node}: a convolution with dilation, groups or unequal sides")
        panel = self._tile.panel(filters)
        bias = self._bias(_at(node, 2), bias, filters)
        if taps == 1 and stride == 1:
            packed = self._weight(node.args[1], Layout("matrix", panel), weight)
            flat = bb.emit(relax.op.reshape(picture, (1, batch * height * width, channels)))
            product = self._gemm(bb, flat, packed, bias)
            return self._from_nhwc(bb, bb.emit(relax.op.reshape(product, (batch, height, width, filters))))
        padded = bb.emit(relax.op.nn.pad(picture, (0, 0, pad, pad, pad, pad, 0, 0))) if pad else picture
        if stride == 1 and taps == 3 and pad == 1 and (m := self._winograd_tile(height, width, channels, filters)):
            return self._from_nhwc(bb, self._by_winograd(bb, node, padded, weight, bias, m))
        packed = self._weight(node.args[1], Layout("conv", panel), weight)
        high, wide = ((side + 2 * pad - taps) // stride + 1 for side in (height, width))
        sizes = (batch, height + 2 * pad, width + 2 * pad, channels, filters, taps, stride, self._tile)
        y = self._call(bb, kernels.conv2d, sizes, [padded, packed, bias], (batch, high, wide, filters))
        return self._from_nhwc(bb, y)

    def _winograd_tile(self, height: int, width: int, channels: int, filters: int) -> int:
        """The m of F(m x m, 3 x 3) that pays here, 0 for none."""
        m = next((m for m in (4, 2) if height % m == 0 and width % m == 0), 0)
        size = 4 * (m + 2) ** 2 * channels * filters
        pays = min(height, width) >= WINOGRAD_SIDE or size <= WINOGRAD_BYTES
        return m if self._winograd and pays and channels % 8 == 0 and filters % 8 == 0 else 0

    def _by_winograd(
        self, bb: Any, node: fx.Node, padded: relax.Expr, weight: Any, bias: relax.Expr, m: int
    ) -> relax.Expr:
        batch, high, wide, channels = _shape(padded)
        height, width, filters = high - 2, wide - 2, _shape(weight)[0]
        points, tiles = (m + 2) ** 2, batch * (height // m) * (width // m)
        packed = self._weight(node.args[1], Layout("winograd", self._tile.panel(filters), m), weight)
        sizes = (batch, height, width)
        spread = self._call(bb, kernels.winograd_input, (*sizes, channels, m), [padded], (points, tiles, channels))
        product = self._call(
            bb,
            kernels.gemm,
            (points, tiles, filters, channels, False, self._tile),
            [spread, packed],
            (points, tiles, filters),
        )
        return self._call(
            bb, kernels.winograd_output, (*sizes, filters, m), [product, bias], (batch, height, width, filters)
        )

    def _gemm(self, bb: Any, x: relax.Expr, packed: relax.Var, bias: relax.Expr) -> relax.Expr:
        """X `[1, rows, depth]` times a packed matrix."""
        (_, rows, depth), (_, panels, _, panel) = _shape(x), _shape(packed)
        columns = panels * panel
        sizes = (1, rows, columns, depth, True, self._tile)
        return self._call(bb, kernels.gemm, sizes, [x, packed, bias], (1, rows, columns))

    def _linear(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, weight, bias = _filled(importer.retrieve_args(node), (None,), 2)
        *outer, depth = _shape(x)
        columns = _shape(weight)[0]
        packed = self._weight(node.args[1], Layout("matrix", self._tile.panel(columns)), weight)
        flat = bb.emit(relax.op.reshape(x, (1, math.prod(outer), depth)))
        product = self._gemm(bb, flat, packed, self._bias(_at(node, 2), bias, columns))
        return bb.emit(relax.op.reshape(product, (*outer, columns)))

    # Norms and attention

    def _group_norm(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, groups, weight, bias, eps = _filled(importer.retrieve_args(node), (None, None, 1e-5), 2)[:5]
        picture = self._to_nhwc(bb, x)
        batch, height, width, channels = _shape(picture)
        flat = bb.emit(relax.op.reshape(picture, (batch, height * width, channels)))
        gamma, beta = self._weight(node.args[2], Layout(), weight), self._weight(node.args[3], Layout(), bias)
        sizes = (batch, height * width, channels, groups, eps)
        factors = self._call(bb, kernels.group_norm, sizes, [flat, gamma, beta], (batch, 2, channels))
        scale, shift = (
            bb.emit(
                relax.op.reshape(bb.emit(relax.op.strided_slice(factors, [1], [i], [i + 1])), (batch, 1, 1, channels))
            )
            for i in (0, 1)
        )
        scaled = bb.emit(relax.op.multiply(picture, scale))
        return self._from_nhwc(bb, bb.emit(relax.op.add(scaled, shift)))

    def _layer_norm(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, axes, weight, bias, eps = _filled(importer.retrieve_args(node), (None, None, 1e-5), 2)[:5]
        shape = _shape(x)
        if len(axes) != 1:
            raise UnsupportedOperationError(f"{node}: a LayerNorm over {len(axes)} axes")
        rows, width = math.prod(shape[:-1]), shape[-1]
        gamma, beta = self._weight(node.args[2], Layout(), weight), self._weight(node.args[3], Layout(), bias)
        flat = bb.emit(relax.op.reshape(x, (rows, width)))
        y = self._call(bb, kernels.layer_norm, (rows, width, eps), [flat, gamma, beta], (rows, width))
        return bb.emit(relax.op.reshape(y, shape))

    def _transpose(self, node: fx.Node, importer: Any) -> relax.Expr:
        """Heads to the front and back: lazy, since torch's attention takes views."""
        bb = importer.block_builder
        x, first, second = importer.retrieve_args(node)
        if x in self._untransposed and (first, second) == (1, 2):
            return self._untransposed[x]
        axes = list(range(len(_shape(x))))
        axes[first], axes[second] = axes[second], axes[first]
        y = bb.emit(relax.op.permute_dims(x, axes))
        if len(axes) == 4 and (first, second) == (1, 2):
            self._untransposed[y] = x
        return y

    def _sdpa(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, given = importer.block_builder, importer.retrieve_args(node)
        if any(argument not in (None, 0.0, False) for argument in given[3:]) or node.kwargs.get("scale") is not None:
            raise UnsupportedOperationError(f"{node}: attention with a mask, dropout or a scale of its own")
        query, key, value = (self._untransposed[t] for t in given[:3])
        shape = relax.TensorType(_shape(query), FLOAT)
        attended = bb.emit(relax.call_dps_packed(SDPA, [query, key, value], shape))
        y = bb.emit(relax.op.permute_dims(attended, [0, 2, 1, 3]))
        self._untransposed[y] = attended
        return y

    # Elementwise and shape

    def _permute(self, node: fx.Node, importer: Any) -> relax.Expr:
        x, axes = importer.retrieve_args(node)[:2]
        if list(axes) == [0, 2, 3, 1]:
            return self._to_nhwc(importer.block_builder, x)
        if list(axes) == [0, 3, 1, 2]:
            return self._from_nhwc(importer.block_builder, x)
        return importer.block_builder.emit(relax.op.permute_dims(x, list(axes)))

    def _silu(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, x = importer.block_builder, importer.retrieve_args(node)[0]

        def silu(y: relax.Expr) -> relax.Expr:
            one = relax.const(np.float32(1))
            return relax.op.divide(y, relax.op.add(one, relax.op.exp(relax.op.negative(y))))

        if x in self._nhwc:
            return self._from_nhwc(bb, bb.emit(silu(self._nhwc[x])))
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
        (wide, tall), shape, other = (len(_shape(x)), len(_shape(y))), _shape(x), _shape(y)
        if wide == tall == 4:
            picture = self._to_nhwc(bb, x)
            if other[2:] == (1, 1):  # the time embedding, one value a channel
                second = bb.emit(relax.op.reshape(y, (other[0], 1, 1, other[1])))
            elif other == shape:
                second = self._to_nhwc(bb, y)
            else:
                raise UnsupportedOperationError(f"{node}: a sum of {shape} and {other}")
            return self._from_nhwc(bb, bb.emit(relax.op.add(picture, second)))
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
        parts, axis = _filled(importer.retrieve_args(node), (0,), 1)
        if len(_shape(parts[0])) == 4 and axis == 1:
            pictures = [self._to_nhwc(bb, part) for part in parts]
            return self._from_nhwc(bb, bb.emit(relax.op.concat(pictures, axis=3)))
        return bb.emit(relax.op.concat(list(parts), axis=axis))

    def _upsample(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, x = importer.block_builder, importer.retrieve_args(node)[0]
        picture = self._to_nhwc(bb, x)
        batch, height, width, channels = _shape(picture)
        tall, wide = (int(side) for side in node.meta["val"].shape[2:])

        def nearest(t: te.Tensor) -> te.Tensor:
            return te.compute(
                (batch, tall, wide, channels),
                lambda n, h, w, c: t[n, h * height // tall, w * width // wide, c],
                name="nearest",
            )

        return self._from_nhwc(bb, bb.emit_te(nearest, picture, primfunc_name_hint="upsample"))

    def _same(self, node: fx.Node, importer: Any) -> relax.Expr:
        return importer.retrieve_args(node)[0]


def import_graph(converters: Converters, exported: torch.export.ExportedProgram) -> tvm.IRModule:
    """The model as a Relax module; its `main` takes the inputs and then `converters.weights`, in order."""
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(
        exported,
        keep_params_as_input=True,
        unwrap_unit_return_tuple=True,
        run_ep_decomposition=False,
        custom_convert_map=converters.table(),
    )
    main = module["main"]
    inputs = list(main.params)[: int(main.attrs["num_input"])]
    module["main"] = relax.Function(
        [*inputs, *converters.weights.values()], main.body, main.ret_ty, main.is_pure
    ).with_attr("global_symbol", "main")
    return module


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in value.ty.shape)


def _filled(given: tuple[Any, ...], defaults: tuple[Any, ...], required: int) -> list[Any]:
    """Arguments of an ATen call with its defaults for what is missing after the `required` ones."""
    return [*given, *defaults[len(given) - required :]]


def _at(node: fx.Node, index: int) -> Any:
    return node.args[index] if len(node.args) > index else None
