"""Conversion of a torch.export graph to Relax with the kernels of this package.

`Converters` has converters of ATen operations, which TVM's importer calls. Every weight becomes an argument of the
program, in the layout that its kernel reads, named as in the model's state dict.
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
from tvm import relax

from pipelines.backends.tvm import norms, products, winograd
from pipelines.backends.tvm.bfloat16 import HALF, PAIR, rounded_tensor
from pipelines.backends.tvm.feature_maps import (
    FeatureMapConverters,
    UnsupportedOperationError,
    argument,
    filled,
    shape_of,
)
from pipelines.backends.tvm.low_rank import ADD_LOW_RANK
from pipelines.backends.tvm.packing import Kind, Layout
from pipelines.backends.tvm.products import Tile
from pipelines.backends.tvm.tir import FLOAT

SDPA = "sdgraph.scaled_dot_product_attention"
WINOGRAD_SIDE = 16
"""Winograd's convolution is used for feature maps at least this high and wide. Its weights are four times as large, and
reading them once per evaluation costs more than it saves on smaller maps."""
WINOGRAD_BYTES = 8 * 2**20
"""It is also used for smaller feature maps if its weights have at most this many bytes."""


FLOAT32_LAYERS = frozenset({"conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj"})
"""Layers that multiply in float32 in every precision: they read the latents or the timestep, or write the
model output, and are small."""


def _attention(query: Any, key: Any, value: Any, result: Any) -> None:
    """Call torch's attention from compiled code. All tensors are `[batch, tokens, heads, width]` and of one type."""
    q, k, v, out = (from_dlpack(t) for t in (query, key, value, result))
    if q.dtype == torch.uint16:
        q, k, v, out = (t.view(torch.bfloat16) for t in (q, k, v, out))
    attended = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out.copy_(attended.transpose(1, 2))


tvm_ffi.register_global_func(SDPA, _attention, override=True)


class Converters(FeatureMapConverters):
    """The converters of one model. They collect in `weights` the weights that the program takes as arguments."""

    def __init__(self, exported: torch.export.ExportedProgram, tile: Tile, loras: bool = False) -> None:
        """Convert `exported` for the registers and arithmetic of `tile`; with `loras`, layers can apply LoRAs."""
        super().__init__()
        self._parameters = dict(exported.graph_signature.inputs_to_parameters)
        self._tile = tile
        self._loras = loras
        self._untransposed: dict[relax.Expr, relax.Expr] = {}
        self._halves: dict[relax.Expr, relax.Expr] = {}
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self.weights: dict[tuple[str, Layout], relax.Var] = {}

    def table(self) -> dict[str, Callable[[fx.Node, Any], relax.Expr]]:
        """Converters by ATen name. TVM's importer converts all other operations itself."""
        return super().table() | {
            "conv2d.default": self._conv2d,
            "linear.default": self._linear,
            "group_norm.default": self._group_norm,
            "layer_norm.default": self._layer_norm,
            "scaled_dot_product_attention.default": self._sdpa,
            "transpose.int": self._transpose,
        }

    # Weights and kernels

    def _weight(self, node: Any, layout: Layout, imported: Any) -> relax.Var:
        """The argument for a weight in a layout."""
        name = self._parameters.get(getattr(node, "name", ""))
        if name is None:
            raise UnsupportedOperationError(f"{node} is computed, but a weight was expected")
        if (name, layout) not in self.weights:
            shape = layout.shape(shape_of(imported))
            label = f"{name.replace('.', '_')}_{layout.kind}"
            dtype = PAIR if layout.halved else FLOAT
            self.weights[name, layout] = relax.Var(label, relax.TensorType(shape, dtype))
        return self.weights[name, layout]

    def _bias(self, node: Any, imported: Any, width: int) -> relax.Expr:
        return relax.const(np.zeros(width, FLOAT)) if node is None else self._weight(node, Layout(), imported)

    def _tile_for(self, weight: Any, depth: int) -> Tile:
        """The tile for the layer of a weight: in float32 for `FLOAT32_LAYERS`, and for an odd depth (no pairs)."""
        layers = self._parameters.get(getattr(weight, "name", ""), "").split(".")
        return self._tile.in_float32() if depth % 2 or FLOAT32_LAYERS.intersection(layers) else self._tile

    def _operand(self, bb: Any, x: relax.Expr, tile: Tile) -> relax.Expr:
        """The values of x in the type that a product reads; they are rounded once for all products that read x."""
        if not tile.halved or x.ty.dtype == HALF:
            return x
        if x not in self._halves:
            self._halves[x] = bb.emit_te(rounded_tensor, x, primfunc_name_hint="rounded")
        return self._halves[x]

    def _call(
        self,
        bb: Any,
        make: Callable[..., Any],
        sizes: tuple[Any, ...],
        arguments: list[Any],
        out: tuple[int, ...],
        dtype: str = FLOAT,
    ) -> relax.Expr:
        """Call the kernel `make(name, *sizes)`, which is built once for all calls with these sizes."""
        key = (make.__name__, *sizes)
        if key not in self._kernels:
            name = "_".join(str(s).replace(".", "p").replace("-", "m") for s in key if not isinstance(s, Tile))
            self._kernels[key] = bb.add_func(make(name, *sizes).without_attr("global_symbol"), name)
        return bb.emit(relax.call_tir(self._kernels[key], arguments, relax.TensorType(out, dtype)))

    # Products

    def _conv2d(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, given = importer.block_builder, importer.retrieve_args(node)
        x, weight, bias, stride, padding, dilation, groups = filled(given, (None, [1], [0], [1], 1), 2)
        picture = self.to_nhwc(bb, x)
        (batch, height, width, channels), (filters, _, taps, across) = shape_of(picture), shape_of(weight)
        stride, pad = stride[0], padding[0]
        if taps != across or dilation[0] != 1 or groups != 1 or len({*given[3]} if len(given) > 3 else {1}) != 1:
            raise UnsupportedOperationError(f"{node}: a convolution with dilation, groups or unequal sides")
        tile = self._tile_for(node.args[1], channels)
        panel = tile.panel(filters)
        bias = self._bias(argument(node, 2), bias, filters)
        if (taps, stride, pad) == (1, 1, 0):
            packed = self._weight(node.args[1], Layout("matrix16" if tile.halved else "matrix", panel), weight)
            whole = (1, batch * height * width, channels)
            flat = bb.emit(relax.op.reshape(self._operand(bb, picture, tile), whole))
            product = self._gemm(bb, flat, packed, bias, tile)
            product = self._adapted(bb, node, picture, whole, product)
            return self.from_nhwc(bb, bb.emit(relax.op.reshape(product, (batch, height, width, filters))))
        sides = (0, 0, pad, pad, pad, pad, 0, 0)
        m = self._winograd_tile(height, width, channels, filters, tile) if (taps, stride, pad) == (3, 1, 1) else 0
        if m:
            padded = bb.emit(relax.op.nn.pad(picture, sides))
            y = self._by_winograd(bb, node, padded, weight, bias, m, tile)
            return self.from_nhwc(bb, self._adapted(bb, node, picture, shape_of(picture), y))
        operand = self._operand(bb, picture, tile)
        padded = bb.emit(relax.op.nn.pad(operand, sides)) if pad else operand
        packed = self._weight(node.args[1], Layout("conv16" if tile.halved else "conv", panel), weight)
        high, wide = ((side + 2 * pad - taps) // stride + 1 for side in (height, width))
        sizes = (batch, height + 2 * pad, width + 2 * pad, channels, filters, taps, stride, tile)
        y = self._call(bb, products.conv2d, sizes, [padded, packed, bias], (batch, high, wide, filters))
        return self.from_nhwc(bb, self._adapted(bb, node, picture, shape_of(picture), y))

    def _winograd_tile(self, height: int, width: int, channels: int, filters: int, tile: Tile) -> int:
        """The m of Winograd's F(m x m, 3 x 3) to use for a convolution, 0 for the direct convolution."""
        # With m = 4 the transforms multiply the rounding error of bfloat16 by eight; with m = 2 they hardly add to it.
        m = next((m for m in ((2,) if tile.halved else (4, 2)) if height % m == 0 and width % m == 0), 0)
        size = (2 if tile.halved else 4) * (m + 2) ** 2 * channels * filters
        pays = min(height, width) >= WINOGRAD_SIDE or size <= WINOGRAD_BYTES
        return m if pays and channels % 8 == 0 and filters % 8 == 0 else 0

    def _by_winograd(
        self, bb: Any, node: fx.Node, padded: relax.Expr, weight: Any, bias: relax.Expr, m: int, tile: Tile
    ) -> relax.Expr:
        batch, high, wide, channels = shape_of(padded)
        height, width, filters = high - 2, wide - 2, shape_of(weight)[0]
        points, tiles = (m + 2) ** 2, batch * (height // m) * (width // m)
        kind: Kind = "winograd16" if tile.halved else "winograd"
        packed = self._weight(node.args[1], Layout(kind, tile.panel(filters), m), weight)
        sizes = (batch, height, width)
        spread = self._call(
            bb,
            winograd.winograd_input,
            (*sizes, channels, m, tile.halved),
            [padded],
            (points, tiles, channels),
            HALF if tile.halved else FLOAT,
        )
        product = self._call(
            bb,
            products.gemm,
            (points, tiles, filters, channels, False, False, tile),
            [spread, packed],
            (points, tiles, filters),
        )
        return self._call(
            bb, winograd.winograd_output, (*sizes, filters, m), [product, bias], (batch, height, width, filters)
        )

    def _gemm(
        self, bb: Any, x: relax.Expr, packed: relax.Var, bias: relax.Expr, tile: Tile, halved: bool = False
    ) -> relax.Expr:
        """The product of x `[1, rows, depth]` and a packed matrix, in bfloat16 if `halved`."""
        (_, rows, depth), (_, panels, _, panel) = shape_of(x), shape_of(packed)
        columns = panels * panel
        sizes, out = (1, rows, columns, depth, True, halved, tile), (1, rows, columns)
        return self._call(bb, products.gemm, sizes, [x, packed, bias], out, HALF if halved else FLOAT)

    def _linear(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, weight, bias = filled(importer.retrieve_args(node), (None,), 2)
        *outer, depth = shape_of(x)
        columns = shape_of(weight)[0]
        tile = self._tile_for(node.args[1], depth)
        layout = Layout("matrix16" if tile.halved else "matrix", tile.panel(columns))
        packed = self._weight(node.args[1], layout, weight)
        whole = (1, math.prod(outer), depth)
        flat = bb.emit(relax.op.reshape(self._operand(bb, x, tile), whole))
        halved = tile.halved and _feeds_attention(node) and not self._loras
        product = self._gemm(bb, flat, packed, self._bias(argument(node, 2), bias, columns), tile, halved)
        product = self._adapted(bb, node, x, whole, product)
        return bb.emit(relax.op.reshape(product, (*outer, columns)))

    def _adapted(self, bb: Any, node: fx.Node, x: relax.Expr, shape: tuple[int, ...], y: relax.Expr) -> relax.Expr:
        """The output y of a layer with LoRAs applied, or y itself in programs without LoRAs; x is read in `shape`.

        The result is a new tensor: TVM's memory planner may reuse the memory of y after what it sees as its last use.
        """
        if not self._loras:
            return y
        weight = node.args[1]
        layer = self._parameters[getattr(weight, "name", "")].removeprefix("unet.").removesuffix(".weight")
        name = tvm.ir.StringImm(layer)
        given = x if shape_of(x) == shape else bb.emit(relax.op.reshape(x, shape))
        return bb.emit(relax.call_dps_packed(ADD_LOW_RANK, [given, y, name], relax.TensorType(shape_of(y), FLOAT)))

    # Norms and attention

    def _group_norm(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, groups, weight, bias, eps = filled(importer.retrieve_args(node), (None, None, 1e-5), 2)[:5]
        picture = self.to_nhwc(bb, x)
        batch, height, width, channels = shape_of(picture)
        flat = bb.emit(relax.op.reshape(picture, (batch, height * width, channels)))
        gamma, beta = self._weight(node.args[2], Layout(), weight), self._weight(node.args[3], Layout(), bias)
        sizes = (batch, height * width, channels, groups, eps)
        factors = self._call(bb, norms.group_norm, sizes, [flat, gamma, beta], (batch, 2, channels))
        scale, shift = (
            bb.emit(
                relax.op.reshape(bb.emit(relax.op.strided_slice(factors, [1], [i], [i + 1])), (batch, 1, 1, channels))
            )
            for i in (0, 1)
        )
        scaled = bb.emit(relax.op.multiply(picture, scale))
        return self.from_nhwc(bb, bb.emit(relax.op.add(scaled, shift)))

    def _layer_norm(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb = importer.block_builder
        x, axes, weight, bias, eps = filled(importer.retrieve_args(node), (None, None, 1e-5), 2)[:5]
        shape = shape_of(x)
        if len(axes) != 1:
            raise UnsupportedOperationError(f"{node}: a LayerNorm over {len(axes)} axes")
        rows, width = math.prod(shape[:-1]), shape[-1]
        gamma, beta = self._weight(node.args[2], Layout(), weight), self._weight(node.args[3], Layout(), bias)
        flat = bb.emit(relax.op.reshape(x, (rows, width)))

        def normed(halved: bool) -> relax.Expr:
            sizes, dtype = (rows, width, eps, halved), HALF if halved else FLOAT
            y = self._call(bb, norms.layer_norm, sizes, [flat, gamma, beta], (rows, width), dtype)
            return bb.emit(relax.op.reshape(y, shape))

        y = normed(False)
        if self._tile.halved:
            self._halves[y] = normed(True)  # for products; dead-code elimination removes the one that nothing reads
        return y

    def _transpose(self, node: fx.Node, importer: Any) -> relax.Expr:
        """Transpose two axes, and remember the input: attention undoes the transposition of heads and tokens."""
        bb = importer.block_builder
        x, first, second = importer.retrieve_args(node)
        if x in self._untransposed and (first, second) == (1, 2):
            return self._untransposed[x]
        axes = list(range(len(shape_of(x))))
        axes[first], axes[second] = axes[second], axes[first]
        y = bb.emit(relax.op.permute_dims(x, axes))
        if len(axes) == 4 and (first, second) == (1, 2):
            self._untransposed[y] = x
        return y

    def _sdpa(self, node: fx.Node, importer: Any) -> relax.Expr:
        bb, given = importer.block_builder, importer.retrieve_args(node)
        if any(option not in (None, 0.0, False) for option in given[3:]) or node.kwargs.get("scale") is not None:
            raise UnsupportedOperationError(f"{node}: attention with a mask, dropout or a scale of its own")
        query, key, value = (self._untransposed[t] for t in given[:3])
        shape = relax.TensorType(shape_of(query), query.ty.dtype)
        attended = bb.emit(relax.call_dps_packed(SDPA, [query, key, value], shape))
        y = bb.emit(relax.op.permute_dims(attended, [0, 2, 1, 3]))
        self._untransposed[y] = attended
        return y


def _feeds_attention(node: fx.Node) -> bool:
    """Whether only attention reads a product, directly or through views."""
    views = {"view.default", "reshape.default", "transpose.int"}
    names = [(user, getattr(user.target, "__name__", "")) for user in node.users]
    return bool(names) and all(
        name == "scaled_dot_product_attention.default" or (name in views and _feeds_attention(user))
        for user, name in names
    )


def import_graph(converters: Converters, exported: torch.export.ExportedProgram) -> tvm.IRModule:
    """The model as a Relax module. Its `main` takes the inputs, and then `converters.weights` in their order."""
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
