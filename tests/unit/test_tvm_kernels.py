"""Each hand-scheduled kernel against torch, on shapes with rests and awkward divisors; what cannot be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
import tvm
import tvm_ffi
from torch import Tensor, nn

from pipelines.backends.tvm import norms, products, winograd
from pipelines.backends.tvm.artifacts import best_level
from pipelines.backends.tvm.convert import Converters, import_graph
from pipelines.backends.tvm.feature_maps import UnsupportedOperationError
from pipelines.backends.tvm.lower import CompileError, lower
from pipelines.backends.tvm.packing import Layout, aligned
from pipelines.backends.tvm.products import Tile

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": best_level()})
TILES = {"AVX2": Tile.of(256), "AVX-512": Tile.of(512)}  # both compile to what this machine has


def run(function: Any, *tensors: Tensor) -> None:
    compiled = tvm.compile(tvm.IRModule({"main": function}), target=TARGET)
    compiled["main"](*[tvm_ffi.from_dlpack(aligned(tensor)) for tensor in tensors])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(2, 64, 32), (77, 48, 640), (96, 4, 36), (331, 80, 600)])
def test_gemm(tile: Tile, rows: int, columns: int, depth: int) -> None:
    x, w, bias, y = draw(rows, depth), draw(columns, depth), draw(columns), torch.empty(1, rows, columns)
    packed = Layout("matrix", tile.panel(columns)).pack(w)
    run(products.gemm("main", 1, rows, columns, depth, True, False, tile), x[None], packed, bias, y)
    assert torch.allclose(y[0], functional.linear(x, w, bias), atol=1e-3)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    ("height", "width", "channels", "filters", "stride"),
    [(5, 7, 12, 32, 1), (9, 6, 320, 24, 2), (8, 16, 4, 64, 1), (13, 19, 64, 4, 1)],
)
def test_conv2d(tile: Tile, height: int, width: int, channels: int, filters: int, stride: int) -> None:
    x, w, bias = draw(2, channels, height, width), draw(filters, channels, 3, 3), draw(filters)
    expected = functional.conv2d(x, w, bias, stride, 1)
    y = torch.empty_like(expected.permute(0, 2, 3, 1).contiguous())
    padded = functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    packed = Layout("conv", tile.panel(filters)).pack(w)
    sizes = (2, height + 2, width + 2, channels, filters, 3, stride, tile)
    run(products.conv2d("main", *sizes), padded, packed, bias, y)
    assert torch.allclose(y.permute(0, 3, 1, 2), expected, atol=1e-3)


@pytest.mark.parametrize("m", [2, 4])
def test_winograd(m: int) -> None:
    height, width, channels, filters, tile = 8, 12, 24, 40, TILES["AVX2"]
    x, w, bias = draw(2, channels, height, width), draw(filters, channels, 3, 3) / 9, draw(filters)
    points, tiles = (m + 2) ** 2, 2 * (height // m) * (width // m)
    spread, product = torch.empty(points, tiles, channels), torch.empty(points, tiles, filters)
    y = torch.empty(2, height, width, filters)
    padded = functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    packed = Layout("winograd", tile.panel(filters), m).pack(w)
    run(winograd.winograd_input("main", 2, height, width, channels, m, False), padded, spread)
    run(products.gemm("main", points, tiles, filters, channels, False, False, tile), spread, packed, product)
    run(winograd.winograd_output("main", 2, height, width, filters, m), product, bias, y)
    assert torch.allclose(y.permute(0, 3, 1, 2), functional.conv2d(x, w, bias, padding=1), atol=1e-3)


def test_group_norm_and_layer_norm_equal_torchs() -> None:
    x, weight, bias = draw(2, 30, 48) * 3 + 1, draw(48), draw(48)
    factors, y = torch.empty(2, 2, 48), torch.empty(60, 48)
    run(norms.group_norm("main", 2, 30, 48, 8, 1e-5), x, weight, bias, factors)
    expected = functional.group_norm(x.transpose(1, 2), 8, weight, bias, 1e-5).transpose(1, 2)
    assert torch.allclose(x * factors[:, :1] + factors[:, 1:], expected, atol=1e-4)
    flat = x.reshape(60, 48)
    run(norms.layer_norm("main", 60, 48, 1e-5, False), flat, weight, bias, y)
    assert torch.allclose(y, functional.layer_norm(flat, (48,), weight, bias), atol=1e-4)


def test_a_layouts_shape_is_what_it_packs_to() -> None:
    matrix, filters = draw(32, 24), draw(32, 24, 3, 3)
    for layout, weight in (
        (Layout(), draw(32)),
        (Layout("matrix", 16), matrix),
        (Layout("conv", 16), filters),
        (Layout("winograd", 16, 4), filters),
        (Layout("winograd", 8, 2), filters),
        (Layout("matrix16", 16), matrix),
        (Layout("conv16", 16), filters),
        (Layout("winograd16", 8, 2), filters),
    ):
        packed = layout.pack(weight)
        assert (tuple(packed.shape), packed.dtype) == (layout.shape(tuple(weight.shape)), layout.dtype)


def test_what_is_not_aligned_is_copied() -> None:
    tensor = torch.zeros(64)
    assert aligned(tensor) is tensor
    assert aligned(tensor[1:]).data_ptr() % 64 == 0


def compile_module(module: nn.Module, *inputs: Tensor) -> None:
    exported = torch.export.export(module.eval(), inputs)
    lower(import_graph(Converters(exported, Tile.of(256)), exported), TARGET)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x


def test_a_heavy_operation_without_a_kernel_fails_the_compile_by_name() -> None:
    compile_module(Product(), draw(8, 8))  # light enough to run as TVM wrote it
    with pytest.raises(CompileError, match=r"kernel matmul \(\d+ iterations\) is unscheduled"):
        compile_module(Product(), draw(128, 128))


@pytest.mark.parametrize("module", [nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 3, groups=2)])
def test_a_form_no_converter_knows_fails_the_compile(module: nn.Module) -> None:
    with pytest.raises(UnsupportedOperationError, match="dilation, groups"):
        compile_module(module, draw(1, 8, 8, 8))
