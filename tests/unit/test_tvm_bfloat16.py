"""Kernels that multiply bfloat16 against torch's float32 over the same rounded values, on shapes with rests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
import tvm
import tvm_ffi
from torch import Tensor

from pipelines.backends.tvm import norms, products, winograd
from pipelines.backends.tvm.artifacts import best_level
from pipelines.backends.tvm.bfloat16 import HALF, rounded
from pipelines.backends.tvm.compile import target_of, tile_of
from pipelines.backends.tvm.packing import Layout, aligned
from pipelines.backends.tvm.products import Tile
from pipelines.backends.tvm.tir import kernel

LEVEL = best_level(precision="bfloat16")
TILES = {"AVX2, emulated": Tile.of(256, "emulated"), "this machine's best": tile_of(LEVEL, "bfloat16")}
every_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)


def run(function: Any, *tensors: Tensor) -> None:
    compiled = tvm.compile(tvm.IRModule({"main": function}), target=target_of(LEVEL))
    compiled["main"](*[tvm_ffi.from_dlpack(aligned(tensor)) for tensor in tensors])


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def halves(tensor: Tensor) -> Tensor:
    """As kernels take bfloat16."""
    return tensor.bfloat16().view(torch.uint16)


def as_rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).norm() < 1e-5 * theirs.norm())


def test_rounding_is_torchs_to_the_bit() -> None:
    from tvm.tirx.script import builder as ir

    bits = torch.arange(-(2**31), 2**31, 2**12 + 1, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 1.00390625, 1.01171875])
    x = torch.cat([special, bits.view(torch.float32)])
    x = x[: len(x) // 16 * 16]

    def body(values: Any, result: Any) -> None:
        with ir.serial(0, len(x) // 16) as i, ir.vectorized(0, 16) as z:
            ir.buffer_store(result, rounded(values[i * 16 + z]), [i * 16 + z])

    ours = torch.empty(len(x), dtype=torch.uint16)
    run(kernel("main", {"x": (len(x),), "y": (len(x),)}, body, {"y": HALF}), x, ours)
    numbers = ~x.isnan()
    assert torch.equal(ours.view(torch.int16)[numbers], halves(x).view(torch.int16)[numbers])
    assert ours.view(torch.bfloat16)[4].isnan()


@every_tile
@pytest.mark.parametrize(("rows", "columns", "depth"), [(2, 64, 32), (77, 48, 640), (96, 4, 36), (331, 80, 600)])
def test_gemm(tile: Tile, rows: int, columns: int, depth: int) -> None:
    x, w, bias = draw(rows, depth), draw(columns, depth), draw(columns)
    packed = Layout("matrix16", tile.panel(columns)).pack(w)
    y, half = torch.empty(1, rows, columns), torch.empty(1, rows, columns, dtype=torch.uint16)
    run(products.gemm("main", 1, rows, columns, depth, True, False, tile), halves(x)[None], packed, bias, y)
    assert close(y[0], functional.linear(as_rounded(x), as_rounded(w), bias))
    run(products.gemm("main", 1, rows, columns, depth, True, True, tile), halves(x)[None], packed, bias, half)
    assert torch.allclose(half.view(torch.bfloat16).float(), y, rtol=2**-7, atol=1e-4), "rounded once, at the end"


@every_tile
@pytest.mark.parametrize(
    ("height", "width", "channels", "filters", "stride"), [(5, 7, 12, 32, 1), (9, 6, 320, 24, 2), (8, 16, 4, 64, 1)]
)
def test_conv2d(tile: Tile, height: int, width: int, channels: int, filters: int, stride: int) -> None:
    x, w, bias = draw(2, channels, height, width), draw(filters, channels, 3, 3), draw(filters)
    expected = functional.conv2d(as_rounded(x), as_rounded(w), bias, stride, 1)
    y = torch.empty_like(expected.permute(0, 2, 3, 1).contiguous())
    padded = halves(functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous())
    packed = Layout("conv16", tile.panel(filters)).pack(w)
    sizes = (2, height + 2, width + 2, channels, filters, 3, stride, tile)
    run(products.conv2d("main", *sizes), padded, packed, bias, y)
    assert close(y.permute(0, 3, 1, 2), expected)


@every_tile
def test_winograd_hardly_adds_to_the_rounding(tile: Tile) -> None:
    """Its transforms are float32, its products bfloat16: at most twice what a direct convolution loses."""
    height, width, channels, filters = 8, 12, 24, 48
    x, w, bias = draw(2, channels, height, width), draw(filters, channels, 3, 3) / 9, draw(filters)
    tiles = 2 * (height // 2) * (width // 2)
    spread, product = torch.empty(16, tiles, channels, dtype=torch.uint16), torch.empty(16, tiles, filters)
    y = torch.empty(2, height, width, filters)
    padded = functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    packed = Layout("winograd16", tile.panel(filters), 2).pack(w)
    run(winograd.winograd_input("main", 2, height, width, channels, 2, True), padded, spread)
    run(products.gemm("main", 16, tiles, filters, channels, False, False, tile), spread, packed, product)
    run(winograd.winograd_output("main", 2, height, width, filters, 2), product, bias, y)
    exact = functional.conv2d(x, w, padding=1)
    direct = functional.conv2d(as_rounded(x), as_rounded(w), padding=1)
    ours = y.permute(0, 3, 1, 2) - bias[None, :, None, None]
    assert 0 < (ours - exact).norm() < 2 * (direct - exact).norm()


def test_layer_norm_for_products() -> None:
    x, weight, bias, y = draw(60, 48) * 3 + 1, draw(48), draw(48), torch.empty(60, 48, dtype=torch.uint16)
    run(norms.layer_norm("main", 60, 48, 1e-5, True), x, weight, bias, y)
    expected = functional.layer_norm(x, (48,), weight, bias)
    assert torch.allclose(y.view(torch.bfloat16).float(), expected, rtol=2**-7, atol=1e-4)


def test_code_for_machines_that_multiply_bfloat16_does_so() -> None:
    """Whatever this machine can: its assembly has the instruction, and the emulated code has not."""
    for level, wanted in (("x86-64-v4+bf16", True), ("x86-64-v4", False), ("x86-64-v3", False)):
        function = products.gemm("main", 1, 96, 128, 320, True, False, tile_of(level, "bfloat16"))
        compiled = tvm.compile(tvm.IRModule({"main": function}), target=target_of(level))
        assembly = compiled.mod.inspect_source("asm")
        assert ("vdpbf16ps" in assembly) == wanted
        if wanted:
            assert "call\tsdgraph_dot" not in assembly, "the instruction is inlined"
