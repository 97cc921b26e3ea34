"""LoRAs in compiled programs: torch computes the two products of each adapted layer, from the torch backend's slots.

A program with LoRAs calls `_add_low_rank` after every linear layer and convolution, as all programs call torch's
attention. The call reads the same slots and row weights as on the torch backend (`adapters/slots.py`). A change of
LoRAs therefore changes only numbers, and a layer that no LoRA in use adapts costs only the call. Programs without LoRAs
have no such calls.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import tvm_ffi
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from pipelines.adapters.modules import AdaptedModule, SlottedModule

ADD_LOW_RANK = "sdgraph.add_low_rank"


class _Now(threading.local):
    """The adapted modules of the program that runs on this thread, by the names of their layers."""

    modules: Mapping[str, AdaptedModule] = {}


_now = _Now()


@contextmanager
def adapted(modules: Mapping[str, AdaptedModule]) -> Iterator[None]:
    """Within the block, programs on this thread apply the LoRAs that these modules hold in their slots."""
    before, _now.modules = _now.modules, modules
    try:
        yield
    finally:
        _now.modules = before


@torch.inference_mode()
def _add_low_rank(given: Any, made: Any, name: str, result: Any) -> None:
    """Write a layer's output with LoRAs applied to `result`.

    Args:
        given: the layer's input: `[1, rows x places, in]`, or `[rows, height, width, in]` for a convolution of 3 x 3.
        made: the layer's output without LoRAs, `[1, rows x places, out]` or `[rows, height, width, out]`.
        name: name of the layer in the UNet.
        result: a tensor of the shape of `made`, which is written.
    """
    module = _now.modules.get(name)
    output = from_dlpack(result).copy_(from_dlpack(made))
    if isinstance(module, SlottedModule) and module.factors is not None and module.current.weights is not None:
        add_low_rank(module, from_dlpack(given), output, module.current.weights)


def add_low_rank(module: SlottedModule, given: Tensor, result: Tensor, weights: Tensor) -> None:
    """Compute `result += B (w * A given)` in the layouts of compiled programs; `weights` is w, `[rows, ranks]`."""
    assert module.factors is not None
    down, up = module.factors
    if given.ndim == 4:
        assert isinstance(module, nn.Conv2d)
        picture = given.permute(0, 3, 1, 2)
        hidden = nn.functional.conv2d(picture, down, stride=module.stride, padding=module.padding)
        hidden = hidden.permute(0, 2, 3, 1).reshape(len(weights), -1, len(down))
    else:
        hidden = nn.functional.linear(given.view(len(weights), -1, given.shape[-1]), down.flatten(1))
    hidden *= weights[:, None]
    result.view(-1, up.shape[1]).addmm_(hidden.view(-1, len(down)), up)


tvm_ffi.register_global_func(ADD_LOW_RANK, _add_low_rank, override=True)
