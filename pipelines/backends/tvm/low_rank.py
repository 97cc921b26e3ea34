"""LoRAs in compiled programs: the two products of each adapted layer, by torch, over the slots of the torch backend.

A program for LoRAs calls out after every linear layer and convolution, as all programs do for attention. What the call
finds are the same slots and row weights as on the torch backend (`adapters/slots.py`), so that a change of LoRAs is a
change of numbers, and layers that no LoRA in use touches cost only the call. Programs without LoRAs have no such calls.
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
    """What the program that runs on this thread is adapted with."""

    modules: Mapping[str, AdaptedModule] = {}


_now = _Now()


@contextmanager
def adapted(modules: Mapping[str, AdaptedModule]) -> Iterator[None]:
    """Within the block, programs on this thread add what these modules of a UNet's skeleton hold."""
    before, _now.modules = _now.modules, modules
    try:
        yield
    finally:
        _now.modules = before


@torch.inference_mode()
def _add_low_rank(given: Any, made: Any, name: str, result: Any) -> None:
    """What LoRAs make of a layer's output.

    Args:
        given: what the layer got: `[1, rows x places, in]`, or `[rows, height, width, in]` for a convolution of 3 x 3.
        made: what it made of that, `[1, rows x places, out]` or `[rows, height, width, out]`.
        name: the layer's, in the UNet.
        result: gets the answer, of the same shape.
    """
    module = _now.modules.get(name)
    output = from_dlpack(result).copy_(from_dlpack(made))
    if isinstance(module, SlottedModule) and module.factors is not None and module.current.weights is not None:
        add_low_rank(module, from_dlpack(given), output, module.current.weights)


def add_low_rank(module: SlottedModule, given: Tensor, result: Tensor, weights: Tensor) -> None:
    """`result += B (w * A given)`, in the layouts of compiled programs; `weights` is `[rows, ranks]`."""
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
